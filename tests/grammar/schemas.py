"""JSON schemas of all kinds, small enough that even a random model comes to an end."""

from __future__ import annotations

from typing import Any

WORD = {"type": "string", "maxLength": 6}
DRAFT = "https://json-schema.org/draft/2020-12/schema"
DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}


def record(*required: str, **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def items(schema: Any, low: int, high: int, **more: Any) -> dict[str, Any]:
    return {"type": "array", "items": schema, "minItems": low, "maxItems": high} | more


SCHEMAS: dict[str, Any] = {
    "null": {"type": "null"},
    "boolean": {"type": "boolean"},
    "word": WORD,
    "empty string": {"type": "string", "maxLength": 0},
    "long enough": {"type": "string", "minLength": 5, "maxLength": 8},
    "digit": DIGIT,
    "range": {"type": "integer", "minimum": -17, "maximum": 342},
    "exclusive": {"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 6},
    "negative": {"type": "integer", "maximum": -1, "minimum": -99},
    "large": {"type": "integer", "minimum": 10**12, "maximum": 10**12 + 5},
    "fractions": {"type": "number", "minimum": 0.25, "maximum": 0.75, "multipleOf": 0.25},
    "multiple": {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 70},
    "constant": {"const": {"a": [1, None, "x"]}},
    "constant text": {"const": 'say "hi"\n'},
    "enum": {"enum": ["red", "green", "blue"]},
    "mixed enum": {"enum": [1, "1", None, True, [1], {"a": 1}]},
    "unicode enum": {"enum": ["你好", "grüße", "👋"]},
    "types": {"type": ["null", "boolean"]},
    "nullable": {"anyOf": [DIGIT, {"type": "null"}]},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
    "inner pattern": {"type": "string", "pattern": "^(ab|cd)+e$", "maxLength": 9},
    "date": {"type": "string", "format": "date"},
    "time": {"type": "string", "format": "date-time", "maxLength": 30},
    "uuid": {"type": "string", "format": "uuid"},
    "ip": {"type": "string", "format": "ipv4"},
    "empty object": record(),
    "record": record("a", "b", a=DIGIT, b=WORD),
    "optional": record("a", a=DIGIT, b=WORD, c={"type": "boolean"}),
    "all optional": record(a=DIGIT, b=DIGIT, c=DIGIT),
    "strange keys": record('a "b"', "ü", "", **{'a "b"': DIGIT, "ü": DIGIT, "": DIGIT}),
    "many keys": record(*(f"key{i}" for i in range(12)), **{f"key{i}": DIGIT for i in range(12)}),
    "nested": record("a", a=record("b", b=record("c", c=record("d", d=DIGIT)))),
    "deep": {"$ref": "#/$defs/l5", "$defs": {"l0": DIGIT} | {
        f"l{i}": items({"$ref": f"#/$defs/l{i - 1}"}, 1, 1) for i in range(1, 6)
    }},
    "additional": {"type": "object", "additionalProperties": DIGIT, "maxProperties": 2,
                   "properties": {"a": WORD}, "required": ["a"]},
    "keys": {"type": "object", "patternProperties": {"^[xy]$": DIGIT}, "maxProperties": 1,
             "additionalProperties": False},
    "list": items(DIGIT, 0, 4),
    "list of three": items(DIGIT, 3, 3),
    "list of lists": items(items(DIGIT, 1, 2), 1, 3),
    "list of records": items(record("x", "y", x=DIGIT, y=DIGIT), 1, 3),
    "tuple": {"type": "array", "prefixItems": [DIGIT, WORD], "items": False, "minItems": 2},
    "tuple and more": {"type": "array", "prefixItems": [WORD], "items": DIGIT, "minItems": 1,
                       "maxItems": 4},
    "empty list": {"type": "array", "maxItems": 0},
    "enum list": items({"enum": ["a", "b"]}, 1, 5),
    "any of": {"anyOf": [record("a", a=DIGIT), record("b", b=WORD), {"type": "null"}]},
    "one of": {"oneOf": [record("cat", cat=DIGIT), record("dog", dog=DIGIT)]},
    "one of constants": {"oneOf": [{"const": "a"}, {"const": "b"}]},
    "tagged union": {"oneOf": [
        record("kind", "size", kind={"const": "square"}, size=DIGIT),
        record("kind", "radius", kind={"const": "circle"}, radius=DIGIT),
    ]},
    "all of": {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 8}]},
    "all of records": {"allOf": [
        {"type": "object", "properties": {"a": DIGIT}, "required": ["a"]},
        {"type": "object", "properties": {"b": DIGIT}, "required": ["b"]},
    ], "additionalProperties": False, "properties": {"a": True, "b": True}},
    "reference": {"$ref": "#/$defs/point", "$defs": {"point": record("x", x=DIGIT)}},
    "old reference": {"$ref": "#/definitions/d", "definitions": {"d": DIGIT}},
    "reference in a list": record("all", all=items({"$ref": "#/$defs/p"}, 1, 2)) | {
        "$defs": {"p": record("x", x=DIGIT)}
    },
    "list by reference": {"$ref": "#/$defs/list", "$defs": {
        "list": {"anyOf": [{"type": "null"}, record("next", next={"$ref": "#/$defs/list"})]}
    }},
    "tree": {"$ref": "#/$defs/t", "$defs": {"t": items({"$ref": "#/$defs/t"}, 0, 1)}},
    "annotated": record("a", a=DIGIT | {"title": "A", "description": "a digit", "default": 3,
                                        "examples": [1]}) | {"title": "T", "$schema": DRAFT},
    "true": True,
}  # fmt: skip

# Some models write these for ever, as they may.
UNBOUNDED = {"additional", "list by reference", "tree", "true", "time"}
