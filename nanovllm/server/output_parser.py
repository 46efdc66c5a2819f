"""A completion's text, as it comes, to what a chat message is made of: content, reasoning, calls.

A pure state machine over pieces of text: fed in any cutting, the deltas joined are the same.
Reasoning stands between <think> and </think> (Qwen3, DeepSeek-R1). Tool calls are JSON objects
between <tool_call> and </tool_call> (Hermes, Qwen): {"name": ..., "arguments": {...}}, or the whole
answer is one such object, its arguments named "parameters" (Llama 3.1's model card, "JSON based
tool calling"). Arguments go out while they are written, once the name is known.
"""

from __future__ import annotations

import json
import re
import secrets
from typing import Any

Delta = dict[str, Any]

THINK, END_THINK = "<think>", "</think>"
CALL, END_CALL = "<tool_call>", "</tool_call>"
_HEAD = re.compile(
    r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)


def tool_style(template: str) -> str | None:
    """How models with this chat template write calls: "tagged", "bare", or None: not at all."""
    if CALL in template:
        return "tagged"
    return "bare" if '"parameters": dictionary' in template else None


class OutputParser:
    """One completion. tools is a tool style; `num_calls` counts the calls that went out."""

    def __init__(self, *, reasoning: bool, thinks: bool, tools: str | None, one_call: bool) -> None:
        self.num_calls = 0
        self._tools = tools is not None
        self._answer = self._bare if tools == "bare" else self._content
        self._one_call = one_call
        self._text = ""  # not yet understood
        self._state = self._reason if thinks else self._begin if reasoning else self._answer
        self._trim = thinks or self._tools  # drop white space at the start of what follows
        self._call: _Call | None = None

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
        found = self._take_until(CALL, "content", deltas, last)
        if found:
            self._call = _Call(self.num_calls)
            self._state = self._in_call
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
        if text.startswith("{"):
            self._call = _Call(self.num_calls)
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
        if self._one_call and self.num_calls:
            return []
        return [{"tool_calls": [call]} for call in calls]


class _Call:
    """One tool call while it is written."""

    def __init__(self, index: int) -> None:
        self.begun = False  # its head went out
        self.text = ""
        self._index = index
        self._open = False  # inside of the arguments' value
        self._scanned = 0
        self._depth = 0
        self._in_string = False

    def push(self, text: str) -> list[Delta]:
        self.text += text
        deltas: list[Delta] = []
        if not self.begun:
            head = _HEAD.match(self.text)
            if head is None:
                return deltas
            deltas.append(self._head(json.loads(head[1])))
            self._open, self._scanned = True, head.end()
        arguments = self._scan()
        if arguments:
            deltas.append(self._arguments(arguments))
        return deltas

    def finish(self) -> list[Delta]:
        """For calls in another order of fields, or with arguments that are no object."""
        if self.begun:
            return []
        try:
            call = json.loads(self.text)
            name, arguments = call["name"], call.get("arguments", call.get("parameters", {}))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return []
        if not isinstance(name, str):
            return []
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        return [self._head(name), self._arguments(arguments)]

    def _head(self, name: str) -> Delta:
        self.begun = True
        return {
            "index": self._index,
            "id": f"call_{secrets.token_hex(12)}",
            "type": "function",
            "function": {"name": name, "arguments": ""},
        }

    def _arguments(self, text: str) -> Delta:
        return {"index": self._index, "function": {"arguments": text}}

    def _scan(self) -> str:
        """What is new of the arguments' value; stops behind its closing brace."""
        start = at = self._scanned
        text = self.text
        while self._open and at < len(text):
            char = text[at]
            if self._in_string and char == "\\":
                if at + 1 == len(text):
                    break  # the escaped character is still to come
                at += 1
            elif char == '"':
                self._in_string = not self._in_string
            elif not self._in_string and char in "{[":
                self._depth += 1
            elif not self._in_string and char in "}]":
                self._depth -= 1
                self._open = self._depth > 0
            at += 1
        self._scanned = at
        return text[start:at]


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
