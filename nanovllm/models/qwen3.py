"""Qwen3 (Qwen team, 2025): query and key heads are normalised before the rotation."""

from collections.abc import Mapping
from typing import Any

from nanovllm.models.config import DecoderConfig, read_common, windows_of_layers

ARCHITECTURES = ("Qwen3ForCausalLM",)


def read_config(raw: Mapping[str, Any]) -> DecoderConfig:
    bias = bool(raw.get("attention_bias", False))
    windows = windows_of_layers(raw)
    return read_common(raw, qk_norm=True, qkv_bias=bias, o_bias=bias, sliding_windows=windows)
