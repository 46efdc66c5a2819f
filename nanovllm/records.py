"""What the records of options share: closed names, and numbers of any library.

Knows no option of its own.
"""

from __future__ import annotations

import math
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any, ClassVar, Self


class Record:
    """Base of a frozen dataclass of options: an unknown name is answered with the nearest one."""

    __slots__ = ()
    _unknown: ClassVar[tuple[type[Exception], str]]  # what is raised, and what options are called

    def __new__(cls, *args: Any, **options: Any) -> Self:
        known = cls.__dataclass_fields__  # type: ignore[attr-defined]
        for name in options:
            if name not in known:
                near = get_close_matches(name, known, 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                error, called = cls._unknown
                raise error(f"unknown {called} {name!r}{hint}")
        return object.__new__(cls)

    @classmethod
    def from_kwargs(cls, **options: Any) -> Self:
        """The same as the constructor, for options that a type checker cannot see."""
        return cls(**options)

    def _set(self, **values: Any) -> None:
        """For __post_init__: the one moment when a field may still change."""
        for name, value in values.items():
            object.__setattr__(self, name, value)


def whole(value: object) -> int | None:
    """A plain int from an integer of any library, None from anything else and from a bool."""
    if type(value) is int:
        return value
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None


def real(value: object) -> float | None:
    """A plain float from a number of any library, None from anything else and from a bool."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:  # an integer beyond all floats
        return math.inf


def unpacked(value: Any) -> Any:
    """Lists and numbers from a numpy array or a tensor; anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value
