"""Public clients against a live server with the embedded model; each is skipped if it is not there.

LangChain and LiteLLM come with the extra `clients`, the Node ones with `npm install` in
tests/server/node_clients.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from nanovllm.model_files import ASSETS

from .live_server import Live

NODE = Path(__file__).with_name("node_clients")
QUESTION = "What is a KV cache?"
WEATHER = "What is the weather in Paris?"
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
}


@pytest.fixture(scope="module")
def demo() -> Iterator[Live]:
    if not (ASSETS / "demo" / "model.safetensors").exists():
        pytest.skip("the embedded model is not there")
    server = Live("demo", {"served_model_names": ("demo",)}, max_model_len=1024)
    yield server
    server.close()


@pytest.fixture(scope="module")
def answer(demo: Live) -> str:
    """What the model says to QUESTION."""
    found = demo.client().chat.completions.create(
        model="demo", messages=[{"role": "user", "content": QUESTION}]
    )
    text = found.choices[0].message.content
    assert text
    assert "key" in text
    return text


def test_openai_python(demo: Live, answer: str) -> None:
    client = demo.client()
    tools: Any = [
        {
            "type": "function",
            "function": {
                "name": "get_weather",
                "description": "Get the weather of a city",
                "parameters": PARAMETERS,
            },
        }
    ]
    with client.chat.completions.stream(
        model="demo", messages=[{"role": "user", "content": WEATHER}], tools=tools
    ) as stream:
        choice = stream.get_final_completion().choices[0]
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls or ()
    assert (call.function.name, json.loads(call.function.arguments)) == (
        "get_weather",
        {"city": "Paris"},
    )
    chunks = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": QUESTION}], stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        client.completions.create(model="demo", prompt="word " * 3000)


def test_langchain(demo: Live, answer: str) -> None:
    langchain = pytest.importorskip("langchain_openai")
    model = langchain.ChatOpenAI(
        model="demo", base_url=f"{demo.url}/v1", api_key="none", stream_usage=True
    )
    whole = model.invoke(QUESTION)
    assert whole.content == answer
    chunks = list(model.stream(QUESTION))
    assert "".join(chunk.content for chunk in chunks) == answer
    used = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
    assert used[-1]["output_tokens"] == whole.usage_metadata["output_tokens"]
    spec = {"title": "get_weather", "description": "Get the weather of a city", **PARAMETERS}
    bound = model.bind_tools([spec])
    assert bound.invoke(WEATHER).tool_calls[0]["args"] == {"city": "Paris"}
    first, *rest = bound.stream(WEATHER)
    for chunk in rest:
        first += chunk
    assert first.tool_calls[0]["args"] == {"city": "Paris"}


@pytest.mark.filterwarnings("ignore")  # of its own types and connections
def test_litellm(demo: Live, answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    litellm = pytest.importorskip("litellm")
    to: Any = {"model": "openai/demo", "api_base": f"{demo.url}/v1", "api_key": "none"}
    messages = [{"role": "user", "content": QUESTION}]
    whole = litellm.completion(messages=messages, **to)
    assert whole.choices[0].message.content == answer
    chunks = litellm.completion(messages=messages, stream=True, **to)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer
    with pytest.raises(litellm.exceptions.ContextWindowExceededError):
        litellm.completion(messages=[{"role": "user", "content": "word " * 3000}], **to)


def test_node_clients(demo: Live, answer: str) -> None:
    node = shutil.which("node")
    if node is None or not (NODE / "node_modules").is_dir():
        pytest.skip("no node, or no npm install in tests/server/node_clients")
    done = subprocess.run(
        [node, "clients.mjs", f"{demo.url}/v1"],
        cwd=NODE,
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["whole"] == found["streamed"] == found["sdk"] == answer
    assert found["usage"]["completion_tokens"] == found["sdkTokens"]
    assert found["call"] == [
        "tool_calls",
        {"name": "get_weather", "arguments": '{"city": "Paris"}'},
    ]
    assert found["error"] == [404, "model_not_found", "NotFoundError"]
    assert found["sdkCall"] == found["sdkStreamedCall"] == {"city": "Paris"}
