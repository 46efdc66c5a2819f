"""Tool calls in Python's syntax, [f(a=1), g(b=["x"])], as Llama 3.2 and 4 write them.

They are read as data: parsed, and never evaluated.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from typing import Any

from nanovllm.server.tool_calls import Balance, Delta, call_arguments, call_head, json_text

MAX_CHARACTERS = 100_000
_FIRST_CALL = re.compile(r"\[\s*(?:[^\W\d][\w.]*\s*(?:\(|$)|$)")
_JSON_NAMES = {"true": True, "false": False, "null": None}


class PythonReader:
    """A list of calls in Python's syntax; each goes out when it is complete."""

    def __init__(self) -> None:
        self.num_calls = 0
        self._text = ""
        self._scanned = 0
        self._begin = 1  # of the call that is being read, behind the bracket or a comma
        self._list = Balance("\"'")
        self.ended = False

    def push(self, text: str) -> list[Delta]:
        self._text += text
        deltas: list[Delta] = []
        if not self.num_calls and not _FIRST_CALL.match(self._text):
            self.ended = True
        while not self.ended and self._scanned < len(self._text):
            char = self._text[self._scanned]
            self._list.step(char)
            self._scanned += 1
            if self._list.depth == 1 and char == ")":
                self._read(deltas)
            self.ended = self.ended or self._list.closed
        return deltas

    def _read(self, deltas: list[Delta]) -> None:
        begin = self._begin
        while self._text[begin] in ", \t\r\n":
            begin += 1
        found = read_call(self._text[begin : self._scanned])
        if found is None:
            self.ended = True
            return
        name, arguments = found
        deltas += [
            call_head(self.num_calls, name),
            call_arguments(self.num_calls, json_text(arguments)),
        ]
        self.num_calls += 1
        self._begin = self._scanned

    def finish(self) -> tuple[list[Delta], str]:
        if not self.num_calls:
            return [], self._text
        rest = self._text[self._begin :]
        return [], rest.lstrip()[1:] if rest.lstrip().startswith("]") else rest


def read_call(text: str) -> tuple[str, dict[str, Any]] | None:
    """(name, arguments by name), or None if text is anything but a call with literal arguments."""
    if len(text) > MAX_CHARACTERS:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unknown escapes
            tree = ast.parse(text, mode="eval").body
        if not isinstance(tree, ast.Call) or tree.args:
            return None
        arguments = {}
        for keyword in tree.keywords:
            if keyword.arg is None:
                return None
            arguments[keyword.arg] = _value(keyword.value)
        json.dumps(arguments, allow_nan=False)
        return _name(tree.func), arguments
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}"
    raise ValueError("not a name")


def _value(node: ast.expr) -> Any:
    """Raises ValueError for what is no literal that JSON knows."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str | int | float | None):
        return node.value
    if isinstance(node, ast.Name) and node.id in _JSON_NAMES:
        return _JSON_NAMES[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        number = _value(node.operand)
        if isinstance(number, int | float) and not isinstance(number, bool):
            return -number if isinstance(node.op, ast.USub) else number
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        keys = [None if key is None else _value(key) for key in node.keys]
        if all(isinstance(key, str) for key in keys):
            return dict(zip(keys, map(_value, node.values), strict=True))
    raise ValueError("not a literal")
