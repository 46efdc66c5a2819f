"""The grammar of tool calls that a request forces, in the format that the model writes by itself.

Arguments satisfy the tool's JSON schema. Lark's syntax with llguidance's `%json`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from keyword import iskeyword
from typing import Any

from nanovllm.errors import InvalidRequestError
from nanovllm.grammar.sources import json_schema, lark_string, mark
from nanovllm.server.output_parser import CALL, END_CALL
from nanovllm.server.schemas import FunctionSpec
from nanovllm.server.tool_calls import ARGS_MARK, CALLS_MARK, NAME

TokenId = Callable[[str], int | None]
NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


def calls_grammar(
    style: str,
    functions: Sequence[FunctionSpec],
    token_id: TokenId,
    *,
    many: bool,
    answer: dict[str, Any] | None = None,
) -> str:
    """A grammar of one call, or with `many` one or several, of any of the functions.

    JSON that satisfies the schema `answer`, if there is one, may come instead. style is one of
    output_parser.tool_style. Raises InvalidRequestError for functions whose parameters cannot be
    written in this style.
    """
    rules = [_RULES[style](token_id, many)]
    rules.append("start: calls" if answer is None else "start: calls | answer")
    if answer is not None:
        rules.append(f"answer: %json {_dumped(answer)}")
    rules.append("call: " + " | ".join(f"f{i}" for i in range(len(functions))))
    for i, function in enumerate(functions):
        rules += _FUNCTIONS.get(style, _json_call)(i, function, style, token_id)
    return "\n".join(rules)


def _tagged(token_id: TokenId, many: bool) -> str:
    begin, end = mark(CALL, token_id(CALL)), mark(END_CALL, token_id(END_CALL))
    rest = ' ("\\n"? tagged)*' if many else ""
    return f'calls: tagged{rest}\ntagged: {begin} "\\n"? call "\\n"? {end}'


def _bare(token_id: TokenId, many: bool) -> str:
    return "calls: call"


def _mistral(token_id: TokenId, many: bool) -> str:
    rest = ' (", " call)*' if many else ""
    return f'calls: {mark(CALLS_MARK, token_id(CALLS_MARK))} " "? "[" call{rest} "]"'


def _mistral_named(token_id: TokenId, many: bool) -> str:
    rest = " one*" if many else ""
    return f"calls: one{rest}\none: {mark(CALLS_MARK, token_id(CALLS_MARK))} call"


def _pythonic(token_id: TokenId, many: bool) -> str:
    rest = ' (", " call)*' if many else ""
    return f'calls: "[" call{rest} "]"'


_RULES: dict[str, Callable[[TokenId, bool], str]] = {
    "tagged": _tagged,
    "bare": _bare,
    "mistral": _mistral,
    "mistral-named": _mistral_named,
    "pythonic": _pythonic,
}


def _json_call(i: int, function: FunctionSpec, style: str, token_id: TokenId) -> list[str]:
    """{"name": "f", "arguments": {...}}"""
    key = "parameters" if style == "bare" else "arguments"
    head = lark_string(f'{{"name": {json.dumps(function.name)}, "{key}": ')
    return [f'f{i}: {head} a{i} "}}"', f"a{i}: %json {_dumped(_parameters(function))}"]


def _named_call(i: int, function: FunctionSpec, style: str, token_id: TokenId) -> list[str]:
    """f[ARGS]{...}"""
    if not re.fullmatch(NAME, function.name):
        raise InvalidRequestError(
            f"the name {function.name[:50]!r} of a function cannot be written in this model's "
            "calls: letters, digits, _, - and . can"
        )
    head = f"{lark_string(function.name)} {mark(ARGS_MARK, token_id(ARGS_MARK))}"
    return [f"f{i}: {head} a{i}", f"a{i}: %json {_dumped(_parameters(function))}"]


def _python_call(i: int, function: FunctionSpec, style: str, token_id: TokenId) -> list[str]:
    """f(a=1, b="x"): values are JSON, which the parser reads as well as Python's literals.

    Required arguments first, then any of the optional ones, in the order of the schema.
    """
    schema = _parameters(function)
    properties = schema.get("properties", {})
    if not isinstance(properties, dict):
        raise InvalidRequestError(f"properties of {function.name[:50]!r} must be an object")
    wanted = schema.get("required", [])
    if not isinstance(wanted, list):
        raise InvalidRequestError(f"required of {function.name[:50]!r} must be a list of names")
    required = [name for name in properties if name in wanted]
    optional = [name for name in properties if name not in required]
    for name in (*function.name.split("."), *properties):
        if not name.isidentifier() or iskeyword(name):
            raise InvalidRequestError(
                f"the name {name[:50]!r} of function {function.name[:50]!r} cannot be written in "
                "this model's calls, which have Python's syntax"
            )
    shared = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
    rules, names = [], {}
    for n, name in enumerate([*required, *optional]):
        names[name] = f"a{i}_{n}"
        value = properties[name] if isinstance(properties[name], dict) else {}
        rules.append(f"a{i}_{n}: {lark_string(name + '=')} v{i}_{n}")
        rules.append(f"v{i}_{n}: %json {_dumped(shared | value)}")
    if required:
        arguments = ' ", " '.join(names[name] for name in required)
        arguments += "".join(f' (", " {names[name]})?' for name in optional)
    else:
        arguments = " | ".join(
            _from(k, [names[name] for name in optional]) for k in range(len(optional))
        )
        arguments = f"({arguments})?" if arguments else ""
    return [f'f{i}: {lark_string(function.name + "(")} {arguments} ")"', *rules]


def _from(first: int, names: Sequence[str]) -> str:
    """The sequences of optional arguments that begin with one of them."""
    return names[first] + "".join(f' (", " {name})?' for name in names[first + 1 :])


_FUNCTIONS: dict[str, Callable[[int, FunctionSpec, str, TokenId], list[str]]] = {
    "mistral-named": _named_call,
    "pythonic": _python_call,
}


def _parameters(function: FunctionSpec) -> dict[str, Any]:
    schema = function.parameters
    if schema is None:
        return NO_ARGUMENTS
    if schema.get("type", "object") != "object":
        raise InvalidRequestError(
            f"parameters of function {function.name[:50]!r} must be a schema of type object"
        )
    return {"type": "object"} | schema


def _dumped(schema: dict[str, Any]) -> str:
    return json.dumps(json_schema(schema), ensure_ascii=False)
