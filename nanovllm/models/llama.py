"""Llama 2 and 3.x (Touvron et al. 2023; Llama team 2024), and models in its format."""

from collections.abc import Mapping
from typing import Any

from nanovllm.models.config import DecoderConfig, read_common

ARCHITECTURES = ("LlamaForCausalLM",)


def read_config(raw: Mapping[str, Any]) -> DecoderConfig:
    bias = bool(raw.get("attention_bias", False))
    return read_common(raw, qkv_bias=bias, o_bias=bias, mlp_bias=bool(raw.get("mlp_bias", False)))
