"""Structured output in llguidance's own words: a list of grammars, the first of which starts.

Pure text; what is wrong with it is found when it is compiled.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from nanovllm.structured_output import StructuredOutput

# Between the tokens of JSON: nothing, a space, or a line end with an indentation. Endless white
# space is allowed by JSON, and some models never stop writing it.
WHITESPACE = r"(\x20|\n\x20{0,20})?"
TokenId = Callable[[str], int | None]


def grammar_source(structure: StructuredOutput, token_id: TokenId) -> str:
    """What the library compiles; token_id finds added tokens by name.

    Raises ValueError if a grammar cannot be read.
    """
    grammars = [{"name": "structure"} | _structure(structure)]
    if structure.reasoning != "none":
        opened = structure.reasoning == "open"
        grammars.insert(0, {"lark_grammar": _after_reasoning(token_id, opened)})
    return json.dumps({"grammars": grammars}, ensure_ascii=False)


def _after_reasoning(token_id: TokenId, opened: bool) -> str:
    """The structure behind a <think> block, which the prompt has opened or may come."""
    begin, end = token_id("<think>"), token_id("</think>")
    rules = ["think: text" if opened else f"think: {mark('<think>', begin)} text"]
    rules.append(
        "start: think blank? @structure" if opened else "start: (think blank?)? @structure"
    )
    rules.append("blank: /[ \\n]{1,4}/")
    if end is None:
        rules.append(r"text[lazy]: /(?s:.*)<\/think>/")
    else:
        rules.append(f"text: TEXT? <[{end}]>")
        rules.append(r"TEXT: /(?s:.+)/ & ~/(?s:.*<\/think>.*)/")
    return "\n".join(rules)


def mark(name: str, token_id: int | None) -> str:
    """A part of a rule: a mark as its added token, or spelled in any way where there is none."""
    return lark_string(name) if token_id is None else f"<[{token_id}]>"


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
