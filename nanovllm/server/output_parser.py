"""A completion's text, as it comes, to what a chat message is made of: content, reasoning, calls.

A pure state machine over pieces of text: fed in any cutting, the deltas joined are the same.
Reasoning stands between <think> and </think> (Qwen3, DeepSeek-R1). Tool calls are JSON objects
between <tool_call> and </tool_call> (Hermes, Qwen), or stand behind [TOOL_CALLS] (Mistral), or the
whole answer is one JSON object (Llama 3.1's model card, "JSON based tool calling") or a list of
calls in Python's syntax (Llama 3.2's, "zero-shot function calling"). Arguments go out while they
are written, once the name is known; those in Python's syntax call by call.
"""

from __future__ import annotations

from typing import Any

from nanovllm.server.python_calls import PythonReader
from nanovllm.server.tool_calls import (
    ARGS_MARK,
    CALLS_MARK,
    Call,
    CallReader,
    MistralReader,
)

Delta = dict[str, Any]

THINK, END_THINK = "<think>", "</think>"
CALL, END_CALL = "<tool_call>", "</tool_call>"


def tool_style(template: str) -> str | None:
    """How models with this chat template write calls: "tagged", "mistral" (a list), "mistral-named"
    (name and arguments), "pythonic", "bare" (one object), or None: not at all."""
    if CALL in template:
        return "tagged"
    if CALLS_MARK in template:
        return "mistral-named" if ARGS_MARK in template else "mistral"
    if "func_name1(" in template:
        return "pythonic"
    return "bare" if '"parameters": dictionary' in template else None


class OutputParser:
    """One completion. tools is a tool style; `num_calls` counts the calls that went out."""

    def __init__(self, *, reasoning: bool, thinks: bool, tools: str | None, one_call: bool) -> None:
        self.num_calls = 0
        self._tools = tools is not None
        self._style = tools
        self._mark = CALLS_MARK if tools and tools.startswith("mistral") else CALL
        self._answer = self._bare if tools in ("bare", "pythonic") else self._content
        self._one_call = one_call
        self._text = ""  # not yet understood
        self._state = self._reason if thinks else self._begin if reasoning else self._answer
        self._trim = thinks or self._tools  # drop white space at the start of what follows
        self._call: Call | None = None
        self._reader: CallReader | None = None

    def push(self, text: str) -> list[Delta]:
        """The deltas that are certain now."""
        self._text += text
        deltas: list[Delta] = []
        while self._state(deltas, False):
            pass
        return _joined(deltas)

    def finish(self) -> list[Delta]:
        """The rest, when no more text comes."""
        deltas: list[Delta] = []
        while self._state(deltas, True):
            pass
        return _joined(deltas)

    # --- states: each takes from _text and says whether the next state should look at once -------

    def _begin(self, deltas: list[Delta], last: bool) -> bool:
        """Is there reasoning at all?"""
        text = self._text.lstrip()
        if text.startswith(THINK):
            self._text = text[len(THINK) :]
            self._trim = True
            self._state = self._reason
            return True
        if THINK.startswith(text) and not last:
            return False
        self._state = self._answer
        return True

    def _reason(self, deltas: list[Delta], last: bool) -> bool:
        found = self._take_until(END_THINK, "reasoning_content", deltas, last)
        if found:
            self._trim = True
            self._state = self._answer
        return found

    def _content(self, deltas: list[Delta], last: bool) -> bool:
        if not self._tools:
            self._emit("content", self._text, deltas)
            self._text = ""
            return False
        found = self._take_until(self._mark, "content", deltas, last)
        if found and self._mark == CALL:
            self._call = Call(self.num_calls)
            self._state = self._in_call
        elif found:
            self._reader = MistralReader()
            self._state = self._in_run
        return found

    def _in_call(self, deltas: list[Delta], last: bool) -> bool:
        assert self._call is not None, "a call was begun"
        body, end, rest = self._text.partition(END_CALL)
        if not end and not last:
            held = _overlap(body, END_CALL)
            deltas += self._visible(self._call.push(body[: len(body) - held]))
            self._text = body[len(body) - held :]
            return False
        deltas += self._visible(self._call.push(body) + self._call.finish())
        if self._call.begun:
            self.num_calls += 1
        else:  # not a call: what was written is content
            self._emit("content", CALL + self._call.text + end, deltas)
        self._text, self._call, self._trim = rest, None, True
        self._state = self._content
        return bool(rest)

    def _bare(self, deltas: list[Delta], last: bool) -> bool:
        """Is the whole answer a call?"""
        text = self._text.lstrip()
        if not text and not last:
            return False
        if self._style == "pythonic" and text.startswith("["):
            self._text = text
            self._reader = PythonReader()
            self._state = self._in_run
        elif self._style == "bare" and text.startswith("{"):
            self._call = Call(self.num_calls)
            self._state = self._in_bare_call
        else:
            self._tools = False
            self._state = self._content
        return True

    def _in_bare_call(self, deltas: list[Delta], last: bool) -> bool:
        assert self._call is not None, "a call was begun"
        deltas += self._visible(self._call.push(self._text))
        self._text = ""
        if last:
            deltas += self._visible(self._call.finish())
            if self._call.begun:
                self.num_calls += 1
            else:  # some other object: what was written is content
                self._emit("content", self._call.text, deltas)
            self._tools = False
            self._state = self._content
        return False

    def _in_run(self, deltas: list[Delta], last: bool) -> bool:
        """Several calls in a row, which no mark ends."""
        assert self._reader is not None, "a run was begun"
        deltas += self._visible(self._reader.push(self._text))
        self._text = ""
        if last or self._reader.ended:
            calls, rest = self._reader.finish()
            deltas += self._visible(calls)
            self.num_calls = self._reader.num_calls
            self._emit("content", rest, deltas)
            self._tools, self._state = False, self._content
        return False

    # --- helpers --------------------------------------------------------------------------------

    def _take_until(self, mark: str, name: str, deltas: list[Delta], last: bool) -> bool:
        """Emits what stands before the mark; keeps what may belong to it, and white space."""
        before, found, rest = self._text.partition(mark)
        if found:
            self._emit(name, before.rstrip(), deltas)
            self._text = rest
            return True
        if last:
            self._emit(name, before.rstrip() if self._trims_end(name) else before, deltas)
            self._text = ""
            return False
        sure = before[: len(before) - _overlap(before, mark)].rstrip()
        self._emit(name, sure, deltas)
        self._text = before[len(sure) :] if not self._trim else before[len(sure) :].lstrip()
        return False

    def _trims_end(self, name: str) -> bool:
        return name == "reasoning_content" or self.num_calls > 0

    def _emit(self, name: str, text: str, deltas: list[Delta]) -> None:
        if self._trim:
            text = text.lstrip()
        if text:
            self._trim = False
            deltas.append({name: text})

    def _visible(self, calls: list[Delta]) -> list[Delta]:
        shown = (call for call in calls if not (self._one_call and call["index"]))
        return [{"tool_calls": [call]} for call in shown]


def _overlap(text: str, mark: str) -> int:
    """The length of the longest end of text that mark starts with."""
    for size in range(min(len(mark) - 1, len(text)), 0, -1):
        if mark.startswith(text[-size:]):
            return size
    return 0


def _joined(deltas: list[Delta]) -> list[Delta]:
    """Neighbours of the same text field become one."""
    joined: list[Delta] = []
    for delta in deltas:
        ((name, value),) = delta.items()
        if joined and name in joined[-1] and isinstance(value, str):
            joined[-1] = {name: joined[-1][name] + value}
        else:
            joined.append(delta)
    return joined


def whole_message(parser: OutputParser, text: str) -> tuple[dict[str, Any], int]:
    """(the assistant message that the complete text makes, how many tool calls it has)."""
    message: dict[str, Any] = {"role": "assistant", "content": None}
    calls: dict[int, dict[str, Any]] = {}
    for delta in parser.push(text) + parser.finish():
        for name in ("content", "reasoning_content"):
            if name in delta:
                message[name] = (message.get(name) or "") + delta[name]
        for call in delta.get("tool_calls", ()):
            if call["index"] not in calls:
                calls[call["index"]] = {name: call[name] for name in ("id", "type", "function")}
            else:
                calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    if calls:
        message["tool_calls"] = list(calls.values())
    elif message["content"] is None:
        message["content"] = ""
    return message, len(calls)
