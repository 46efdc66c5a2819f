"""The architecture of a decoder, and how its parts are read from a Hugging Face config.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nanovllm.errors import ModelLoadError, UnsupportedModelError
from nanovllm.layers.rotary_embedding import ROPE_TYPES, RopeConfig
from nanovllm.records import real, whole


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """What distinguishes the decoders that we run; sizes in elements.

    sliding_windows has one entry a layer: None for full attention.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    sliding_windows: tuple[int | None, ...]
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False


def read_common(raw: Mapping[str, Any], **differences: Any) -> DecoderConfig:
    """The fields that all families share. Raises ModelLoadError, or KeyError for a missing one."""
    if raw.get("hidden_act", "silu") != "silu":
        raise UnsupportedModelError(f"hidden_act {raw['hidden_act']!r} is not known; known: silu")
    hidden_size, num_heads = _size(raw, "hidden_size"), _size(raw, "num_attention_heads")
    num_layers = _size(raw, "num_hidden_layers")
    fields: dict[str, Any] = {
        "vocab_size": _size(raw, "vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": _size(raw, "intermediate_size"),
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": _size(raw, "num_key_value_heads", num_heads),
        "head_dim": _size(raw, "head_dim", hidden_size // num_heads),
        "max_position": _size(raw, "max_position_embeddings"),
        "rms_norm_eps": _positive("rms_norm_eps", raw.get("rms_norm_eps", 1e-6)),
        "rope": read_rope(raw),
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings", False)),
        "sliding_windows": (None,) * num_layers,
    }
    return DecoderConfig(**(fields | differences))


def _size(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = raw[key] if default is None else raw.get(key) or default
    size = whole(value)
    if size is None or size < 1:
        raise ModelLoadError(f"config.json: {key} must be a positive integer, got {value!r}")
    return size


def _positive(key: str, value: object) -> float:
    number = real(value)
    if number is None or not 0 < number < math.inf:  # NaN neither
        raise ModelLoadError(f"config.json: {key} must be a positive number, got {value!r}")
    return number


def read_rope(raw: Mapping[str, Any]) -> RopeConfig:
    """Both spellings: rope_parameters (transformers 5), and rope_theta with rope_scaling."""
    scaling = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    rope_type = scaling.get("rope_type") or scaling.get("type") or "default"
    if rope_type not in ROPE_TYPES:
        raise UnsupportedModelError(
            f"rope type {rope_type!r} is not known; known: {', '.join(ROPE_TYPES)}"
        )
    partial = scaling.get("partial_rotary_factor", raw.get("partial_rotary_factor")) or 1.0
    if partial != 1.0:
        raise UnsupportedModelError(f"partial_rotary_factor {partial} is not known; known: 1.0")
    if any(isinstance(value, Mapping) for value in scaling.values()):
        raise UnsupportedModelError("rope parameters that differ by layer type are not known")
    theta = scaling.get("rope_theta") or raw.get("rope_theta") or 10000.0
    original = scaling.get("original_max_position_embeddings") or raw["max_position_embeddings"]
    factor = scaling.get("factor") or raw["max_position_embeddings"] / original
    return RopeConfig(
        theta=_positive("rope_theta", theta),
        rope_type=rope_type,
        factor=_positive("factor of the rope parameters", factor),
        original_max_position=original,
        low_freq_factor=scaling.get("low_freq_factor", 1.0),
        high_freq_factor=scaling.get("high_freq_factor", 4.0),
        beta_fast=scaling.get("beta_fast") or 32.0,
        beta_slow=scaling.get("beta_slow") or 1.0,
        attention_factor=_yarn_attention_factor(scaling, factor),
        truncate=scaling.get("truncate", True),
    )


def _yarn_attention_factor(scaling: Mapping[str, Any], factor: float) -> float:
    given = scaling.get("attention_factor")
    if given is not None:
        return float(given)
    mscale, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if mscale and all_dim:
        return _mscale(factor, mscale) / _mscale(factor, all_dim)
    return _mscale(factor, 1.0)


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def windows_of_layers(raw: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Qwen's way to say which layers slide: layer_types, or max_window_layers for older files."""
    num_layers = raw.get("num_hidden_layers")
    if not isinstance(num_layers, int) or num_layers < 1:
        return ()  # `read_common` names it
    window = raw.get("sliding_window") if raw.get("use_sliding_window") else None
    types = raw.get("layer_types")
    if types is None:
        first = raw.get("max_window_layers", num_layers)
        types = ["sliding_attention" if i >= first else "full_attention" for i in range(num_layers)]
    unknown = set(types) - {"sliding_attention", "full_attention"}
    if unknown or len(types) != num_layers:
        raise UnsupportedModelError(
            f"layer_types must name sliding_attention or full_attention for each of {num_layers} "
            f"layers; got {len(types)} with {sorted(map(str, unknown)) or 'no other'} kinds"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in types)
