"""Mistral's marks are special tokens: calls are found all the same, read and forced."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanovllm.server.tool_calls import ARGS_MARK, CALLS_MARK

from .live_server import ADDED, Live, request

TEMPLATE = (
    "{%- for message in messages %}[INST]{{ message.content }}[/INST]{% endfor %}"
    "{%- if false %}[TOOL_CALLS]name[ARGS]{}{% endif %}"
)
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "roll",
            "parameters": {
                "type": "object",
                "properties": {"sides": {"enum": [6, 20]}},
                "required": ["sides"],
                "additionalProperties": False,
            },
        },
    }
]
ASK = {"messages": [{"role": "user", "content": "roll"}], "tools": TOOLS, "temperature": 1}


@pytest.fixture(scope="module")
def mistral(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """The tiny model, its last added tokens renamed to Mistral's special ones."""
    directory = tmp_path_factory.mktemp("mistral") / "tiny"
    shutil.copytree(model_dir, directory)
    path = directory / "tokenizer.json"
    state = json.loads(path.read_text())
    names = dict(zip(ADDED[2:], (CALLS_MARK, ARGS_MARK), strict=True))
    for token in state["added_tokens"]:
        if token["content"] in names:
            token |= {"content": names[token["content"]], "special": True}
    for old, new in names.items():
        if old in state["model"]["vocab"]:
            state["model"]["vocab"][new] = state["model"]["vocab"].pop(old)
    path.write_text(json.dumps(state))
    config = {"eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    server = Live(directory)
    yield server
    server.close()


def test_the_marks_are_special_and_shown(mistral: Live) -> None:
    tokenizer = mistral.service.tokenizer
    mark = tokenizer.token_id(CALLS_MARK)
    assert mark in tokenizer.special_ids
    assert tokenizer.decode([mark]) == ""
    shown = tokenizer.showing([CALLS_MARK])
    assert shown.decode([mark]) == CALLS_MARK
    assert tokenizer.showing(["none"]) is tokenizer
    assert shown.special_ids == tokenizer.special_ids - {mark}
    assert mistral.service.tool_style == "mistral-named"


@pytest.mark.parametrize("style", ["mistral", "mistral-named"])
@pytest.mark.parametrize("stream", [False, True])
def test_forced_calls_begin_with_the_special_token(
    mistral: Live, monkeypatch: pytest.MonkeyPatch, style: str, stream: bool
) -> None:
    monkeypatch.setattr(mistral.service, "tool_style", style)
    monkeypatch.setattr(mistral.service, "reasons", False)
    fields: dict[str, Any] = ASK | {
        "tool_choice": {"type": "function", "function": {"name": "roll"}},
        "max_tokens": 100,
    }
    with mistral.client() as client:
        if stream:
            with client.chat.completions.stream(model="tiny", **fields) as events:
                choice: Any = events.get_final_completion().choices[0]
        else:
            choice = client.chat.completions.create(model="tiny", **fields).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert not choice.message.content
    (call,) = choice.message.tool_calls
    assert call.function.name == "roll"
    assert json.loads(call.function.arguments)["sides"] in (6, 20)


def test_free_calls_are_found(mistral: Live) -> None:
    """Pushed towards the mark, the model writes it, and what follows is no call but text."""
    mark = mistral.service.tokenizer.token_id(CALLS_MARK)
    fields = ASK | {"logit_bias": {str(mark): 100}, "max_tokens": 3}
    status, _, answer = request(mistral.port, "POST", "/v1/chat/completions", fields)
    assert status == 200, answer
    assert CALLS_MARK in answer["choices"][0]["message"]["content"]
    body = {"messages": [{"role": "user", "content": f"{CALLS_MARK} x"}]}
    tokens = request(mistral.port, "POST", "/tokenize", body)[2]["tokens"]
    assert mark not in tokens, "what users write is text"
