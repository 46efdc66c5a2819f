"""config.json to decoder: rope tables against transformers, both spellings, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from tiny_models import FAMILIES, LLAMA3, SMALL, YARN

from nanovllm.errors import ModelLoadError, UnsupportedModelError
from nanovllm.layers.rotary_embedding import cos_sin_table
from nanovllm.models.config import DecoderConfig
from nanovllm.models.registry import known_architectures, read_config

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": LLAMA3,
    "llama3 of Llama 3.1": LLAMA3 | {"original_max_position_embeddings": 8192},
    "yarn": YARN,
    "yarn of Qwen2.5": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
    },
    "yarn, betas": YARN | {"beta_fast": 16.0, "beta_slow": 2.0},
    "yarn, factor of attention": YARN | {"attention_factor": 1.25},
    "yarn, mscale": YARN | {"mscale": 0.8, "mscale_all_dim": 0.4},
    "yarn, not truncated": YARN | {"truncate": False},
}
NUM_POSITIONS = 600
TOLERANCE = 1e-4  # the last bit of a frequency in float32, times the position


def raw_config(family: str = "llama", **fields: Any) -> dict[str, Any]:
    kind, differences = FAMILIES[family]
    config = getattr(transformers, f"{kind}Config")(**(SMALL | differences))
    raw: dict[str, Any] = config.to_dict() | {"architectures": [f"{kind}ForCausalLM"]}
    return raw | fields


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("theta", [10000.0, 1000000.0])
@pytest.mark.parametrize("name", ROPES)
def test_rope_table(name: str, theta: float, head_dim: int) -> None:
    parameters = ROPES[name] | {"rope_theta": theta}
    config = transformers.LlamaConfig(
        **(SMALL | {"head_dim": head_dim, "rope_parameters": parameters})
    )
    theirs = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    cos, sin = theirs(torch.zeros(1), torch.arange(NUM_POSITIONS)[None])
    half = head_dim // 2
    expected = torch.cat((cos[0, :, :half], sin[0, :, :half]), dim=-1)
    ours = read_config(raw_config(head_dim=head_dim, rope_parameters=parameters)).rope
    table = cos_sin_table(ours, head_dim, NUM_POSITIONS)
    assert table.shape == (NUM_POSITIONS, head_dim)
    torch.testing.assert_close(table, expected, atol=TOLERANCE, rtol=0)


def test_both_spellings_of_rope() -> None:
    """rope_theta with rope_scaling, as files from before transformers 5 have it."""
    for name, parameters in ROPES.items():
        new = raw_config(rope_parameters=parameters | {"rope_theta": 5e5})
        old = raw_config(rope_theta=5e5, rope_scaling=parameters)
        del old["rope_parameters"]
        assert read_config(old) == read_config(new), name
    older = raw_config(rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0})
    del older["rope_parameters"]
    assert (read_config(older).rope.rope_type, read_config(older).rope.factor) == ("linear", 2.0)
    plain = raw_config(rope_theta=5e5, rope_scaling=None)
    del plain["rope_parameters"]
    assert (read_config(plain).rope.rope_type, read_config(plain).rope.theta) == ("default", 5e5)


def differences(config: DecoderConfig) -> dict[str, Any]:
    return {
        name: getattr(config, name) for name in ("qkv_bias", "o_bias", "mlp_bias", "qk_norm")
    } | {"windows": config.sliding_windows}


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("qwen3", {"qk_norm": True}),
        ("qwen3-untied-bias", {"qk_norm": True, "qkv_bias": True, "o_bias": True}),
        ("qwen2", {"qkv_bias": True}),
        ("qwen2-window", {"qkv_bias": True, "windows": (None, 24, 24)}),
        ("llama", {}),
        ("llama-mha-bias", {"qkv_bias": True, "o_bias": True, "mlp_bias": True}),
        ("mistral", {"windows": (16, 16, 16)}),
    ],
)
def test_what_a_family_changes(family: str, expected: dict[str, Any]) -> None:
    plain = {"qkv_bias": False, "o_bias": False, "mlp_bias": False, "qk_norm": False}
    config = read_config(raw_config(family))
    assert differences(config) == plain | {"windows": (None,) * 3} | expected
    assert config.tie_word_embeddings == FAMILIES[family][1].get("tie_word_embeddings", False)


def test_fields_that_older_files_lack() -> None:
    raw = raw_config("qwen2-window")
    for name in ("head_dim", "layer_types", "num_key_value_heads", "rms_norm_eps"):
        raw.pop(name, None)
    config = read_config(raw)
    assert config.sliding_windows == (None, 24, 24)
    assert (config.head_dim, config.num_kv_heads, config.rms_norm_eps) == (16, 4, 1e-6)
    assert read_config(raw_config("mistral", sliding_window=None)).sliding_windows == (None,) * 3
    assert read_config(raw | {"use_sliding_window": False}).sliding_windows == (None,) * 3


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen2", "mistral"])
@pytest.mark.parametrize("name", ["vocab_size", "num_hidden_layers", "max_position_embeddings"])
def test_missing_fields_are_named(family: str, name: str) -> None:
    raw = raw_config(family)
    del raw[name]
    with pytest.raises(ModelLoadError, match=rf"config\.json lacks '{name}'"):
        read_config(raw)


def test_unknown_things_are_refused_with_what_is_known() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'X' is not known; known: Qwen3ForCausalLM, "):
        read_config(raw_config(architectures=["X"]))
    with pytest.raises(ModelLoadError, match="names no architecture"):
        read_config(raw_config(architectures=None))
    with pytest.raises(
        UnsupportedModelError, match=r"rope type 'longrope'.*known: default, linear"
    ):
        read_config(raw_config(rope_parameters={"rope_type": "longrope"}))
    with pytest.raises(UnsupportedModelError, match="hidden_act 'gelu' is not known"):
        read_config(raw_config(hidden_act="gelu"))
    with pytest.raises(UnsupportedModelError, match=r"partial_rotary_factor 0\.5"):
        read_config(raw_config(partial_rotary_factor=0.5))


def test_every_family_is_tested() -> None:
    tested = {f"{kind}ForCausalLM" for kind, _ in FAMILIES.values()}
    assert tested == set(known_architectures())


POSITIVE_INTEGER = "must be a positive integer, got "
POSITIVE = "must be a positive number, got "


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_size", "big", f"hidden_size {POSITIVE_INTEGER}'big'"),
        ("hidden_size", -1, f"hidden_size {POSITIVE_INTEGER}-1"),
        ("num_attention_heads", 0, f"num_attention_heads {POSITIVE_INTEGER}0"),
        ("num_key_value_heads", -1, f"num_key_value_heads {POSITIVE_INTEGER}-1"),
        ("num_hidden_layers", 0, f"num_hidden_layers {POSITIVE_INTEGER}0"),
        ("num_hidden_layers", True, f"num_hidden_layers {POSITIVE_INTEGER}True"),
        ("max_position_embeddings", 0, f"max_position_embeddings {POSITIVE_INTEGER}0"),
        ("vocab_size", -1, f"vocab_size {POSITIVE_INTEGER}-1"),
        ("rms_norm_eps", None, f"rms_norm_eps {POSITIVE}None"),
        ("rms_norm_eps", "x", f"rms_norm_eps {POSITIVE}'x'"),
        ("rms_norm_eps", float("nan"), f"rms_norm_eps {POSITIVE}nan"),
        ("rms_norm_eps", float("inf"), f"rms_norm_eps {POSITIVE}inf"),
        ("rms_norm_eps", -1, f"rms_norm_eps {POSITIVE}-1"),
        ("rope_theta", -1.0, rf"rope_theta {POSITIVE}-1\.0"),
        ("rope_parameters", [1], "holds a value of the wrong kind"),
        ("max_window_layers", "x", "holds a value of the wrong kind"),
    ],
)
@pytest.mark.parametrize("family", ["LlamaForCausalLM", "Qwen2ForCausalLM"])
def test_values_of_the_wrong_kind_are_named(
    family: str, field: str, value: object, message: str
) -> None:
    raw = {
        "architectures": [family],
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 100,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 100,
    }
    if field == "max_window_layers" and family == "LlamaForCausalLM":
        read_config(raw | {field: value})  # not a field of its own
        return
    with pytest.raises(ModelLoadError, match=rf"config\.json:? {message}"):
        read_config(raw | {field: value})


def test_layer_types_must_be_known_and_complete() -> None:
    raw = {
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 100,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 100,
    }
    for kinds in (["full_attention"], ["full_attention", "linear_attention"]):
        with pytest.raises(UnsupportedModelError, match="layer_types"):
            read_config(raw | {"layer_types": kinds})
