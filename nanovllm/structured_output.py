"""What form a completion must have: frozen values, checked once, here.

Says what may be asked for; whether a schema, pattern or grammar can be compiled is known to
`grammar/` alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nanovllm.errors import InvalidRequestError
from nanovllm.records import Record

MAX_CHARACTERS = 100_000
KINDS = ("json", "json_object", "regex", "grammar", "choice")
STRUCTURE_FAILED = "structured output: "  # begins the error of a sequence that cannot go on
REASONING = ("none", "optional", "open")


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutput(Record):
    """Exactly one of the first five.

    json         a JSON schema, as a mapping or as text; True: any JSON
    json_object  True: any JSON object
    regex        the whole text matches this regular expression (Rust's syntax: no look-around,
                 no back references)
    grammar      the whole text is derived from this grammar: Lark with the start rule `start`,
                 or GBNF/EBNF with `root ::= ...`
    choice       the whole text is one of these strings
    reasoning    whether a <think> block may come first: "none", "optional", or "open": the prompt
                 has opened it already

    Raises InvalidRequestError naming what is wrong.
    """

    _unknown = (InvalidRequestError, "form of structured output")

    json: Mapping[str, Any] | str | bool | None = None
    json_object: bool = False
    regex: str | None = None
    grammar: str | None = None
    choice: tuple[str, ...] | list[str] | None = None
    reasoning: str = "none"

    def __post_init__(self) -> None:
        if not isinstance(self.json_object, bool):
            raise InvalidRequestError(f"json_object must be True or False: {self.json_object!r}")
        if self.json is not None and not self.json and isinstance(self.json, (bool, int, float)):
            raise InvalidRequestError(
                "json must be a JSON schema, as a mapping or as text, or True for any JSON: "
                f"got {self.json!r}"
            )
        given = [name for name in KINDS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise InvalidRequestError(
                f"structured_output takes exactly one of {', '.join(KINDS)}; "
                f"got {', '.join(given) or 'none of them'}"
            )
        if self.reasoning not in REASONING:
            raise InvalidRequestError(
                f"reasoning must be one of {', '.join(REASONING)}, got {self.reasoning!r}"
            )
        if self.json is not None:
            self._set(json=_schema_text(self.json))
        for name in ("regex", "grammar"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise InvalidRequestError(f"{name} must be a string, not empty: {value!r:.100}")
        if self.choice is not None:
            self._set(choice=_choice(self.choice))
        self._check_size(given[0])

    def _check_size(self, name: str) -> None:
        value = getattr(self, name)
        size = sum(map(len, value)) if isinstance(value, tuple) else len(str(value))
        if size > MAX_CHARACTERS:
            raise InvalidRequestError(
                f"{name} has {size} characters; a structure may have {MAX_CHARACTERS}"
            )

    @property
    def kind(self) -> str:
        """Which of the five it is."""
        return next(name for name in KINDS if getattr(self, name) not in (None, False))


def read_structure(name: str, value: object) -> StructuredOutput:
    """The value itself, or one made of a mapping with the same names."""
    if isinstance(value, StructuredOutput):
        return value
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return StructuredOutput(**value)
    raise InvalidRequestError(f"{name} must be StructuredOutput or a mapping, got {value!r:.100}")


def _schema_text(schema: object) -> str:
    """A JSON schema in one spelling, so that equal ones are compiled once."""
    try:
        value = json.loads(schema) if isinstance(schema, str) else schema
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError) as error:
        raise InvalidRequestError(f"json is not a JSON schema: {error}") from None
    except RecursionError:
        raise InvalidRequestError("json is nested too deeply for a JSON schema") from None
    if not isinstance(value, Mapping | bool):
        raise InvalidRequestError(f"a JSON schema must be an object, got {text[:100]}")
    return text


def _choice(value: object) -> tuple[str, ...]:
    items = () if isinstance(value, str) or not isinstance(value, Iterable) else tuple(value)
    if not items or not all(isinstance(item, str) and item for item in items):
        raise InvalidRequestError(
            f"choice must be a list of strings, none of them empty: {value!r:.100}"
        )
    return items


ANY_TEXT = StructuredOutput(regex=r"(?s:.*)")  # to get ready with
