"""`nanovllm bench`: the workloads are the stated ones, the roof is right, reports are complete."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM
from nanovllm.bench import offline, shapes, workloads
from nanovllm.bench.offline import run_cases
from nanovllm.bench.roofline import Ceilings, Work, layer_parameters, work_of
from nanovllm.bench.table import table
from nanovllm.build import EngineInfo
from nanovllm.model_files import find_model
from nanovllm.models import registry

PARAMETERS = {  # as published, in millions, embeddings included (twice if untied)
    "smollm-135m": 134.5,
    "qwen3-0.6b": 596,
    "qwen3-1.7b": 1721,
    "qwen3-4b": 4022,
    "qwen3-8b": 8191,
    "qwen3-14b": 14768,
    "qwen3-32b": 32762,
    "llama-3.2-1b": 1236,
    "llama-3.1-8b": 8030,
}


def test_the_nano_workload_is_the_known_one() -> None:
    (case,) = workloads.nano()
    assert len(case.requests) == 256
    assert case.num_prompt_tokens == 142_827
    assert case.num_output_tokens == 133_966
    assert case.temperature == 0.6


def test_workloads_are_the_same_every_time() -> None:
    for make in workloads.WORKLOADS.values():
        assert make(3) == make(3)


def test_sizes() -> None:
    assert [len(case.requests) for case in workloads.batch()] == [1, 8, 32, 64, 128, 256]
    assert [len(case.requests) for case in workloads.batch(40)] == [1, 8, 32]
    (case,) = workloads.smollm()
    assert len(case.requests) == 32
    assert all(64 <= len(r.prompt) <= 512 and 32 <= r.max_tokens <= 256 for r in case.requests)
    (case,) = workloads.prefill()
    assert case.num_prompt_tokens == 32 * 2048


def test_a_shared_prefix_is_shared_and_nothing_else() -> None:
    (case,) = workloads.smollm(shared_prefix=384)
    assert len({r.prompt[:384] for r in case.requests}) == 1
    assert len({r.prompt[384:400] for r in case.requests}) == 32


def test_repeats_share_no_prefix() -> None:
    (case,) = workloads.smollm(8)
    starts = [r.prompt[:1] for i in range(3) for r in case.shifted(i * 1009, 500).requests]
    assert all(0 <= token < 500 for (token,) in starts)
    first, second = case.shifted(0, 500), case.shifted(1009, 500)
    assert all(
        a.prompt[0] != b.prompt[0] for a, b in zip(first.requests, second.requests, strict=True)
    )


def test_scaling_keeps_requests() -> None:
    (case,) = workloads.smollm(8, shared_prefix=100)
    small = case.shortened(0.1)
    assert len(small.requests) == 8
    assert small.shared_prefix == 10
    assert len({r.prompt[:10] for r in small.requests}) == 1
    assert len({r.prompt[10:11] for r in small.requests}) > 1
    assert small.num_prompt_tokens == pytest.approx(case.num_prompt_tokens / 10, abs=8)
    assert all(r.max_tokens >= 1 and len(r.prompt) >= 1 for r in case.shortened(1e-4).requests)


@pytest.mark.parametrize("name", list(shapes.SHAPES))
def test_shapes_have_the_published_number_of_parameters(name: str) -> None:
    config = registry.read_config(shapes.find_shape(name))
    embeddings = config.hidden_size * config.vocab_size * (1 if config.tie_word_embeddings else 2)
    millions = (layer_parameters(config) + embeddings) / 1e6
    assert millions == pytest.approx(PARAMETERS[name], rel=0.002)


def test_the_roof_by_hand() -> None:
    """One request of 3 in, 2 out on a model small enough to count."""
    raw = shapes.find_shape("smollm-135m") | {
        "hidden_size": 4, "intermediate_size": 5, "num_hidden_layers": 1, "head_dim": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 10,
    }  # fmt: skip
    model = registry.read_config(raw)
    layers = 4 * 4 + 2 * 4 * 2 + 4 * 4 + 3 * 4 * 5  # q, k and v, o, mlp
    assert layer_parameters(model) == layers
    case = workloads.Case("by hand", (workloads.Request((1, 2, 3), 2),))
    assert work_of(case, model, 256, weight_bytes=2, cache_bytes=2) == Work(
        prefill_bytes=2 * (layers + 40),
        prefill_ops=2 * layers * 3 + 2 * 40 + 4 * 2 * 2 * 9 // 2,
        decode_bytes=2 * (layers + 40) + 2 * 2 * 2 * 4,  # one step over a context of 4
        decode_ops=2 * (layers + 40) + 4 * 2 * 2 * 4,
    )
    narrow = work_of(case, model, 256, weight_bytes=2, cache_bytes=1)
    assert narrow.decode_bytes == 2 * (layers + 40) + 2 * 2 * 1 * 4
    wide = work_of(case, model, 256, weight_bytes=4, cache_bytes=4)
    assert wide.prefill_bytes == 4 * (layers + 40)


def test_a_shared_prefix_is_counted_once() -> None:
    model = registry.read_config(shapes.find_shape("smollm-135m"))
    (case,) = workloads.smollm(2, shared_prefix=384)
    both = work_of(case, model, 256, weight_bytes=2, cache_bytes=2)
    alone = work_of(
        workloads.Case("none", case.requests), model, 256, weight_bytes=2, cache_bytes=2
    )
    uncached = work_of(case, model, 256, weight_bytes=2, cache_bytes=2, prefix_caching=False)
    assert uncached == alone
    assert alone.prefill_ops - both.prefill_ops > 2 * layer_parameters(model) * 384
    assert alone.decode_bytes == both.decode_bytes


def test_seconds_take_the_larger_limit_of_each_phase() -> None:
    assert Work(10, 100, 20, 40).seconds(Ceilings(read=10, matmul=10)) == 10 + 4
    assert Work(10, 100, 20, 40).seconds(Ceilings(read=1, matmul=100)) == 10 + 20


@pytest.mark.parametrize("kind", ["float32", "float8_e4m3fn"])
def test_the_roof_knows_the_cache_of_the_engine(
    kind: str, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ceilings of one byte a second and any number of operations, seconds are bytes."""

    class Engine(LLM):
        @property
        def info(self) -> EngineInfo:
            return replace(super().info, kv_cache_dtype=kind)

    monkeypatch.setattr(offline, "LLM", Engine)
    monkeypatch.setattr(offline, "measure_ceilings", lambda *machine: Ceilings(1.0, 1e30))
    (case,) = workloads.smollm(2, shared_prefix=64)
    case = case.shortened(0.1)
    options = {"model": str(tiny), "dtype": "float32", "enable_prefix_caching": False}
    (result,) = run_cases([case], options, repeats=1).results
    work = work_of(
        case,
        registry.read_config(find_model(str(tiny)).config),
        max_num_seqs=256,
        weight_bytes=4,
        cache_bytes=getattr(torch, kind).itemsize,
        prefix_caching=False,
    )
    assert result.roof == case.num_output_tokens / (work.prefill_bytes + work.decode_bytes)


def test_a_run_reports_everything(cli: Any, tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    line = ("bench", "batch", "first-token", "--num-requests", "2", "--scale", "0.02")
    result = cli(*line, "--repeats", "2", "--model", tiny, "--json", file)
    assert result.status == 0
    assert "batch 1" in result.out
    assert "of roof" in result.out
    report = json.loads(file.read_text())
    assert {"date", "command", "hardware", "versions", "engine", "ceilings"} <= set(report)
    assert [r["case"] for r in report["results"]] == ["batch 1", "first token"]
    first = report["results"][0]
    assert len(first["seconds"]) == 2
    assert first["value"] == pytest.approx(first["num_output_tokens"] * 2 / sum(first["seconds"]))
    assert first["num_cached_tokens"] == 0


def test_a_file_that_cannot_be_written_is_told_before_the_run(
    cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_cases(*arguments: Any, **options: Any) -> None:
        raise AssertionError("it ran")

    monkeypatch.setattr("nanovllm.bench.offline.run_cases", run_cases)
    for name in ("none/out.json", "."):
        result = cli("bench", "--json", tmp_path / name)
        assert result.status == 1
        assert str(tmp_path / name) in result.err
    with pytest.raises(AssertionError, match="it ran"):
        cli("bench", "--json", tmp_path / "out.json")
    assert list(tmp_path.iterdir()) == []


def test_without_a_workload_there_is_a_quick_one(cli: Any, tiny: Path) -> None:
    result = cli("bench", "--model", tiny, "--repeats", "1")
    assert result.status == 0
    assert result.out.splitlines()[-1].startswith("quick")
    assert "quick if none is named" in " ".join(cli("bench", "--help").out.split())


def test_the_quick_workload_fits_a_small_context() -> None:
    (case,) = workloads.quick()
    assert len(case.requests) == 8
    assert max(len(r.prompt) + r.max_tokens for r in case.requests) <= 192
    assert case.num_output_tokens == 8 * 64


def test_cases_with_the_same_prompts_share_no_cache(tiny: Path) -> None:
    case = workloads.Case("same", (workloads.Request(tuple(range(100)), 2),))
    options = {"model": str(tiny), "block_size": 16, "dtype": "float32"}
    report = run_cases([case, case], options, repeats=2)
    assert [result.num_cached_tokens for result in report.results] == [0, 0]


def test_a_shape_needs_no_weights(cli: Any) -> None:
    line = ("bench", "smollm", "--shape", "smollm-135m", "--num-requests", "1", "--scale", "0.01")
    result = cli(*line, "--repeats", "1")
    assert result.status == 0
    assert "out tok/s" in result.out


def test_shape_and_model_exclude_each_other(cli: Any, tiny: Path) -> None:
    result = cli("bench", "nano", "--shape", "qwen3-8b", "--model", tiny)
    assert result.status == 2
    assert "not both" in result.err


def test_what_does_not_fit_is_said_before_it_runs(cli: Any, tiny: Path) -> None:
    result = cli("bench", "nano", "--model", tiny)
    assert result.status == 2
    assert "context of 256" in result.err


def test_a_cold_start_is_measured_in_its_own_process(cli: Any, tiny: Path) -> None:
    result = cli("bench", "cold-start", "--model", tiny, "--repeats", "1")
    assert result.status == 0
    assert "cold start" in result.out


def test_a_failed_cold_start_says_why(cli: Any) -> None:
    result = cli("bench", "cold-start", "--model", "./nowhere", "--repeats", "1")
    assert result.status == 2
    assert "no directory ./nowhere" in result.err


def test_tables_line_up() -> None:
    assert table([("a", "bb"), ("ccc", "d")]) == "a    bb\nccc   d"
