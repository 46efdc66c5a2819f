"""`nanovllm info`: what would be chosen, without loading weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

import nanovllm
from nanovllm.bench.machine import hardware, versions


def test_info_agrees_with_the_engine(cli: Any, tiny: Path) -> None:
    found = json.loads(cli("info", "--model", tiny, "--json").out)
    with nanovllm.LLM(str(tiny)) as llm:
        info = llm.info
    assert found["device"] == info.device
    assert found["dtype"] == info.dtype
    chosen = {part: choice.name for part, choice in info.choices.items()}
    assert {part: choice["name"] for part, choice in found["choices"].items()} == chosen


def test_info_needs_no_weights(cli: Any, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((tiny / "config.json").read_text())
    result = cli("info", "--model", tmp_path)
    assert result.status == 0
    for word in ("versions", "cpu isa", "attention", "memory", "Qwen3ForCausalLM"):
        assert word in result.out


def test_info_obeys_flags(cli: Any, tiny: Path, tmp_path: Path) -> None:
    line = ("info", "--model", tiny, "--attention-backend", "torch", "--dtype", "float32")
    cli(*line, "--json", tmp_path / "info.json")
    found = json.loads((tmp_path / "info.json").read_text())
    assert found["choices"]["attention"]["name"] == "torch"
    assert found["dtype"] == "float32"


def test_an_unknown_backend_is_one_line(cli: Any, tiny: Path) -> None:
    result = cli("info", "--model", tiny, "--attention-backend", "abacus")
    assert result.status == 2
    assert "abacus" in result.err


def test_machine_facts() -> None:
    assert hardware().num_threads == torch.get_num_threads()
    assert hardware().memory > 1 << 28
    assert versions()["torch"] == torch.__version__


def test_batch_invariance_is_told_and_refused_where_nothing_promises_it(
    cli: Any, tiny: Path
) -> None:
    found = json.loads(cli("info", "--model", tiny, "--batch-invariant", "--json").out)
    expected = "on" if found["choices"]["ops"]["name"] == "c++" else "off"
    assert found["choices"]["invariant"]["name"] == expected
    line = ("info", "--model", tiny, "--batch-invariant", "--attention-backend", "torch")
    refused = cli(*line, "--device", "cpu")
    assert refused.status == 2
    assert "batch_invariant" in refused.err
