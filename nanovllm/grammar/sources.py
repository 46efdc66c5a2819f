"""Structured output in llguidance's own words: a list of grammars, the first of which starts.

Pure text; what is wrong with it is found when it is compiled.
"""

from __future__ import annotations

import json
from typing import Any

from nanovllm.structured_output import StructuredOutput

# Between the tokens of JSON: nothing, a space, or a line end with an indentation. Endless white
# space is allowed by JSON, and some models never stop writing it.
WHITESPACE = r"(\x20|\n\x20{0,40})?"
_THINK = {
    "open": "start: think ws? @structure\nthink[lazy]: /(.|\\n)*<\\/think>/\nws: /[ \\n]{1,4}/",
    "optional": (
        "start: (think ws?)? @structure\n"
        "think[lazy]: /<think>(.|\\n)*<\\/think>/\nws: /[ \\n]{1,4}/"
    ),
}


def grammar_source(structure: StructuredOutput) -> str:
    """What the library compiles. Raises ValueError if a grammar cannot be read."""
    grammars = [{"name": "structure"} | _structure(structure)]
    if structure.reasoning != "none":
        grammars.insert(0, {"lark_grammar": _THINK[structure.reasoning]})
    return json.dumps({"grammars": grammars}, ensure_ascii=False)


def _structure(structure: StructuredOutput) -> dict[str, Any]:
    if structure.json_object:
        return {"json_schema": json_schema({"type": "object"})}
    if structure.json is not None:
        assert isinstance(structure.json, str), "it was made text"
        return {"json_schema": json_schema(json.loads(structure.json))}
    if structure.choice is not None:
        choices = " | ".join(map(lark_string, structure.choice))
        return {"lark_grammar": f"start: CHOICE\nCHOICE: {choices}"}
    if structure.regex is not None:
        return {"lark_grammar": f"start: /{_slashes_escaped(structure.regex)}/"}
    assert structure.grammar is not None, "exactly one is set"
    return {"lark_grammar": _lark(structure.grammar)}


def json_schema(schema: Any) -> dict[str, Any]:
    """The schema with our rule for white space."""
    if schema is False:
        raise ValueError("the schema `false` allows nothing")
    return ({} if schema is True else schema) | {"x-guidance": {"whitespace_pattern": WHITESPACE}}


def lark_string(text: str) -> str:
    """A terminal that is this text."""
    return json.dumps(text, ensure_ascii=False)


def _slashes_escaped(pattern: str) -> str:
    """The pattern between slashes: one that is not escaped yet would end it."""
    escaped, after_backslash = [], False
    for char in pattern:
        escaped.append("\\/" if char == "/" and not after_backslash else char)
        after_backslash = char == "\\" and not after_backslash
    return "".join(escaped).replace("\n", "\\n")


def _lark(grammar: str) -> str:
    if "::=" not in grammar:
        return grammar
    from llguidance.gbnf_to_lark import gbnf_to_lark  # optional

    try:
        return gbnf_to_lark(grammar)
    except Exception as error:  # its parser raises whatever it stumbles over
        raise ValueError(str(error) or type(error).__name__) from None
