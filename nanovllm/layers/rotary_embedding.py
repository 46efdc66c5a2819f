"""Rotary position embedding: the table of angles for every rope type that we know.

Sources: RoPE (Su et al. 2021); linear scaling (Chen et al. 2023, "position interpolation");
YaRN (Peng et al. 2023); llama3 scaling (Llama 3.1 release). Formulas as Hugging Face's
configuration fields define them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """rope_type is one of ROPE_TYPES; the fields below it matter only to the types they name."""

    theta: float = 10000.0
    rope_type: str = "default"
    factor: float = 1.0  # linear, llama3, yarn
    original_max_position: int = 0  # llama3, yarn
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float = 1.0  # yarn: multiplies cos and sin
    truncate: bool = True  # yarn: round the correction range to whole dimensions


def cos_sin_table(config: RopeConfig, head_dim: int, max_position: int) -> Tensor:
    """[max_position, head_dim] float32 on the CPU: cosines, then sines, head_dim/2 of each."""
    frequencies = inverse_frequencies(config, head_dim)
    angles = torch.outer(torch.arange(max_position, dtype=torch.float32), frequencies)
    table = torch.cat((angles.cos(), angles.sin()), dim=-1)
    return table.mul_(config.attention_factor) if config.rope_type == "yarn" else table


def inverse_frequencies(config: RopeConfig, head_dim: int) -> Tensor:
    """[head_dim / 2] float32: radians a position for each pair of dimensions."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    plain = 1.0 / (config.theta**exponents)
    if config.rope_type == "linear":
        return plain / config.factor
    if config.rope_type == "llama3":
        return _llama3(config, plain)
    if config.rope_type == "yarn":
        return _yarn(config, plain, head_dim)
    return plain


def _llama3(config: RopeConfig, plain: Tensor) -> Tensor:
    """Slow frequencies are divided by factor, fast ones kept, those between blended."""
    low, high = config.low_freq_factor, config.high_freq_factor
    turns = config.original_max_position * plain / (2 * math.pi)  # within the original context
    blend = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - blend) * plain / config.factor + blend * plain


def _yarn(config: RopeConfig, plain: Tensor, head_dim: int) -> Tensor:
    """Dimensions that turn often extrapolate, those that turn rarely interpolate."""
    low = _dimension_of(config, config.beta_fast, head_dim)
    high = _dimension_of(config, config.beta_slow, head_dim)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    span = high - low if high != low else 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / span).clamp(0.0, 1.0)
    return plain / config.factor * ramp + plain * (1 - ramp)


def _dimension_of(config: RopeConfig, num_turns: float, head_dim: int) -> float:
    """The dimension (fractional) that turns num_turns times within the original context."""
    positions = config.original_max_position / (num_turns * 2 * math.pi)
    return head_dim * math.log(positions) / (2 * math.log(config.theta))
