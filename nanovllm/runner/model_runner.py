"""Executes plans on one device: rows, batch, forward pass, sampling.

A plan is executed without waiting for its result: what it sampled stays on the device as the next
plan's input, and `PendingResult.wait` fetches it for the host. Knows no sequences and no queues.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from nanovllm.attention.base import AttentionBatch
from nanovllm.engine.plan import RowResult, StepPlan, StepResult, TokenLogprobs
from nanovllm.models.decoder import Decoder
from nanovllm.runner.batch import Batch, build_batch
from nanovllm.runner.constraints import ConstraintFactory, Masks, RowConstraints
from nanovllm.runner.rows import RowState
from nanovllm.runner.sampler import BadWords, Sampled, Sampler, token_logprobs
from nanovllm.runner.step_memory import Pending, StepMemory

# Logits of a long prompt are made in pieces, so that they never dominate memory.
PROMPT_LOGPROB_ROWS = 128


@dataclass(slots=True)
class PendingResult:
    """A step that was launched; `wait` blocks until its tokens are on the host."""

    plan: StepPlan
    sampled: Sampled | None
    prompt_logprobs: dict[int, tuple[int, tuple[TokenLogprobs, ...]]]  # row -> (start, entries)

    def wait(self) -> StepResult:
        tokens = self.sampled.token_ids.tolist() if self.sampled else []
        errors = self.sampled.reasons() if self.sampled else {}
        results, index = [], 0
        for step in self.plan.rows:
            start, prompt = self.prompt_logprobs.get(step.row, (0, ()))
            if not step.sample:
                results.append(RowResult(step.row, prompt_logprobs=prompt, prompt_start=start))
                continue
            assert self.sampled is not None
            logprobs = self.sampled.logprobs.get(index)
            results.append(
                RowResult(
                    step.row,
                    () if index in errors else (tokens[index],),
                    () if logprobs is None else (logprobs,),
                    prompt,
                    start,
                    errors.get(index),
                )
            )
            index += 1
        return StepResult(self.plan.step_id, tuple(results))


Forward = Callable[[Tensor, AttentionBatch], Tensor]  # token ids [T] -> hidden [T, hidden]


def by_operators(model: Decoder, kv_cache: Tensor) -> Forward:
    """The model's own forward pass."""
    return lambda token_ids, batch: model.forward(token_ids, batch, kv_cache)


class ModelRunner:
    """One model on one device, with its KV cache [layers, blocks, 2, G, slots, D]."""

    def __init__(
        self,
        model: Decoder,
        *,
        device: torch.device,
        dtype: torch.dtype,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_model_len: int,
        stop_ids: tuple[int, ...] = (),
        bad_words: BadWords | None = None,
        constraints: ConstraintFactory | None = None,
        step_scope: Callable[[], AbstractContextManager[None]] = nullcontext,
        make_forward: Callable[[Decoder, Tensor], Forward] = by_operators,
    ) -> None:
        c = model.config
        self.model = model
        self.device = device
        self._step_scope = step_scope  # entered around the computation of every step
        # Not zeroed: unused slots are never read, and untouched pages cost nothing on a CPU.
        self.kv_cache = torch.empty(
            (c.num_layers, num_blocks, 2, c.num_kv_heads, block_size, c.head_dim),
            dtype=dtype,
            device=device,
        )
        self._run_model = make_forward(model, self.kv_cache)
        self.rows = RowState(max_num_seqs, max_model_len, block_size, device)
        self._memory = StepMemory(self.rows)
        self._sampler = Sampler(self.rows, stop_ids, bad_words or BadWords())
        self._constraints = RowConstraints(constraints, c.vocab_size)

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> Pending:
        """Runs one plan; plans must come in the order in which the scheduler made them."""
        with self._step_scope():
            self.rows.apply(plan)
            self._constraints.apply(plan)
            try:
                self._copy_blocks(plan)
                return self._memory.run(plan, self._compute)
            finally:
                self.rows.advance(plan)

    def _compute(self, plan: StepPlan) -> Pending:
        """The plan's rows; a step that ran out of memory computes them in several such plans."""
        batch = build_batch(plan, self.rows, self.device)
        masks = self._constraints.begin(batch.sample_rows, self.rows.num_tokens, self._tokens_of)
        hidden = self._run_model(batch.token_ids, batch.attention)
        prompt_logprobs = dict(self._prompt_logprobs(plan, hidden))
        sampled = self._sample(batch, hidden, masks)
        return PendingResult(plan, sampled, prompt_logprobs)

    def _copy_blocks(self, plan: StepPlan) -> None:
        if plan.block_copies:
            sources, targets = zip(*plan.block_copies, strict=True)
            self.kv_cache[:, list(targets)] = self.kv_cache[:, list(sources)]

    def _tokens_of(self, row: int, start: int, stop: int) -> list[int]:
        return self.rows.tokens[row, start:stop].tolist()

    def _sample(self, batch: Batch, hidden: Tensor, masks: Future[Masks] | None) -> Sampled | None:
        rows = batch.sample_rows
        if not len(rows):
            return None
        logits = self.model.logits(hidden[batch.sample_positions])
        sampled = self._sampler.sample(logits, rows, masks)
        on_device = torch.from_numpy(rows).to(self.device)
        positions = torch.from_numpy(self.rows.num_tokens[rows]).to(self.device)
        ends = positions < self.rows.tokens.shape[1]  # the context's last token has no slot
        self.rows.tokens[on_device[ends], positions[ends]] = sampled.token_ids[ends].int()
        return sampled

    def _prompt_logprobs(
        self, plan: StepPlan, hidden: Tensor
    ) -> Iterator[tuple[int, tuple[int, tuple[TokenLogprobs, ...]]]]:
        """(row, (position of the first entry, entries)) for the rows that asked."""
        begin = 0
        for step in plan.rows:
            params = self.rows.params[step.row]
            start = int(self.rows.num_computed[step.row]) + 1
            stop = min(start + step.num_tokens, int(self.rows.num_prompt[step.row]))
            if params is not None and params.prompt_logprobs is not None and start < stop:
                rows = hidden[begin : begin + stop - start]
                targets = self.rows.tokens[step.row, start:stop].long()
                entries = self._logprobs_of(rows, targets, params.prompt_logprobs)
                yield step.row, (start, tuple(entries))
            begin += step.num_tokens

    def _logprobs_of(self, hidden: Tensor, targets: Tensor, count: int) -> list[TokenLogprobs]:
        found: list[TokenLogprobs] = []
        for i in range(0, len(targets), PROMPT_LOGPROB_ROWS):
            logits = self.model.logits(hidden[i : i + PROMPT_LOGPROB_ROWS])
            piece = targets[i : i + PROMPT_LOGPROB_ROWS]
            found += token_logprobs(logits, piece, [count] * len(piece))
        return found
