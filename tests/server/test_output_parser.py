"""Reasoning and tool calls: the parser alone, cut anywhere, and through the public client."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanovllm.server.output_parser import OutputParser, tool_style, whole_message
from nanovllm.text.detokenizer import IncrementalDetokenizer

from .live_server import Live, request

CALL = (
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": [1, 2]}}\n'
    "</tool_call>"
)
CHAT = "/v1/chat/completions"


def parser(**options: Any) -> OutputParser:
    defaults = {"reasoning": True, "thinks": False, "tools": "tagged", "one_call": False}
    return OutputParser(**(defaults | options))


def message(text: str, **options: Any) -> dict[str, Any]:
    found = whole_message(parser(**options), text)[0]
    for call in found.get("tool_calls", ()):
        assert call.pop("id").startswith("call_")
        assert call.pop("type") == "function"
    return found


def said(content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content} | more


def call(name: str, arguments: str) -> dict[str, Any]:
    return {"function": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hello", said("hello")),
        ("", said("")),
        ("  hello  ", said("hello  ")),
        ("<think>\nhm\n</think>\n\nhello", said("hello", reasoning_content="hm")),
        ("<think>hm", said("", reasoning_content="hm")),
        ("<think></think>hi", said("hi")),
        ("a <think>b</think>", said("a <think>b</think>")),
        ("a < b <tool b", said("a < b <tool b")),
        ("<tool_call>", said("<tool_call>")),
        ("<tool_call>no json</tool_call> x", said("<tool_call>no json</tool_call>x")),
        ('<tool_call>{"name": 5}</tool_call>', said('<tool_call>{"name": 5}</tool_call>')),
        (
            CALL,
            said(None, tool_calls=[call("get_weather", '{"city": "Paris", "days": [1, 2]}')]),
        ),
        (
            f"<think>a</think>Let me see.\n{CALL}\n{CALL}\n",
            said(
                "Let me see.",
                reasoning_content="a",
                tool_calls=[call("get_weather", '{"city": "Paris", "days": [1, 2]}')] * 2,
            ),
        ),
        (
            '<tool_call>{"arguments": {"a": "}"}, "name": "f"}</tool_call>',
            said(None, tool_calls=[call("f", '{"a": "}"}')]),
        ),
        (
            '<tool_call>{"name": "f", "arguments": {"a": "\\"}</tool_cal"}}</tool_call>',
            said(None, tool_calls=[call("f", '{"a": "\\"}</tool_cal"}')]),
        ),
        (
            '<tool_call>{"name": "f", "arguments": "{}"}</tool_call>',
            said(None, tool_calls=[call("f", "{}")]),
        ),
        ('<tool_call>{"name": "f"}</tool_call>', said(None, tool_calls=[call("f", "{}")])),
        *(
            (text, said(text))
            for name in (r"\x", r"\u12", r"a\'b")
            if (text := f'<tool_call>{{"name": "{name}", "arguments": {{}}}}</tool_call>')
        ),
        (
            r'<tool_call>{"name": "\u0066\/", "arguments": {}}</tool_call>',
            said(None, tool_calls=[call("f/", "{}")]),
        ),
        (
            '<tool_call>{"name": "f", "arguments": {"a": [1',
            said(None, tool_calls=[call("f", '{"a": [1')]),
        ),
    ],
)
def test_whole_messages(text: str, expected: dict[str, Any]) -> None:
    assert message(text) == expected


def test_options() -> None:
    assert message(CALL, tools=None) == said(CALL)
    assert message("a</think>b", thinks=True) == said("b", reasoning_content="a")
    assert message("<think>a</think>b", reasoning=False) == said("<think>a</think>b")
    assert len(message(CALL * 3, one_call=True)["tool_calls"]) == 1


BARE = '{"name": "get_weather", "parameters": {"city": "Paris"}}'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (BARE, said(None, tool_calls=[call("get_weather", '{"city": "Paris"}')])),
        (f"\n {BARE}\n", said(None, tool_calls=[call("get_weather", '{"city": "Paris"}')])),
        (f"<think>a</think>{BARE}", said(None, reasoning_content="a",
                                         tool_calls=[call("get_weather", '{"city": "Paris"}')])),
        (f"I say {BARE}", said(f"I say {BARE}")),
        ('{"a": 1}', said('{"a": 1}')),
        ("{", said("{")),
        ("", said("")),
        (CALL, said(CALL)),
    ],
)  # fmt: skip
def test_calls_without_tags(text: str, expected: dict[str, Any]) -> None:
    assert message(text, tools="bare") == expected


def test_styles_of_templates() -> None:
    assert tool_style("... <tool_call> ...") == "tagged"
    assert tool_style('... {"name": function name, "parameters": dictionary of ...') == "bare"
    assert tool_style("{{ messages }}") is None
    assert tool_style("'[TOOL_CALLS] [' + calls + ']'") == "mistral"
    assert tool_style("'[TOOL_CALLS]' + name + '[ARGS]' + arguments") == "mistral-named"
    assert tool_style("[func_name1(params_name1=params_value1...), func_name2(params)]") == (
        "pythonic"
    )


WEATHER = call("get_weather", '{"city": "Paris"}')


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"[TOOL_CALLS][{BARE}]", said(None, tool_calls=[WEATHER])),
        (f"[TOOL_CALLS] [{BARE},\n{BARE}] ", said(None, tool_calls=[WEATHER] * 2)),
        (f"[TOOL_CALLS]{BARE}", said(None, tool_calls=[WEATHER])),
        (f"Let me see.\n[TOOL_CALLS][{BARE}]", said("Let me see.", tool_calls=[WEATHER])),
        ('[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}', said(None, tool_calls=[WEATHER])),
        (
            '[TOOL_CALLS]a-b.c[CALL_ID]x1y2[ARGS]{"s": "}"}[TOOL_CALLS]g[ARGS]{} ',
            said(None, tool_calls=[call("a-b.c", '{"s": "}"}'), call("g", "{}")]),
        ),
        (
            '[TOOL_CALLS][{"arguments": {"a": 1}, "name": "f", "id": "x"}]',
            said(None, tool_calls=[call("f", '{"a": 1}')]),
        ),
        ('[TOOL_CALLS][{"name": "f", "argum', said('[TOOL_CALLS][{"name": "f", "argum')),
        (
            '[TOOL_CALLS][{"name": "f", "arguments": {"a": [1',
            said(None, tool_calls=[call("f", '{"a": [1')]),
        ),
        (f'[TOOL_CALLS][{BARE}, {{"x": 1}}]', said('{"x": 1}]', tool_calls=[WEATHER])),
        (f"[TOOL_CALLS][{BARE}] done", said("done", tool_calls=[WEATHER])),
        ("[TOOL_CALLS]", said("[TOOL_CALLS]")),
        ("[TOOL_CALLS][]", said("[TOOL_CALLS][]")),
        ("[TOOL_CALLS]no call", said("[TOOL_CALLS]no call")),
        ("[TOOL_CALLS][5]", said("[TOOL_CALLS][5]")),
        ("[TOOL_CALLS]f[ARGS][1]", said("[TOOL_CALLS]f[ARGS][1]")),
        ("[TOOL", said("[TOOL")),
        ("hello", said("hello")),
    ],
)
def test_calls_as_mistral_writes_them(text: str, expected: dict[str, Any]) -> None:
    for style in ("mistral", "mistral-named"):
        assert message(text, tools=style) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[get_weather(city='Paris')]", said(None, tool_calls=[WEATHER])),
        ('\n[get_weather(city="Paris")]\n', said(None, tool_calls=[WEATHER])),
        (
            "[a.b(x=-1.5, y=[True, None, 'é'], z={'k': (1, 2)}), g()]",
            said(
                None,
                tool_calls=[
                    call("a.b", '{"x": -1.5, "y": [true, null, "é"], "z": {"k": [1, 2]}}'),
                    call("g", "{}"),
                ],
            ),
        ),
        (
            "[f(a=true, b=false, c=null)]",
            said(None, tool_calls=[call("f", '{"a": true, "b": false, "c": null}')]),
        ),
        ("[f(a=')](\\'')]", said(None, tool_calls=[call("f", '{"a": ")](\'"}')])),
        ("[f(a='\\ud83d')]", said(None, tool_calls=[call("f", '{"a": "\\ud83d"}')])),
        ("[f(), nonsense", said(", nonsense", tool_calls=[call("f", "{}")])),
        ("[f()] and more", said("and more", tool_calls=[call("f", "{}")])),
        ("[f(), g(x)]", said(", g(x)]", tool_calls=[call("f", "{}")])),
        ("[1] is a number", said("[1] is a number")),
        ("[f(open('x'))]", said("[f(open('x'))]")),
        ("[f(a=open('x'))]", said("[f(a=open('x'))]")),
        ("[f(a=1e999)]", said("[f(a=1e999)]")),
        ("[f(**{'a': 1})]", said("[f(**{'a': 1})]")),
        ("[f(a=__import__)]", said("[f(a=__import__)]")),
        ("[f(a=" + "[" * 500 + "]" * 500 + ")]", said("[f(a=" + "[" * 500 + "]" * 500 + ")]")),
        ("[f(a=b'x')]", said("[f(a=b'x')]")),
        ("[f(a='\0')]", said("[f(a='\0')]")),
        ("[", said("[")),
        ("[f(a=1", said("[f(a=1")),
        ("I say [f()]", said("I say [f()]")),
    ],
)
def test_calls_in_python_syntax(text: str, expected: dict[str, Any]) -> None:
    assert message(text, tools="pythonic") == expected


def test_halves_of_characters_never_leave() -> None:
    text = '<tool_call>{"arguments": {"a": "\\ud83d"}, "name": "\\udc00"}</tool_call>'
    for body in (text, text.replace("tool_call", "x")):
        json.dumps(message(body), ensure_ascii=False).encode()
    bare = '{"name": "\\udc00", "parameters": {}}'
    json.dumps(message(bare, tools="bare"), ensure_ascii=False).encode()


PIECES = ["<think>", "</think>", "<tool_call>", "</tool_call>", "\n", " ", "a", "<", '"', "\\"]
PIECES += ["{", "}", '{"name": "f", "arguments": {', '"x": [1, "}"]', '{"name": "', CALL, BARE]
PIECES += ['", "arguments": {', "\\u", "u0066"]
PIECES += ["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]x", "[", "]", ",", "(", ")", "f", "=", "'", "1"]
PIECES += ["[f(a=1)", "g(b='x')", "[g()]", "[TOOL_CALLS]f[ARGS]", f"[TOOL_CALLS][{BARE}"]


def joined(deltas: list[dict[str, Any]]) -> dict[str, Any]:
    """What a client makes of deltas; the first one of a call has all keys, later ones no nulls."""
    found: dict[str, Any] = {"content": "", "reasoning_content": "", "calls": []}
    for delta in deltas:
        for name in ("content", "reasoning_content"):
            found[name] += delta.get(name, "")
        for part in delta.get("tool_calls", ()):
            if part["index"] == len(found["calls"]):
                assert set(part) == {"index", "id", "type", "function"}
                assert part["function"]["arguments"] == ""
                found["calls"].append([part["function"]["name"], ""])
            else:
                assert set(part) == {"index", "function"}
                assert set(part["function"]) == {"arguments"}
                found["calls"][part["index"]][1] += part["function"]["arguments"]
    return found


@settings(max_examples=1000, deadline=None)
@given(
    st.lists(st.sampled_from(PIECES), max_size=12),
    st.data(),
    st.sampled_from(["tagged", "bare", "mistral", "mistral-named", "pythonic", None]),
    st.booleans(),
)
@example([CALL, "\n", CALL], None, "tagged", False)
@example([BARE], None, "bare", False)
@example(["[TOOL_CALLS][", BARE, ",", BARE, "]", "a"], None, "mistral", False)
@example(["[f(a=1)", ",", "g(b='x')", "]", " a"], None, "pythonic", False)
def test_any_cutting_gives_the_same(
    pieces: list[str], data: Any, tools: str | None, thinks: bool
) -> None:
    text = "".join(pieces)
    options = {"tools": tools, "thinks": thinks}
    at_once = parser(**options)
    expected = joined(at_once.push(text) + at_once.finish())
    cuts = range(len(text) + 1)
    if data is not None:
        cuts = [0, *sorted(data.draw(st.sets(st.integers(0, len(text))))), len(text)]
    stream = parser(**options)
    deltas = [d for a, b in itertools.pairwise(cuts) for d in stream.push(text[a:b])]
    assert joined(deltas + stream.finish()) == expected
    assert stream.num_calls == at_once.num_calls == len(expected["calls"])


def test_arguments_go_out_while_they_are_written() -> None:
    stream = parser()
    seen = [stream.push(char) for char in CALL]
    fragments = [
        part["function"]["arguments"] for ds in seen for d in ds for part in d.get("tool_calls", ())
    ]
    assert len(fragments) > 20
    assert json.loads("".join(fragments)) == {"city": "Paris", "days": [1, 2]}


# --- over HTTP: what the model writes is scripted -------------------------------------------------


@pytest.fixture
def scripted(live: Live, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes every completion write this text, a few characters a token."""
    texts: list[str] = [""]
    written: dict[int, int] = {}

    def push(self: IncrementalDetokenizer, token_ids: Any) -> str:
        at = written.get(id(self), 0)
        written[id(self)] = at + 3 * len(token_ids)
        return texts[0][at : written[id(self)]]

    def begin(text: str) -> None:
        texts[0] = text + "<end>"
        written.clear()

    monkeypatch.setattr(IncrementalDetokenizer, "push", push)
    monkeypatch.setattr(IncrementalDetokenizer, "flush", lambda self: "")
    return begin


TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
]
ASK: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "weather?"}],
    "stop": "<end>",
    "tools": TOOLS,
    "logit_bias": {"2": -100},
}


def test_the_client_gets_calls_and_reasoning(live: Live, scripted: Callable[[str], None]) -> None:
    scripted(f"<think>\nhm\n</think>\n\nLet me see.\n{CALL}")
    answer = live.client().chat.completions.create(**ASK).choices[0]
    assert answer.finish_reason == "tool_calls"
    assert answer.message.content == "Let me see."
    assert answer.message.reasoning_content == "hm"  # type: ignore[attr-defined]
    (made,) = answer.message.tool_calls or ()
    assert made.function.name == "get_weather"
    scripted(f"<think>\nhm\n</think>\n\nLet me see.\n{CALL}")
    with live.client().chat.completions.stream(**ASK) as stream:
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls"
    assert final.message.content == "Let me see."
    (streamed,) = final.message.tool_calls or ()
    assert json.loads(streamed.function.arguments) == {"city": "Paris", "days": [1, 2]}
    assert streamed.function.arguments == made.function.arguments


def test_no_calls_without_tools(live: Live, scripted: Callable[[str], None]) -> None:
    for more in ({"tools": None}, {"tool_choice": "none"}):
        scripted(CALL)
        answer = request(live.port, "POST", CHAT, ASK | more)[2]["choices"][0]
        assert answer["finish_reason"] == "stop"
        assert answer["message"] == {"role": "assistant", "content": CALL}


def test_tools_and_open_reasoning_reach_the_template(
    live: Live, scripted: Callable[[str], None]
) -> None:
    body = {"messages": ASK["messages"], "tools": TOOLS}
    tokens = request(live.port, "POST", "/tokenize", body)[2]["tokens"]
    shown = request(live.port, "POST", "/detokenize", {"tokens": tokens})[2]["prompt"]
    assert '"name": "get_weather"' in shown
    scripted("hm</think>hi")
    body = ASK | {"chat_template_kwargs": {"enable_thinking": True}}
    answer = request(live.port, "POST", CHAT, body)[2]["choices"][0]["message"]
    assert answer == {"role": "assistant", "content": "hi", "reasoning_content": "hm"}
