"""Arbitrary bodies: every answer is a success or a refusal in OpenAI's shape."""

from __future__ import annotations

import http.client
import json
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanovllm.server import schemas

from .live_server import Live, assert_answer, assert_error

Json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.integers(-3, 300)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12)
    | st.sampled_from(["tiny", "user", "assistant", "tool", "text", "function", "auto", "<think>"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.text(max_size=5)
            | st.sampled_from(["role", "content", "type", "text", "name", "function", "5"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
Text = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60)
Likely: dict[str, Any] = {
    "model": st.sampled_from(["tiny", "org/tiny", "none"]),
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries(
        {}, optional={"include_usage": st.booleans(), "continuous_usage_stats": st.booleans()}
    ),
    "max_tokens": st.integers(1, 6),
    "max_completion_tokens": st.integers(1, 6),
    "min_tokens": st.integers(0, 4),
    "temperature": st.floats(0, 100),
    "top_p": st.floats(0.01, 1),
    "top_k": st.integers(-1, 500),
    "min_p": st.floats(0, 1),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "repetition_penalty": st.floats(0.01, 100),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "n": st.integers(1, 4),
    "stop": Text | st.lists(Text, max_size=4),
    "stop_token_ids": st.lists(st.integers(0, 300), max_size=3),
    "logit_bias": st.dictionaries(st.integers(0, 300).map(str), st.floats(-100, 100), max_size=3),
    "allowed_token_ids": st.lists(st.integers(0, 300), min_size=1, max_size=3),
    "bad_words": st.lists(st.text(min_size=1, max_size=5), max_size=2),
    "ignore_eos": st.booleans(),
    "cache_salt": st.text(max_size=5),
    "priority": st.integers(-5, 5),
    "timings": st.booleans(),
}
Schema = Json | st.sampled_from(
    [
        {"type": "object"},
        {"type": "integer"},
        {"enum": ["a", 1, None]},
        {"$ref": "#"},
        {"type": "x"},
    ]
)
Grammar = st.text(max_size=12) | st.sampled_from(
    [
        "a{3}",
        "(",
        "start: x",
        'start: "a" start | "b"',
        'root ::= "a"*',
        "start: /(/",
        "\x00",
        "a/b",
    ]
)
Choices = st.lists(st.text(max_size=5), max_size=3)
Forms = {
    "response_format": st.fixed_dictionaries(
        {"type": st.sampled_from(["text", "json_object", "json_schema", "x"])},
        optional={"json_schema": st.fixed_dictionaries({"name": Text, "schema": Schema})},
    ),
    "structured_outputs": st.fixed_dictionaries(
        {},
        optional={"json": Schema, "regex": Grammar, "grammar": Grammar, "choice": Choices},
    ),
    "guided_json": Schema,
    "guided_regex": Grammar,
    "guided_grammar": Grammar,
    "guided_choice": Choices,
}
Message = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "developer", "user", "assistant", "tool"])},
    optional={
        "content": Text
        | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": Text}), max_size=3)
        | st.none(),
        "name": st.text(max_size=5),
        "tool_calls": st.lists(
            st.fixed_dictionaries(
                {
                    "function": st.fixed_dictionaries(
                        {"name": st.text(max_size=5), "arguments": Text}
                    )
                }
            ),
            max_size=2,
        ),
    },
)
Tools = st.lists(
    st.fixed_dictionaries(
        {
            "type": st.just("function"),
            "function": st.fixed_dictionaries(
                {"name": st.text(max_size=5)}, optional={"parameters": Json}
            ),
        }
    ),
    max_size=2,
)
Chat = Likely | {
    "messages": st.lists(Message, min_size=1, max_size=4),
    "logprobs": st.booleans(),
    "top_logprobs": st.integers(0, 20),
    "tools": Tools,
    "tool_choice": st.sampled_from(
        ["auto", "none", "required", {"type": "function", "function": {"name": "f"}}]
    ),
    "parallel_tool_calls": st.booleans(),
    "chat_template_kwargs": st.dictionaries(st.sampled_from(["enable_thinking", "x"]), Json),
    "add_generation_prompt": st.booleans(),
}
Completion = Likely | {
    "prompt": Text
    | st.lists(Text, max_size=3)
    | st.lists(st.integers(0, 399), max_size=20)
    | st.lists(st.lists(st.integers(0, 399), max_size=8), max_size=3),
    "echo": st.booleans(),
    "best_of": st.integers(1, 5),
    "logprobs": st.integers(0, 20),
}


def bodies(likely: dict[str, Any], required: str) -> st.SearchStrategy[dict[str, Any]]:
    """Mostly sensible fields, a few of them anything at all."""
    usual = st.fixed_dictionaries(
        {required: likely[required]}, optional={k: v for k, v in likely.items() if k != required}
    )
    wild = st.dictionaries(
        st.sampled_from([*likely, *schemas.UNSUPPORTED, "unknown"]), Json, max_size=2
    )
    return st.builds(lambda a, b: a | b, usual, st.just({}) | wild)


def check(live: Live, path: str, body: Any) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", live.port, timeout=60)
    data = json.dumps(body).encode("utf-8", "surrogatepass")
    connection.request("POST", path, data, {"Content-Type": "application/json"})
    response = connection.getresponse()
    raw = response.read()
    connection.close()
    assert response.status in (200, 400, 404), raw
    if response.status != 200:
        assert_error(json.loads(raw))
    else:
        assert_answer(path, response.getheader("content-type", ""), raw)


FUZZ = settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


@FUZZ
@given(body=bodies(Chat, "messages"))
def test_chat(live: Live, body: dict[str, Any]) -> None:
    check(live, "/v1/chat/completions", body)


@FUZZ
@given(body=bodies(Completion, "prompt"))
def test_completions(live: Live, body: dict[str, Any]) -> None:
    check(live, "/v1/completions", body)


@FUZZ
@given(
    path=st.sampled_from(["/v1/chat/completions", "/v1/completions"]),
    form=st.sampled_from(sorted(Forms)).flatmap(
        lambda name: st.fixed_dictionaries({name: Forms[name]})
    ),
    more=st.fixed_dictionaries({}, optional=Forms | Likely),
)
def test_forms(live: Live, path: str, form: dict[str, Any], more: dict[str, Any]) -> None:
    """One form, and sometimes a second one or anything else beside it."""
    body = {"messages": [{"role": "user", "content": "x"}], "prompt": "x", "max_tokens": 4}
    check(live, path, body | more | form)
    check(live, path, body | form)


@FUZZ
@given(tools=Tools, choice=Chat["tool_choice"], parameters=Schema)
def test_tools(live: Live, tools: list[Any], choice: Any, parameters: Any) -> None:
    tools = [*tools, {"type": "function", "function": {"name": "f", "parameters": parameters}}]
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4}
    for style in ("tagged", "pythonic"):
        live.service.tool_style = style
        check(live, "/v1/chat/completions", body | {"tools": tools, "tool_choice": choice})
    live.service.tool_style = "tagged"


@FUZZ
@given(body=Json)
def test_anything(live: Live, body: Any) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"):
        connection = http.client.HTTPConnection("127.0.0.1", live.port, timeout=60)
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        raw = response.read()
        connection.close()
        assert response.status == 200 or assert_error(json.loads(raw))
        assert response.status < 500
