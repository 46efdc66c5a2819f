"""Talks to a server with LangChain and LiteLLM; prints what they made of it as one JSON object.

Runs in an environment of its own, where there is no nanovllm.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # nothing is fetched from elsewhere
os.environ["LANGSMITH_TRACING"] = "false"
warnings.simplefilter("ignore")  # of their own types

import litellm  # noqa: E402
from langchain_openai import ChatOpenAI  # noqa: E402

litellm.telemetry = False
QUESTION = "What is a KV cache?"
WEATHER = "What is the weather in Paris?"
SPEC = {
    "title": "get_weather",
    "description": "Get the weather of a city",
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
}


def langchain(url: str) -> dict[str, Any]:
    model = ChatOpenAI(model="demo", base_url=url, api_key="none", stream_usage=True)
    whole = model.invoke(QUESTION)
    chunks = list(model.stream(QUESTION))
    bound = model.bind_tools([SPEC])
    first, *rest = bound.stream(WEATHER)
    for chunk in rest:
        first += chunk
    return {
        "whole": whole.content,
        "streamed": "".join(chunk.content for chunk in chunks),
        "tokens": whole.usage_metadata["output_tokens"],
        "streamed_tokens": [
            chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata
        ][-1],
        "call": bound.invoke(WEATHER).tool_calls[0]["args"],
        "streamed_call": first.tool_calls[0]["args"],
    }


def lite(url: str) -> dict[str, Any]:
    to: Any = {"model": "openai/demo", "api_base": url, "api_key": "none"}
    messages = [{"role": "user", "content": QUESTION}]
    whole = litellm.completion(messages=messages, **to)
    chunks = litellm.completion(messages=messages, stream=True, **to)
    tools = [
        {
            "type": "function",
            "function": {
                "name": "get_weather",
                "description": SPEC["description"],
                "parameters": {k: SPEC[k] for k in ("type", "properties", "required")},
            },
        }
    ]
    asked = [{"role": "user", "content": WEATHER}]
    (call,) = litellm.completion(messages=asked, tools=tools, **to).choices[0].message.tool_calls
    found: dict[str, Any] = {
        "whole": whole.choices[0].message.content,
        "streamed": "".join(chunk.choices[0].delta.content or "" for chunk in chunks),
        "tokens": whole.usage.completion_tokens,
        "call": json.loads(call.function.arguments),
    }
    try:
        litellm.completion(messages=[{"role": "user", "content": "word " * 3000}], **to)
    except Exception as error:
        found["too_long"] = type(error).__name__
    return found


if __name__ == "__main__":
    print(json.dumps({"langchain": langchain(sys.argv[1]), "litellm": lite(sys.argv[1])}))
