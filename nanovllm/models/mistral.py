"""Mistral (Jiang et al. 2023): Llama's shape with a sliding window on every layer, or on none."""

from collections.abc import Mapping
from typing import Any

from nanovllm.models.config import DecoderConfig, read_common

ARCHITECTURES = ("MistralForCausalLM",)


def read_config(raw: Mapping[str, Any]) -> DecoderConfig:
    config = read_common(raw)
    window = raw.get("sliding_window")
    return read_common(raw, sliding_windows=(window,) * config.num_layers)
