"""Qwen2 and Qwen2.5 (Qwen team, 2024): biases on q, k and v; upper layers may slide."""

from collections.abc import Mapping
from typing import Any

from nanovllm.models.config import DecoderConfig, read_common, windows_of_layers

ARCHITECTURES = ("Qwen2ForCausalLM",)


def read_config(raw: Mapping[str, Any]) -> DecoderConfig:
    return read_common(raw, qkv_bias=True, sliding_windows=windows_of_layers(raw))
