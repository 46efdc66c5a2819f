"""Structured output over HTTP: response_format, vLLM's fields, forced tool calls, refusals."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jsonschema
import openai
import pytest
from pydantic import BaseModel

from .live_server import Gate, Live, assert_error, request

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
ASK: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "Who is Ann?"}],
    "temperature": 1,
    "max_tokens": 200,
    "chat_template_kwargs": {"enable_thinking": False},
}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "mood": {"enum": ["good", "bad"]},
    },
    "required": ["name", "age", "mood"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}


@pytest.fixture(scope="module")
def live(model_dir: Path) -> Iterator[Live]:
    """Of its own: the tools of these tests fill the usual context."""
    server = Live(model_dir, max_model_len=512)
    yield server
    server.close()


def ask(live: Live, path: str = CHAT, **fields: Any) -> Any:
    status, _, answer = request(live.port, "POST", path, fields)
    assert status == 200, answer
    return answer


def no_reasoning(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """The random model would think for ever: here its answers come at once."""
    monkeypatch.setattr(live.service, "reasons", False)


@pytest.fixture
def direct(live: Live, monkeypatch: pytest.MonkeyPatch) -> Live:
    no_reasoning(live, monkeypatch)
    return live


def test_json_schema(direct: Live) -> None:
    answer = ask(direct, **ASK, response_format=FORMAT, n=4, seed=3)
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    for choice, text in zip(answer["choices"], texts, strict=True):
        assert choice["finish_reason"] == "stop"
        jsonschema.validate(json.loads(text), PERSON)
    assert len(set(texts)) > 1


def test_a_stream_joins_to_the_same(direct: Live) -> None:
    fields = ASK | {"response_format": FORMAT, "seed": 3}
    whole = ask(direct, **fields)["choices"][0]["message"]["content"]
    client = direct.client()
    pieces = client.chat.completions.create(
        **{k: v for k, v in fields.items() if k != "chat_template_kwargs"},
        extra_body={"chat_template_kwargs": ASK["chat_template_kwargs"]},
        stream=True,
    )
    texts = [chunk.choices[0].delta.content or "" for chunk in pieces if chunk.choices]
    assert "".join(texts) == whole
    assert len(texts) > 3


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_other_forms(direct: Live, path: str) -> None:
    def text(**fields: Any) -> str:
        body = ASK if path == CHAT else {"prompt": "Who?", "max_tokens": 200, "temperature": 1}
        choice = ask(direct, path, **body, **fields)["choices"][0]
        assert choice["finish_reason"] == "stop"
        return choice["text"] if path == COMPLETIONS else choice["message"]["content"]

    assert text(guided_choice=["yes", "no"]) in ("yes", "no")
    assert text(structured_outputs={"choice": ["yes", "no"]}) in ("yes", "no")
    assert text(guided_regex="[ab]{3}c").endswith("c")
    assert text(structured_outputs={"regex": r"\d{4}"}).isdigit()
    assert text(guided_grammar='start: "x" /[0-9]{2}/ "y"?')[0] == "x"
    assert text(structured_outputs={"grammar": 'root ::= "a" [0-9] "b"'})[::2] == "ab"
    jsonschema.validate(json.loads(text(guided_json=PERSON)), PERSON)
    jsonschema.validate(json.loads(text(guided_json=json.dumps(PERSON))), PERSON)
    jsonschema.validate(json.loads(text(structured_outputs={"json": PERSON})), PERSON)
    assert text(response_format={"type": "text"}, guided_choice=["a"]) == "a"


def test_json_object(direct: Live) -> None:
    answer = ask(
        direct, **(ASK | {"max_tokens": 200, "n": 8}), response_format={"type": "json_object"}
    )
    for choice in answer["choices"]:
        text = choice["message"]["content"]
        assert text.startswith("{")
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(text), dict)


class Event(BaseModel):
    kind: Literal["party", "talk"]
    guests: int
    online: bool
    notes: list[Literal["a", "b"]] | None


def test_pydantic_models_with_the_public_client(direct: Live) -> None:
    answer = direct.client().chat.completions.parse(
        model="tiny",
        messages=[{"role": "user", "content": "What happens?"}],
        response_format=Event,
        max_tokens=400,
        seed=5,
        logit_bias={},
    )
    assert isinstance(answer.choices[0].message.parsed, Event)


def test_reasoning_comes_first_and_the_answer_has_the_form(live: Live) -> None:
    """The prompt opens a <think> block; the form holds behind its end."""
    end = live.service.tokenizer.token_id("</think>")
    assert end is not None
    fields = ASK | {"chat_template_kwargs": {"enable_thinking": True}, "logit_bias": {end: 20}}
    answer = ask(live, **fields, response_format=FORMAT)["choices"][0]
    jsonschema.validate(json.loads(answer["message"]["content"]), PERSON)
    begin = live.service.tokenizer.token_id("<think>")
    fields = ASK | {"logit_bias": {begin: 100, end: 20}, "chat_template_kwargs": {}}
    answer = ask(live, **fields, response_format=FORMAT)["choices"][0]
    jsonschema.validate(json.loads(answer["message"]["content"]), PERSON)


# --- tools ----------------------------------------------------------------------------------------

WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "maximum": 9}},
    "required": ["city"],
    "additionalProperties": False,
}
TIME = {"type": "object", "properties": {"utc": {"type": "boolean"}}, "required": ["utc"]}
TIME["additionalProperties"] = False
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "get_weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "get_time", "parameters": TIME}},
    {"type": "function", "function": {"name": "ping"}},
]
SCHEMAS = {"get_weather": WEATHER, "get_time": TIME, "ping": {"maxProperties": 0}}
STYLES = ["tagged", "bare", "mistral", "mistral-named", "pythonic"]


def check_calls(choice: Any) -> list[str]:
    calls = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    for call in calls:
        function = call["function"]
        jsonschema.validate(json.loads(function["arguments"]), SCHEMAS[function["name"]])
    return [call["function"]["name"] for call in calls]


@pytest.mark.parametrize("style", STYLES)
def test_forced_calls(direct: Live, monkeypatch: pytest.MonkeyPatch, style: str) -> None:
    monkeypatch.setattr(direct.service, "tool_style", style)
    fields = ASK | {"tools": TOOLS}
    named = {"type": "function", "function": {"name": "get_weather"}}
    for seed in range(3):
        (choice,) = ask(direct, **fields, tool_choice=named, seed=seed)["choices"]
        assert check_calls(choice) == ["get_weather"]
    one = ask(direct, **fields, tool_choice="required", parallel_tool_calls=False, n=8, seed=1)
    names = [check_calls(choice) for choice in one["choices"]]
    assert all(len(found) == 1 for found in names)
    assert len({found[0] for found in names}) > 1
    many = ask(direct, **(fields | {"max_tokens": 300}), tool_choice="required", n=8, seed=2)
    done = [choice for choice in many["choices"] if choice["finish_reason"] == "tool_calls"]
    assert done
    assert all(check_calls(choice) for choice in done)


def test_forced_calls_as_a_stream(direct: Live) -> None:
    with direct.client().chat.completions.stream(
        model="tiny",
        messages=ASK["messages"],
        tools=TOOLS,
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        max_tokens=200,
        seed=4,
    ) as stream:
        final = stream.get_final_completion().choices[0]
    (call,) = final.message.tool_calls or ()
    jsonschema.validate(json.loads(call.function.arguments), WEATHER)
    assert final.finish_reason == "tool_calls"


@pytest.mark.parametrize("style", STYLES)
def test_an_answer_in_json_or_a_call(
    direct: Live, monkeypatch: pytest.MonkeyPatch, style: str
) -> None:
    """With both tools and a response_format the model may call or answer."""
    monkeypatch.setattr(direct.service, "tool_style", style)
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    schema["additionalProperties"] = False
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    fields = ASK | {"tools": TOOLS[2:], "response_format": form, "n": 16}
    kinds = set()
    for choice in ask(direct, **fields, seed=1)["choices"]:
        if choice["finish_reason"] == "tool_calls":
            kinds.add(check_calls(choice)[0])
        elif choice["finish_reason"] == "stop":
            jsonschema.validate(json.loads(choice["message"]["content"]), schema)
            kinds.add("answer")
    assert kinds
    if style != "tagged":
        assert "ping" in kinds


# --- what is refused ------------------------------------------------------------------------------


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


BAD: list[tuple[dict[str, Any], str]] = [
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        "response_format.json_schema.schema",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}},
        "response_format.json_schema.schema",
    ),
    ({"response_format": "json_object"}, "response_format"),
    ({"response_format": {}}, "response_format.type"),
    ({"response_format": FORMAT, "guided_regex": "a"}, "guided_regex"),
    ({"guided_json": "{"}, "guided_json"),
    ({"guided_json": "[1]"}, "guided_json"),
    ({"guided_json": 5}, "guided_json"),
    ({"guided_json": {"type": 7}}, "guided_json"),
    ({"guided_json": nested(300)}, "guided_json"),
    ({"guided_json": {"$ref": "http://127.0.0.1:1/x"}}, "guided_json"),
    ({"guided_regex": "(a"}, "guided_regex"),
    ({"guided_regex": r"((a{1000}){1000}){1000}"}, "guided_regex"),
    ({"guided_regex": "a" * 200_000}, "guided_regex"),
    ({"guided_choice": []}, "guided_choice"),
    ({"guided_choice": ["a", ""]}, "guided_choice"),
    ({"guided_choice": [1]}, "guided_choice[0]"),
    ({"guided_grammar": "start: x"}, "guided_grammar"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs"),
    ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs"),
    ({"response_format": FORMAT, "ignore_eos": True}, "ignore_eos"),
    ({"response_format": FORMAT, "allowed_token_ids": [5]}, "allowed_token_ids"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": named("ping")}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": "always"}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": named("pong")}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice.function"),
    ({"tools": TOOLS, "tool_choice": {"type": "x", "function": {"name": "ping"}}},
     "tool_choice.type"),
    ({"tools": TOOLS, "tool_choice": 5}, "tool_choice"),
    ({"tools": TOOLS, "guided_regex": "a"}, "guided_regex"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param"), BAD)
def test_refusals(live: Live, fields: dict[str, Any], param: str) -> None:
    status, _, answer = request(live.port, "POST", CHAT, ASK | fields)
    assert status == 400, answer
    assert assert_error(answer)["param"] == param


def test_refused_parameters_of_tools(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    for parameters in ({"type": "string"}, {"properties": [1]}, {"properties": {"a": {"type": 1}}}):
        for style in STYLES:
            monkeypatch.setattr(live.service, "tool_style", style)
            tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
            body = ASK | {"tools": tools, "tool_choice": "required"}
            status, _, answer = request(live.port, "POST", CHAT, body)
            assert status == 400, answer
            assert assert_error(answer)["param"] in ("tools", "tool_choice")


@pytest.mark.parametrize(
    ("style", "name", "parameters"),
    [
        ("mistral-named", "two words", {}),
        ("mistral-named", "", {}),
        ("pythonic", "a..b", {}),
        ("pythonic", "import", {}),
        ("pythonic", "send", {"properties": {"from": {"type": "string"}}}),
        ("pythonic", "send", {"properties": {"a": {}}, "required": True}),
        ("pythonic", "send", {"properties": {"a": {}}, "required": None}),
    ],
)
def test_calls_that_could_not_be_read_back_are_not_forced(
    live: Live, monkeypatch: pytest.MonkeyPatch, style: str, name: str, parameters: Any
) -> None:
    monkeypatch.setattr(live.service, "tool_style", style)
    tools = [{"type": "function", "function": {"name": name, "parameters": parameters}}]
    body = ASK | {"tools": tools, "tool_choice": "required", "max_tokens": 3}
    status, _, answer = request(live.port, "POST", CHAT, body)
    assert status == 400, answer
    assert assert_error(answer)["param"] == "tools"


def test_health_while_hostile_structures_are_compiled(live: Live) -> None:
    """Compiling is away from the event loop and from the engine."""
    done = threading.Event()

    def attack(number: int) -> None:
        for i in range(3):
            pattern = r"((a{1000}){1000}){" + str(900 + 10 * number + i) + "}"
            assert request(live.port, "POST", CHAT, ASK | {"guided_regex": pattern})[0] == 400

    threads = [threading.Thread(target=attack, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    answers = 0
    while any(thread.is_alive() for thread in threads):
        assert request(live.port, "GET", "/health")[0] == 200
        answers += 1
        done.wait(0.02)
    assert answers > 3
    assert ask(live, **(ASK | {"max_tokens": 3}))["choices"]
    live.wait_until_idle()


def test_clients_that_leave_free_their_blocks(direct: Live, gate: Gate) -> None:
    with direct.client() as client:
        for _ in range(4):
            gate.close_after(6)
            stream = client.chat.completions.create(
                model="tiny", messages=ASK["messages"], stream=True, max_tokens=200,
                response_format={"type": "json_object"},
            )  # fmt: skip
            next(iter(stream))
            stream.close()
            direct.wait_until(lambda: direct.service.client.num_sequences == 0)
            gate.open()
    direct.wait_until_idle()


def test_the_command_serves_structures(tmp_path: Path) -> None:
    """The engine in its own process: the form crosses the socket."""
    from .live_server import command

    with command("--model", "demo", "--max-model-len", "512") as server:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none")
        answer = client.chat.completions.parse(
            model="demo", messages=ASK["messages"], response_format=Event, max_tokens=300
        )
        assert answer.choices[0].message.parsed
        status, _, refusal = request(server.port, "POST", CHAT, {
            "messages": ASK["messages"], "guided_regex": "(a",
        })  # fmt: skip
        assert status == 400
        assert_error(refusal)
