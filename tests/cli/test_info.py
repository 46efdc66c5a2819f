"""`nanovllm info`: what would be chosen, without loading weights."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import nanovllm
from nanovllm import EngineConfig, platforms
from nanovllm.bench.inspect import inspect
from nanovllm.bench.machine import hardware, versions
from nanovllm.cli.info import report
from nanovllm.kernels import cache
from nanovllm.kernels.cuda import launch


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


@pytest.mark.parametrize(
    ("reason", "wanted"),
    [
        (None, ["cuda c++   yes (sm_90a)"]),
        (
            "the GPU is too old",
            [
                "cuda c++   no",
                "             the GPU is too old",
                "             Triton and cuBLAS take their place",
            ],
        ),
    ],
)
def test_cuda_kernels_are_told_where_there_is_a_gpu(
    reason: str | None, wanted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "available", lambda device: reason)
    found = inspect(EngineConfig(device="cpu"))
    assert "cuda c++" not in found.choices
    choice = platforms.choose_cuda_kernels(torch.device("cuda"))
    lines = report(replace(found, choices={"cuda c++": asdict(choice)})).splitlines()
    start = lines.index(wanted[0])
    assert lines[start : start + len(wanted)] == wanted


def test_the_directory_of_kernels_is_the_one_in_use(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def shown() -> str:
        return inspect(EngineConfig(device="cpu")).directories["compiled kernels"]

    shown()  # compiles what is needed, once in a process
    monkeypatch.setattr(cache.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "to" / "make"))
    assert shown() == str(tmp_path / "to" / "make" / "nanovllm")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    fallback = f"nanovllm-{os.getuid()}"
    assert shown() == str(tmp_path / fallback)
    (tmp_path / fallback).write_text("")
    assert shown() == "no directory is writable"


def test_an_unknown_backend_is_one_line(cli: Any, tiny: Path) -> None:
    result = cli("info", "--model", tiny, "--attention-backend", "abacus")
    assert result.status == 2
    assert "abacus" in result.err


def test_machine_facts() -> None:
    assert hardware().num_threads == torch.get_num_threads()
    assert hardware().memory > 1 << 28
    # The installed package's version; the module's may name a build as well, "+cu130".
    assert torch.__version__.startswith(versions()["torch"])


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
