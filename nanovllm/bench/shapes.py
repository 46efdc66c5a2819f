"""The shapes of well-known models, so that speed can be measured without their weights.

The numbers are those of the config.json that each model's authors publish on the hub.
"""

from __future__ import annotations

import json
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from nanovllm.errors import ConfigError


def _qwen3(hidden: int, inter: int, layers: int, heads: int, *, tied: bool) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": hidden,
        "intermediate_size": inter,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": tied,
        "eos_token_id": 151645,
    }


def _llama3(
    hidden: int, inter: int, layers: int, *, head_dim: int, factor: float, tied: bool
) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": hidden,
        "intermediate_size": inter,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": head_dim,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": tied,
        "eos_token_id": 128009,
    }


SMOLLM_135M: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "tie_word_embeddings": True,
    "eos_token_id": 0,
}
SHAPES: dict[str, dict[str, Any]] = {
    "smollm-135m": SMOLLM_135M,
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, tied=True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, tied=True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, tied=True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, tied=False),
    "qwen3-14b": _qwen3(5120, 17408, 40, 40, tied=False),
    "qwen3-32b": _qwen3(5120, 25600, 64, 64, tied=False),
    "llama-3.2-1b": _llama3(2048, 8192, 16, head_dim=64, factor=32.0, tied=True),
    "llama-3.1-8b": _llama3(4096, 14336, 32, head_dim=128, factor=8.0, tied=False),
}


def find_shape(name: str) -> dict[str, Any]:
    """The config of a shape. Raises ConfigError with the nearest name."""
    if name in SHAPES:
        return SHAPES[name]
    near = get_close_matches(name, SHAPES, 1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(SHAPES)}"
    raise ConfigError(f"unknown shape {name!r}; {hint}")


def write_shape(name: str, directory: Path) -> Path:
    """Makes directory a model without weights: for load_format="dummy"."""
    text = json.dumps(find_shape(name) | {"dtype": "bfloat16"}, indent=2)
    (directory / "config.json").write_text(text)
    return directory
