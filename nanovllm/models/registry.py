"""Which architectures we know, and the module of each. A new family is one line here."""

from __future__ import annotations

from collections.abc import Mapping
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

    Raises UnsupportedModelError naming the known architectures, or ModelLoadError.
    """
    names = raw.get("architectures")
    if not names:
        raise ModelLoadError("config.json names no architecture")
    family = _BY_ARCHITECTURE.get(names[0])
    if family is None:
        known = ", ".join(known_architectures())
        raise UnsupportedModelError(f"architecture {names[0]!r} is not known; known: {known}")
    return family.read_config(raw)
