"""A step that does not fit in memory is computed in pieces instead of failing.

A plan's rows are cut into smaller plans whose results are put together again. Computing a token
twice is harmless: it writes the same keys and values into the same slots. Knows plans and rows;
what a step allocates is not its business.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from nanovllm.engine.plan import RowResult, RowStep, StepPlan, StepResult
from nanovllm.runner.rows import RowState

logger = logging.getLogger("nanovllm")

MIN_TOKENS = 16  # a step that fails with fewer fails for good


class Pending(Protocol):
    def wait(self) -> StepResult: ...


@dataclass(frozen=True, slots=True)
class Done:
    """A step whose result is known."""

    result: StepResult

    def wait(self) -> StepResult:
        return self.result


class StepMemory:
    """Runs the computation of plans; remembers how many tokens at once fit."""

    def __init__(self, rows: RowState) -> None:
        self._rows = rows
        self.max_tokens: int | None = None  # None: no step has failed yet

    def run(self, plan: StepPlan, compute: Callable[[StepPlan], Pending]) -> Pending:
        """compute(plan), or its pieces one after another if that runs out of memory.

        compute takes rows from where `rows` says they are; advancing them is the caller's work.
        """
        size = plan.num_tokens
        if self.max_tokens is None or size <= self.max_tokens:
            try:
                return compute(plan)
            except (RuntimeError, MemoryError) as error:
                if size <= MIN_TOKENS or not _ran_out(error):
                    raise
        # The failed step's tensors are gone only now that its exception is.
        return self._shrink(plan, compute)

    def _shrink(self, plan: StepPlan, compute: Callable[[StepPlan], Pending]) -> Pending:
        size = min(self.max_tokens or plan.num_tokens, plan.num_tokens)
        failed = self.max_tokens is None or plan.num_tokens <= self.max_tokens
        while True:
            if failed:
                size = max(MIN_TOKENS, size // 2)
                _release_cached_memory()
            try:
                result = self._in_pieces(plan, size, compute)
                break
            except (RuntimeError, MemoryError) as error:
                if size <= MIN_TOKENS or not _ran_out(error):
                    raise
                failed = True
        if failed:
            logger.warning(
                f"a step of {plan.num_tokens} tokens ran out of memory: from now on {size} at most "
                "are computed at once; a smaller max_num_batched_tokens or max_num_seqs, or a "
                "lower gpu_memory_utilization would leave room"
            )
            self.max_tokens = size
        return Done(result)

    def _in_pieces(
        self, plan: StepPlan, size: int, compute: Callable[[StepPlan], Pending]
    ) -> StepResult:
        computed, tokens = self._rows.num_computed.copy(), self._rows.num_tokens.copy()
        results = []
        try:
            for piece in pieces_of(plan, size):
                results.append(compute(piece).wait())
                self._rows.advance(piece)
        finally:
            self._rows.num_computed[:], self._rows.num_tokens[:] = computed, tokens
        return joined(plan, results)


def pieces_of(plan: StepPlan, size: int) -> Iterator[StepPlan]:
    """The plan's rows in order, at most `size` tokens a piece; a row samples in its last piece."""
    rows: list[RowStep] = []
    room = size
    for step in plan.rows:
        left = step.num_tokens
        while left:
            count = min(left, room)
            left -= count
            rows.append(RowStep(step.row, count, step.sample and not left))
            room -= count
            if not room:
                yield StepPlan(plan.step_id, tuple(rows))
                rows, room = [], size
    if rows:
        yield StepPlan(plan.step_id, tuple(rows))


def joined(plan: StepPlan, results: list[StepResult]) -> StepResult:
    """One result a row of the plan, from those of its pieces in order."""
    found: dict[int, RowResult] = {}
    for part in (row for result in results for row in result.rows):
        before = found.get(part.row)
        if before is None:
            found[part.row] = part
            continue
        prompt = before.prompt_logprobs + part.prompt_logprobs
        start = before.prompt_start if before.prompt_logprobs else part.prompt_start
        error = before.error or part.error
        found[part.row] = part._replace(prompt_logprobs=prompt, prompt_start=start, error=error)
    return StepResult(plan.step_id, tuple(found[step.row] for step in plan.rows))


def _ran_out(error: Exception) -> bool:
    """Whether memory was lacking: torch has a class for it on a GPU, and only words on a CPU."""
    classes = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, classes) or "can't allocate memory" in str(error)


def _release_cached_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
