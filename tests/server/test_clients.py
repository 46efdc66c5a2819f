"""Public clients against a live server with the embedded model.

`make test` installs LangChain and LiteLLM into an environment of their own, and the Node ones where
there is npm; elsewhere they are skipped with a reason.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from nanovllm.model_files import ASSETS

from .live_server import Live

NODE = Path(__file__).with_name("node_clients")
PYTHON = Path(__file__).with_name("python_clients")
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


def _run(command: list[str], directory: Path) -> dict[str, Any]:
    """What a script that runs other clients printed last."""
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_python_clients(demo: Live, answer: str) -> None:
    python = Path(sys.prefix) / "clients" / "bin" / "python"
    if not python.exists():
        pytest.skip("LangChain and LiteLLM are not there: `make test` installs them")
    found = _run([str(python), "clients.py", f"{demo.url}/v1"], PYTHON)
    langchain, litellm = found["langchain"], found["litellm"]
    assert langchain["whole"] == langchain["streamed"] == answer
    assert litellm["whole"] == litellm["streamed"] == answer
    assert langchain["tokens"] == langchain["streamed_tokens"] == litellm["tokens"] > 0
    assert langchain["call"] == langchain["streamed_call"] == litellm["call"] == {"city": "Paris"}
    assert litellm["too_long"] == "ContextWindowExceededError"


def test_node_clients(demo: Live, answer: str) -> None:
    node = shutil.which("node")
    if node is None or not (NODE / "node_modules").is_dir():
        pytest.skip("the Node clients are not there: `make test` installs them where there is npm")
    found = _run([node, "clients.mjs", f"{demo.url}/v1"], NODE)
    assert found["whole"] == found["streamed"] == found["sdk"] == answer
    assert found["usage"]["completion_tokens"] == found["sdkTokens"]
    assert found["call"] == [
        "tool_calls",
        {"name": "get_weather", "arguments": '{"city": "Paris"}'},
    ]
    assert found["error"] == [404, "model_not_found", "NotFoundError"]
    assert found["sdkCall"] == found["sdkStreamedCall"] == {"city": "Paris"}
