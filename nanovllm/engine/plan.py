"""What crosses between the scheduler and a rank: plans one way, results the other.

Frozen, small, ordered. A plan holds only differences: new rows with their whole state, block ids
appended to a row, rows freed, blocks to copy, and how many tokens each row computes. What every
row of every step needs one of is a tuple: these are made faster.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from nanovllm.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class NewRow:
    """The whole state of a sequence that enters (or re-enters) a row.

    token_ids are all known tokens, of which the first num_computed already have their KV in
    block_ids; num_prompt_tokens separates prompt from output for penalties.
    """

    row: int
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    num_computed: int
    block_ids: tuple[int, ...]
    params: SamplingParams
    seed: int


class RowStep(NamedTuple):
    """Compute num_tokens more tokens of a row; sample one after them if `sample`.

    new_block_ids are appended to the row's block table before the step. replaced_block, if set,
    is (index in the block table, new block id): the copy-on-write of a shared block.
    """

    row: int
    num_tokens: int
    sample: bool
    new_block_ids: tuple[int, ...] = ()
    replaced_block: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step. Order of execution: freed_rows, new_rows, block_copies, then rows.

    block_copies are (source, destination) block ids; all sources are read before any is written.
    A row may begin on slots that an earlier row of the same plan fills, so keys and values are
    stored before any row attends. But nobody reads what a row of a single token stores: where all
    rows have one, each may store and attend at once.
    """

    step_id: int
    rows: tuple[RowStep, ...]
    new_rows: tuple[NewRow, ...] = ()
    freed_rows: tuple[int, ...] = ()
    block_copies: tuple[tuple[int, int], ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(step.num_tokens for step in self.rows)


class TokenLogprobs(NamedTuple):
    """Log-probabilities at one position: the token itself first, then the most likely ones.

    rank is the token's own rank, 1 for the most likely. packed_top are pairs of float64, (token id,
    log-probability), best first: a large batch brings more of them a step than the host has time to
    make objects of, and most are never looked at.
    """

    token_id: int
    logprob: float
    rank: int
    packed_top: bytes = b""

    @property
    def top(self) -> tuple[tuple[int, float], ...]:
        values = memoryview(self.packed_top).cast("d").tolist()
        return tuple(zip(map(int, values[::2]), values[1::2], strict=True))


class RowResult(NamedTuple):
    """What one row of a plan produced.

    token_ids is empty if the row sampled nothing. prompt_logprobs, if they were asked for, are of
    the prompt tokens from position prompt_start on whose predecessors this step computed. error
    ends the row's sequence.
    """

    row: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_start: int = 0
    error: str | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """Results in the order of the plan's rows."""

    step_id: int
    rows: tuple[RowResult, ...]
