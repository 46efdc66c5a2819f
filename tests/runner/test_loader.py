"""The loader is strict both ways and names what is wrong; formats and dtypes are its own affair."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import edit_json, make_model
from torch import Tensor

from nanovllm import LLM, WeightsError
from nanovllm.runner import loader

OPTIONS: dict[str, Any] = {"skip_tokenizer_init": True, "max_num_seqs": 2, "num_kv_blocks": 8}
PROMPT = [5, 6, 7, 8]
Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model", "qwen3")


def weights(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "model.safetensors")


def save(directory: Path, tensors: dict[str, Tensor], name: str = "model.safetensors") -> None:
    save_file(tensors, directory / name, {"format": "pt"})


def shard(directory: Path, num_files: int) -> list[str]:
    tensors = weights(directory)
    (directory / "model.safetensors").unlink()
    names = [f"model-{i + 1:05}-of-{num_files:05}.safetensors" for i in range(num_files)]
    where = {key: names[i % num_files] for i, key in enumerate(tensors)}
    for name in names:
        save(directory, {key: tensors[key] for key in where if where[key] == name}, name)
    index = {"metadata": {}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return names


def answer(directory: Path, **options: Any) -> list[int]:
    defaults = {"dtype": "float32", "device": "cpu"}
    with LLM(str(directory), **(OPTIONS | defaults | options)) as llm:
        output = llm.generate(PROMPT, temperature=0, max_tokens=9, ignore_eos=True, use_tqdm=False)
    tokens: list[int] = output.token_ids
    return tokens


def assert_refused(directory: Path, *words: str) -> None:
    with pytest.raises(WeightsError) as caught:
        LLM(str(directory), **OPTIONS)
    for word in words:
        assert word in str(caught.value)


def test_missing_and_unexpected_and_wrong_shape(directory: Path) -> None:
    tensors = weights(directory)
    tensors["model.layers.1.self_attn.query.weight"] = tensors.pop(Q)
    tensors["model.norm.weight"] = torch.ones(63)
    save(directory, tensors)
    assert_refused(
        directory,
        f"missing: {Q}",
        "unexpected: model.layers.1.self_attn.query.weight",
        "wrong shape: model.norm.weight is [63], not [64]",
    )


def test_long_lists_are_cut(directory: Path) -> None:
    edit_json(directory / "config.json", num_hidden_layers=9, layer_types=None)
    assert_refused(directory, "missing: model.layers.3.", "and 46 more")
    edit_json(directory / "config.json", num_hidden_layers=1, layer_types=None)
    assert_refused(directory, "unexpected: model.layers.1.")


def test_bias_that_the_config_does_not_name(directory: Path) -> None:
    tensors = weights(directory)
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(128)
    save(directory, tensors)
    assert_refused(directory, "unexpected: model.layers.0.self_attn.q_proj.bias")


@pytest.mark.parametrize("keep", [0, 4, 100, 5000])
def test_truncated(directory: Path, keep: int) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert_refused(directory, "model.safetensors cannot be read (truncated or damaged?)")


def test_no_weights_at_all(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    assert_refused(directory, "no .safetensors file in")


def test_shards(directory: Path) -> None:
    expected = answer(directory)
    shard(directory, 3)
    assert answer(directory) == expected
    (directory / "model.safetensors.index.json").unlink()
    assert answer(directory) == expected


def test_index_that_names_an_absent_file(directory: Path) -> None:
    names = shard(directory, 3)
    (directory / names[1]).unlink()
    assert_refused(directory, "names files that are not there", names[1])
    (directory / "model.safetensors.index.json").write_text("{}")
    assert_refused(directory, "is not a weight index")
    (directory / "model.safetensors.index.json").write_text("nothing")
    assert_refused(directory, "is not a weight index")


def test_shard_that_lacks_a_tensor(directory: Path) -> None:
    names = shard(directory, 2)
    tensors = load_file(directory / names[0])
    gone = sorted(tensors)[0]
    del tensors[gone]
    save(directory, tensors, names[0])
    assert_refused(directory, f"missing: {gone}")


def test_what_carries_no_information_is_ignored(directory: Path) -> None:
    expected = answer(directory)
    tensors = weights(directory)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    tensors["lm_head.weight"] = torch.zeros(199, 64)  # tied: the embedding counts
    save(directory, tensors)
    assert answer(directory) == expected


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16", "float16"])
def test_dtypes(directory: Path, stored: torch.dtype, wanted: str) -> None:
    """What is stored in 16 bits is exact in 32: the same answer as rounding by hand."""
    rounded = {name: tensor.to(stored) for name, tensor in weights(directory).items()}
    save(directory, {name: tensor.float() for name, tensor in rounded.items()})
    expected = answer(directory, dtype=wanted)
    save(directory, rounded)
    assert answer(directory, dtype=wanted) == expected


@pytest.mark.parametrize("own", ["float32", "bfloat16", "float16"])
def test_automatic_dtype(directory: Path, own: str) -> None:
    edit_json(directory / "config.json", dtype=own)
    with LLM(str(directory), device="cpu", **OPTIONS) as llm:
        assert llm.info.dtype in (("float32",) if own == "float32" else ("float32", "bfloat16"))


def test_files_are_reopened(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = answer(directory)
    shard(directory, 2)
    monkeypatch.setattr(loader, "REOPEN_AFTER_BYTES", 1)
    assert answer(directory) == expected


def test_dummy_weights_need_no_file(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    first = answer(directory, load_format="dummy", seed=1)
    assert len(first) == 9
    assert answer(directory, load_format="dummy", seed=1) == first
