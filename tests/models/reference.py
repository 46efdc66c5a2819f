"""What the models must compute, from transformers, and ways to look into an engine."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from nanovllm import LLM, SamplingParams, platforms
from nanovllm.engine.plan import NewRow, RowStep, StepPlan
from nanovllm.layers.ops import TorchOps
from nanovllm.platforms import Choice
from nanovllm.runner.batch import build_batch
from nanovllm.runner.model_runner import ModelRunner

GREEDY = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
BACKENDS = ("default", "torch")


def use_torch_ops(patch: pytest.MonkeyPatch) -> None:
    """Makes engines that are built from now on use the reference operators."""
    patch.setattr(platforms, "choose_ops", lambda device: (TorchOps(), Choice("torch")))


def open_model(directory: Path, backend: str = "default", **options: Any) -> LLM:
    """An engine in float32 on the CPU; "torch" still needs `use_torch_ops`."""
    defaults: dict[str, Any] = {
        "dtype": "float32",
        "device": "cpu",
        "skip_tokenizer_init": True,
        "max_num_seqs": 8,
        "block_size": 8,
        "attention_backend": "torch" if backend == "torch" else "auto",
    }
    return LLM(str(directory), **(defaults | options))


def runner_of(llm: LLM) -> ModelRunner:
    executor: Any = llm._engine.core._executor
    runner: ModelRunner = executor._runner
    return runner


@lru_cache(maxsize=32)
def reference(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation="eager"
    )
    return model.eval()


@torch.inference_mode()
def reference_logits(
    directory: Path, token_ids: list[int], dtype: torch.dtype = torch.float32
) -> Tensor:
    """[len(token_ids), V] float32."""
    logits: Tensor = reference(directory, dtype)(torch.tensor([token_ids])).logits[0]
    return logits.float()


def assert_greedy(directory: Path, prompt: list[int], output: list[int]) -> None:
    """Each token of output is the reference's first choice after what stands before it.

    That is the same as comparing with its greedy generation, in one pass instead of 64.
    """
    logits = reference_logits(directory, [*prompt, *output[:-1]])[len(prompt) - 1 :]
    assert output == logits.argmax(-1).tolist()


def prompts_of(lens: list[int], vocab_size: int = 199, seed: int = 0) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(4, vocab_size, n).tolist() for n in lens]


@torch.inference_mode()
def engine_logits(runner: ModelRunner, prompts: list[list[int]], chunk: int) -> list[Tensor]:
    """Logits of every position of prompts that are computed together, `chunk` tokens a step."""
    size = runner.rows.block_size
    pieces: list[list[Tensor]] = [[] for _ in prompts]
    done = [0] * len(prompts)
    free = iter(range(runner.kv_cache.shape[1]))
    step_id = 0
    while any(n < len(prompt) for n, prompt in zip(done, prompts, strict=True)):
        steps, new_rows = [], []
        for row, prompt in enumerate(prompts):
            count = min(chunk, len(prompt) - done[row])
            if not count:
                continue
            if done[row] == 0:
                blocks = tuple(next(free) for _ in range(-(-len(prompt) // size)))
                params = SamplingParams()
                new_rows.append(NewRow(row, tuple(prompt), len(prompt), 0, blocks, params, 0))
            steps.append(RowStep(row, count, sample=False))
            done[row] += count
        plan = StepPlan(step_id, tuple(steps), tuple(new_rows))
        runner.rows.apply(plan)
        batch = build_batch(plan, runner.rows, runner.device)
        hidden = runner.model.forward(batch.token_ids, batch.attention, runner.kv_cache)
        logits = runner.model.logits(hidden).split([step.num_tokens for step in steps])
        for step, piece in zip(steps, logits, strict=True):
            pieces[step.row].append(piece)
        runner.rows.advance(plan)
        step_id += 1
    return [torch.cat(found) for found in pieces]
