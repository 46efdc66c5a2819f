"""Every family computes what transformers computes, through the kernels and through plain torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import (
    BACKENDS,
    GREEDY,
    assert_greedy,
    engine_logits,
    open_model,
    prompts_of,
    reference_logits,
    runner_of,
    use_torch_ops,
)
from tiny_models import FAMILIES

from nanovllm import LLM

TOLERANCE = 1e-4
# bfloat16 keeps 8 bits: products of a few layers may differ by some of the last ones. Measured
# against the float32 logits, our error may not be much larger than that of transformers itself.
BF16_FACTOR = 1.5
LENS = [1, 2, 9, 33, 70, 40]
CHUNKS = [1, 7, 32, 100]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        use_torch_ops(monkeypatch)
    return str(request.param)


@pytest.fixture(params=FAMILIES)
def directory(request: pytest.FixtureRequest, models: Any) -> Path:
    path: Path = models(request.param)
    return path


@pytest.fixture
def llm(directory: Path, backend: str) -> Iterator[LLM]:
    with open_model(directory, backend) as llm:
        runner_of(llm).kv_cache.fill_(float("nan"))  # unused slots must not matter
        yield llm


def test_logits_of_every_position(llm: LLM, directory: Path) -> None:
    prompts = prompts_of(LENS)
    for chunk in CHUNKS:
        found = engine_logits(runner_of(llm), prompts, chunk)
        for prompt, logits in zip(prompts, found, strict=True):
            expected = reference_logits(directory, prompt)
            torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)


def test_greedy_tokens_of_unequal_prompts(llm: LLM, directory: Path, backend: str) -> None:
    assert llm.info.choices["attention"].name == ("torch" if backend == "torch" else "cpu")
    prompts = prompts_of(LENS)
    for prompt, output in zip(prompts, llm.generate(prompts, GREEDY, use_tqdm=False), strict=True):
        assert len(output.token_ids) == 64
        assert_greedy(directory, prompt, output.token_ids)


@pytest.mark.parametrize("family", ["qwen3", "llama3", "mistral"])
def test_bfloat16_is_no_worse_than_transformers(family: str, models: Any, backend: str) -> None:
    directory = models(family)
    prompt = prompts_of([70])[0]
    exact = reference_logits(directory, prompt)
    theirs = reference_logits(directory, prompt, torch.bfloat16)
    with open_model(directory, backend, dtype="bfloat16") as llm:
        ours = engine_logits(runner_of(llm), [prompt], 100)[0]
    error, allowed = (ours - exact).abs().mean(), (theirs - exact).abs().mean()
    assert error <= BF16_FACTOR * allowed
    assert (ours - exact).abs().max() <= BF16_FACTOR * (theirs - exact).abs().max()
