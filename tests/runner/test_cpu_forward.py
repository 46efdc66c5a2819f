"""The forward pass in one C++ call: the same bits as the operators one by one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent / "models"))
from reference import open_model, runner_of
from tiny_models import FAMILIES

from nanovllm.attention.base import AttentionBatch
from nanovllm.runner.cpu_forward import NO_MEMORY, CpuForward

SIZE = 8
STEPS = [[40, 3, 17], [1, 1, 1], [20, 1, 1], [1, 1, 1]]  # new tokens of three sequences


def batch_of(lens: list[int], seen: list[int], tables: torch.Tensor) -> AttentionBatch:
    positions = torch.cat([torch.arange(s, s + n) for s, n in zip(seen, lens, strict=True)])
    rows = torch.repeat_interleave(torch.arange(len(lens)), torch.tensor(lens))
    contexts = [s + n for s, n in zip(seen, lens, strict=True)]
    return AttentionBatch(
        cu_q_lens=torch.tensor([0, *lens]).cumsum(0).int(),
        context_lens=torch.tensor(contexts).int(),
        block_tables=tables,
        slot_mapping=tables[rows, positions // SIZE].long() * SIZE + positions % SIZE,
        positions=positions,
        max_q_len=max(lens),
        max_context_len=max(contexts),
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_bits_as_operator_by_operator(family: str, dtype: str, models: Any) -> None:
    with open_model(models(family), dtype=dtype) as llm:
        runner = runner_of(llm)
        model, caches = runner.model, [torch.full_like(runner.kv_cache, -1.0) for _ in range(2)]
        assert isinstance(runner._run_model, CpuForward)
        forward = CpuForward(model, caches[0])
        tables = torch.randperm(36, generator=torch.Generator().manual_seed(1)).view(3, 12).int()
        seen = [0, 0, 0]
        for number, lens in enumerate(STEPS):
            generator = torch.Generator().manual_seed(number)
            ids = torch.randint(0, 199, (sum(lens),), generator=generator)
            batch = batch_of(lens, seen, tables)
            expected = model.forward(ids, batch, caches[1])
            assert torch.equal(forward(ids, batch), expected)
            assert expected.isfinite().all()
            assert torch.equal(*caches)
            seen = [s + n for s, n in zip(seen, lens, strict=True)]


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("ids", "token id outside the vocabulary"),
        ("positions", "position outside the context"),
        ("slot_mapping", "slot outside the KV cache"),
        ("block_tables", "block outside the KV cache"),
    ],
)
def test_what_is_out_of_range_is_refused(what: str, words: str, models: Any) -> None:
    with open_model(models("llama")) as llm:
        runner = runner_of(llm)
        forward = CpuForward(runner.model, runner.kv_cache)
        ids, batch = torch.tensor([5, 6]), batch_of([2], [0], torch.tensor([[3]]).int())
        assert forward(ids, batch).isfinite().all()
        wrong = ids if what == "ids" else getattr(batch, what)
        wrong[..., -1] = 10**6
        with pytest.raises(ValueError, match=words):
            forward(ids, batch)


def test_too_little_memory_is_an_error_that_the_engine_knows(models: Any) -> None:
    with open_model(models("llama")) as llm:
        runner = runner_of(llm)
        forward = CpuForward(runner.model, runner.kv_cache)
        forward._call = lambda *_: NO_MEMORY
        with pytest.raises(MemoryError, match="a step of 2 tokens"):
            forward(torch.tensor([5, 6]), batch_of([2], [0], torch.tensor([[3]]).int()))


def test_other_operators_keep_the_general_way(models: Any) -> None:
    with open_model(models("llama"), attention_backend="torch") as llm:
        assert not CpuForward.fits(runner_of(llm).model)
