"""Steps that run out of memory go on in pieces, with the same results."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from nanovllm import LLM, SamplingParams
from nanovllm.engine.plan import RowStep, StepPlan
from nanovllm.runner.step_memory import pieces_of

PROMPTS = [[5 + (7 * i * j) % 190 for j in range(n)] for i, n in enumerate((1, 90, 33, 120, 7, 64))]
PARAMS = [
    SamplingParams(
        temperature=0.0 if i % 2 else 0.9,
        seed=i,
        max_tokens=12,
        ignore_eos=True,
        logprobs=1,
        prompt_logprobs=1 if i == 3 else None,
        repetition_penalty=1.2 if i == 1 else 1.0,
    )
    for i in range(len(PROMPTS))
]
OPTIONS = {"skip_tokenizer_init": True, "dtype": "float32", "device": "cpu", "num_kv_blocks": 64}


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    MemoryError("no memory for a step"),
]


def open_limited(
    directory: Any, limit: int | None, error: Exception = ERRORS[0]
) -> tuple[LLM, list[int]]:
    """An engine whose forward pass has room for `limit` tokens, and the sizes it was given."""
    llm = LLM(str(directory), **OPTIONS)
    runner = llm._engine.core._executor._runner  # type: ignore[attr-defined]
    run_model, sizes = runner._run_model, []

    def limited(token_ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        sizes.append(len(token_ids))
        if limit is not None and len(token_ids) > limit:
            raise error
        return run_model(token_ids, *rest)

    runner._run_model = limited
    return llm, sizes


def answers(llm: LLM) -> list[Any]:
    outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    return [(o.token_ids, o.logprobs, o.prompt_logprobs, o.finish_reason) for o in outputs]


@pytest.mark.parametrize(("limit", "error"), list(zip([200, 60, 16], ERRORS, strict=True)))
def test_same_answers_in_pieces_and_one_line_about_it(
    limit: int, error: Exception, models: Any, caplog: pytest.LogCaptureFixture
) -> None:
    llm, _ = open_limited(models("qwen3"), None)
    with llm:
        want = answers(llm)
    llm, sizes = open_limited(models("qwen3"), limit, error)
    with llm, caplog.at_level(logging.WARNING, "nanovllm"):
        assert answers(llm) == want
        lines = [
            record.message for record in caplog.records if "ran out of memory" in record.message
        ]
        assert len(lines) == 1
        tries = len([size for size in sizes if size > limit])
        assert tries >= 1
        assert answers(llm) == want
    assert len([size for size in sizes if size > limit]) == tries  # it does not try again
    assert len([r for r in caplog.records if "ran out of memory" in r.message]) == 1


def test_what_never_fits_ends_its_requests_and_not_the_engine(models: Any) -> None:
    llm, _ = open_limited(models("qwen3"), 0)
    with llm:
        output = llm.generate([PROMPTS[1]], PARAMS[1:2], use_tqdm=False)[0]
        assert output.finish_reason == "error"
        assert "OutOfMemoryError" in output.outputs[0].error


def test_other_errors_are_not_tried_again(models: Any) -> None:
    llm, sizes = open_limited(models("qwen3"), 0, RuntimeError("a kernel is broken"))
    with llm:
        output = llm.generate([PROMPTS[1]], PARAMS[1:2], use_tqdm=False)[0]
    assert "a kernel is broken" in output.outputs[0].error
    assert sizes == [len(PROMPTS[1]), 1]  # and the step that was planned ahead


@pytest.mark.parametrize("size", [1, 7, 16, 100, 1000])
def test_pieces_hold_every_token_once_and_sample_last(size: int) -> None:
    rows = (RowStep(3, 1, True), RowStep(0, 40, False), RowStep(5, 33, True), RowStep(1, 1, True))
    pieces = list(pieces_of(StepPlan(9, rows), size))
    assert all(piece.step_id == 9 and piece.num_tokens <= size for piece in pieces)
    assert all(piece.num_tokens == size for piece in pieces[:-1])
    for step in rows:
        parts = [part for piece in pieces for part in piece.rows if part.row == step.row]
        assert sum(part.num_tokens for part in parts) == step.num_tokens
        assert [part.sample for part in parts] == [False] * (len(parts) - 1) + [step.sample]
