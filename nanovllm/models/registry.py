"""Which architectures we know, and the module of each. A new family is one line here."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from nanovllm.errors import ModelLoadError, UnsupportedModelError
from nanovllm.models import llama, mistral, qwen2, qwen3
from nanovllm.models.config import DecoderConfig

FAMILIES = (qwen3, qwen2, llama, mistral)
_BY_ARCHITECTURE = {name: family for family in FAMILIES for name in family.ARCHITECTURES}


def known_architectures() -> tuple[str, ...]:
    return tuple(_BY_ARCHITECTURE)


def read_config(raw: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that a config.json describes.

    Raises UnsupportedModelError naming the known architectures, or ModelLoadError naming a field
    that is missing or wrong.
    """
    try:
        return _family(raw).read_config(raw)
    except KeyError as error:
        raise ModelLoadError(f"config.json lacks {error.args[0]!r}") from None
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ModelLoadError(f"config.json holds a value of the wrong kind: {error}") from None


def _family(raw: Mapping[str, Any]) -> ModuleType:
    names = raw.get("architectures")
    if not names:
        raise ModelLoadError("config.json names no architecture")
    family = _BY_ARCHITECTURE.get(names[0])
    if family is None:
        known = ", ".join(known_architectures())
        raise UnsupportedModelError(f"architecture {names[0]!r} is not known; known: {known}")
    return family
