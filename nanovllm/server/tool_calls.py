"""Tool calls while they are written: text in, deltas of calls out.

JSON objects {"name": ..., "arguments" or "parameters": {...}}, alone (Hermes, Qwen, Llama 3) or in
a list behind [TOOL_CALLS], and name[ARGS]{...} behind the same mark (Mistral's newer tokenizers).
Pure state machines: however the text is cut, the deltas joined are the same. Whatever is no call
is given back as text.
"""

from __future__ import annotations

import json
import re
import secrets
from typing import Any, Protocol

Delta = dict[str, Any]

CALLS_MARK, ARGS_MARK, ID_MARK = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
_STRING = r'"(?:[^"\\]|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})*"'
_HEAD = re.compile(
    rf'\s*\{{\s*"name"\s*:\s*({_STRING})\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{{)'
)
NAME = r"[\w.\-]+"  # of a function, where it stands without quotes
_NAMED_HEAD = re.compile(rf"\s*({NAME})(?:\[CALL_ID\][\w\-]*)?\[ARGS\]\s*(?=\{{)")


class CallReader(Protocol):
    """Reads a run of calls.

    num_calls counts those whose head went out; ended says that what follows is no call.
    """

    @property
    def num_calls(self) -> int: ...

    @property
    def ended(self) -> bool: ...

    def push(self, text: str) -> list[Delta]:
        """The deltas of calls that are certain now."""

    def finish(self) -> tuple[list[Delta], str]:
        """The rest, and the text from the first thing on that was no call."""


class Balance:
    """Finds the end of a bracketed value. quotes are the characters that delimit its strings."""

    def __init__(self, quotes: str = '"') -> None:
        self.closed = False
        self.depth = 0
        self._quotes = quotes
        self._quote = ""
        self._escaped = False

    def take(self, text: str, start: int = 0) -> int:
        """The index behind what belongs to the value in text[start:]."""
        at = start
        while at < len(text) and not self.closed:
            self.step(text[at])
            at += 1
        return at

    def step(self, char: str) -> None:
        """Takes one character more."""
        if self._escaped:
            self._escaped = False
        elif self._quote:
            self._escaped = char == "\\"
            if char == self._quote:
                self._quote = ""
        elif char in self._quotes:
            self._quote = char
        elif char in "{[(":
            self.depth += 1
        elif char in "}])":
            self.depth -= 1
            self.closed = self.depth <= 0


class Call:
    """One JSON call."""

    def __init__(self, index: int) -> None:
        self.begun = False  # its head went out
        self.text = ""
        self._index = index
        self._arguments = Balance()

    def push(self, text: str) -> list[Delta]:
        self.text += text
        if self.begun:
            return self._more(text)
        head = _HEAD.match(self.text)
        if head is None:
            return []
        self.begun = True
        name = json.loads(head[1], strict=False)
        return [call_head(self._index, name), *self._more(self.text[head.end() :])]

    def _more(self, text: str) -> list[Delta]:
        """What is new of the arguments' value; nothing from behind its closing brace."""
        new = text[: self._arguments.take(text)]
        return [call_arguments(self._index, new)] if new else []

    def finish(self) -> list[Delta]:
        """For calls in another order of fields, or with arguments that are no object."""
        if self.begun:
            return []
        try:
            call = json.loads(self.text)
            name, arguments = call["name"], call.get("arguments", call.get("parameters", {}))
            if not isinstance(arguments, str):
                arguments = json_text(arguments)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return []
        if not isinstance(name, str):
            return []
        self.begun = True
        return [call_head(self._index, name), call_arguments(self._index, sound(arguments))]


class ListReader:
    """A JSON list of calls, or one call without the list."""

    def __init__(self) -> None:
        self.num_calls = 0
        self._rest = ""  # from the first thing on that is no call
        self._held = ""  # of the list, between calls
        self._call: Call | None = None
        self._object = Balance()
        self.ended = False

    def push(self, text: str) -> list[Delta]:
        deltas: list[Delta] = []
        at = 0
        while at < len(text) and not self.ended:
            at = self._between(text, at) if self._call is None else self._inside(text, at, deltas)
        self._rest += text[at:]
        return deltas

    def _between(self, text: str, at: int) -> int:
        char = text[at]
        if char == "{":
            self._call, self._object = Call(self.num_calls), Balance()
            return at
        if char not in "[,]" and not char.isspace():
            self.ended = True
            self._rest = "" if self.num_calls else self._held
            return at
        self._held += char
        return at + 1

    def _inside(self, text: str, at: int, deltas: list[Delta]) -> int:
        assert self._call is not None, "a call was begun"
        end = self._object.take(text, at)
        deltas += self._call.push(text[at:end])
        if self._object.closed:
            self._close(deltas)
        return end

    def _close(self, deltas: list[Delta]) -> None:
        assert self._call is not None, "a call was begun"
        deltas += self._call.finish()
        if self._call.begun:
            self.num_calls += 1
        else:
            self.ended = True
            self._rest = (self._held if not self.num_calls else "") + self._call.text
        self._call = None

    def finish(self) -> tuple[list[Delta], str]:
        deltas: list[Delta] = []
        if self._call is not None:
            self._close(deltas)
        elif not self.ended and not self.num_calls:
            self._rest = self._held
        return deltas, self._rest


class NamedReader:
    """Calls as name[ARGS]{...}, each behind a mark; the first mark was read already."""

    def __init__(self) -> None:
        self.num_calls = 0
        self.ended = False
        self._text = ""  # not yet understood
        self._arguments: Balance | None = None

    def push(self, text: str) -> list[Delta]:
        self._text += text
        deltas: list[Delta] = []
        while self._text and self._advance(deltas):
            pass
        return deltas

    def _advance(self, deltas: list[Delta]) -> bool:
        if self._arguments is None:
            text = self._text
            if self.num_calls:
                text = text.lstrip()
                if not text.startswith(CALLS_MARK):
                    return False
                text = text[len(CALLS_MARK) :]
            head = _NAMED_HEAD.match(text)
            if head is None:
                return False
            deltas.append(call_head(self.num_calls, head[1]))
            self.num_calls += 1
            self._text, self._arguments = text[head.end() :], Balance()
        end = self._arguments.take(self._text)
        deltas.append(call_arguments(self.num_calls - 1, self._text[:end]))
        self._text = self._text[end:]
        if self._arguments.closed:
            self._arguments = None
        return bool(self._text)

    def finish(self) -> tuple[list[Delta], str]:
        return [], self._text


class MistralReader:
    """What stands behind [TOOL_CALLS], in either form."""

    def __init__(self) -> None:
        self._text = ""
        self._reader: ListReader | NamedReader | None = None

    @property
    def num_calls(self) -> int:
        return 0 if self._reader is None else self._reader.num_calls

    @property
    def ended(self) -> bool:
        return self._reader is not None and self._reader.ended

    def push(self, text: str) -> list[Delta]:
        if self._reader is None:
            self._text += text
            text = self._text
            if not text.strip():
                return []
            self._reader = ListReader() if text.lstrip()[0] in "[{" else NamedReader()
        return self._reader.push(text)

    def finish(self) -> tuple[list[Delta], str]:
        deltas, rest = ([], self._text) if self._reader is None else self._reader.finish()
        return deltas, rest if self.num_calls else CALLS_MARK + rest


def call_head(index: int, name: str) -> Delta:
    return {
        "index": index,
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": sound(name), "arguments": ""},
    }


def call_arguments(index: int, text: str) -> Delta:
    return {"index": index, "function": {"arguments": text}}


def json_text(value: Any) -> str:
    """JSON that can be written as UTF-8. Raises ValueError for numbers that JSON has not."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return text if sound(text) == text else json.dumps(value, allow_nan=False)


def sound(text: str) -> str:
    """Without halves of characters, which escapes may leave."""
    return text.encode(errors="replace").decode()
