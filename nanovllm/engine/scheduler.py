"""Decides what each step computes.

One loop, no phases: every step has a budget of tokens, and a sequence is given as many of its
uncomputed tokens as fit. Sequences that need a single token come first, so that a long prompt
delays nobody who is already streaming; then the rest of the running ones, then waiting ones in
the order of (priority, arrival). When blocks run out, the newest sequence of the lowest priority
is preempted: it gives back everything and is recomputed later, mostly from the prefix cache.

Plans may be made ahead of results: a sampled token that the host does not know yet is pending,
and only its existence matters here. Knows no tensors and no text.
"""

from __future__ import annotations

import heapq
import time
from bisect import insort
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.plan import (
    NewRow,
    RowResult,
    RowStep,
    StepPlan,
    StepResult,
    TokenLogprobs,
)
from nanovllm.engine.sequence import Sequence, Status
from nanovllm.errors import ContextLengthError, InvalidRequestError
from nanovllm.trace.events import (
    NullTracer,
    SequenceAdmitted,
    SequenceFinished,
    SequencePreempted,
    StepDone,
    StepPlanned,
    Tracer,
)


class SequenceUpdate(NamedTuple):
    """What one step's result meant for one sequence; finish_reason and error end it."""

    seq: Sequence
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_start: int = 0
    finish_reason: str | None = None
    stop_token_id: int | None = None
    error: str | None = None


@dataclass(slots=True)
class _Draft:
    """A plan while it is being made."""

    budget: int
    rows: list[RowStep] = field(default_factory=list)
    planned: dict[Sequence, int] = field(default_factory=dict)  # tokens of each, as in rows
    new_rows: list[NewRow] = field(default_factory=list)
    block_copies: list[tuple[int, int]] = field(default_factory=list)
    preempted: bool = False

    def num_tokens_of(self, seq: Sequence) -> int:
        """Tokens that this step computes of seq; they cannot be copied in the same step."""
        return self.planned.get(seq, 0)


class Scheduler:
    """Sequences in, plans out, results in, updates out."""

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        eos_token_ids: frozenset[int] = frozenset(),
        tracer: Tracer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        assert max_num_batched_tokens >= max_num_seqs, "a step must be able to decode every row"
        self.blocks = blocks
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.eos_token_ids = eos_token_ids
        self.running: list[Sequence] = []  # in order of admission
        self.waiting: list[Sequence] = []  # sorted by `_order`
        self._tracer = tracer or NullTracer()
        self._clock = clock
        self._free_rows = list(range(max_num_seqs))  # a heap: the lowest row is taken first
        self._freed_rows: list[int] = []  # since the last plan
        self._in_flight: deque[tuple[StepPlan, list[Sequence]]] = deque()
        self._num_plans = 0

    # --- requests ---------------------------------------------------------------------------

    def add(self, seq: Sequence) -> None:
        """Queues seq. Raises InvalidRequestError if it could never run here."""
        self.check(seq.num_prompt_tokens)
        seq.max_tokens = self._limit(seq)
        insort(self.waiting, seq, key=_order)

    def check(self, num_prompt_tokens: int) -> None:
        """Raises InvalidRequestError unless a prompt of this length can run here."""
        if num_prompt_tokens < 1:
            raise InvalidRequestError("the prompt is empty: at least one token is needed")
        capacity = self.blocks.num_blocks * self.blocks.block_size
        limit = min(self.max_model_len, capacity)
        if num_prompt_tokens >= limit:
            raise ContextLengthError(
                f"This model's maximum context length is {limit} tokens, but the prompt has "
                f"{num_prompt_tokens}; at most {limit - 1} leave room for an answer"
            )

    def finish(self, seq: Sequence, reason: str, *, discard: bool = False) -> None:
        """Ends seq now: row and blocks are free for the next plan. No-op if it has ended."""
        if seq.status is Status.FINISHED:
            return
        if seq.status is Status.RUNNING:
            self.running.remove(seq)
            self._give_back(seq, discard)
        else:
            self.waiting.remove(seq)
        seq.status = Status.FINISHED
        seq.finish_reason = reason
        now = seq.stats.finished = self._clock()
        self._tracer.emit(
            SequenceFinished(
                now,
                seq.request_id,
                seq.index,
                reason,
                seq.num_prompt_tokens,
                seq.num_output_tokens,
            )
        )

    # --- planning ---------------------------------------------------------------------------

    def schedule(self) -> StepPlan | None:
        """The next step, or None if nothing can be computed before a result arrives."""
        draft = _Draft(self.max_num_batched_tokens)
        single: list[Sequence] = []
        longer: list[Sequence] = []
        for seq in self.running:
            if (need := self._need(seq)) > 0:
                (single if need == 1 else longer).append(seq)
        self._continue_all(single, draft)
        # A fork needs a single token too: a long prompt that overtook it must not delay it.
        self._admit_waiting(draft, forks_only=True)
        self._continue_all(longer, draft)
        self._admit_waiting(draft)
        return self._emit(draft) if draft.rows else None

    def _need(self, seq: Sequence) -> int:
        """Tokens of seq that could be computed now; 0 if all that may exist do."""
        num_tokens = len(seq.token_ids) + seq.num_pending
        return 0 if num_tokens >= seq.max_tokens else num_tokens - seq.num_computed

    def _limit(self, seq: Sequence) -> int:
        """Tokens, the prompt's included, after which seq ends."""
        limit = min(self.max_model_len, self.blocks.num_blocks * self.blocks.block_size)
        if seq.params.max_tokens is None:
            return limit
        return min(limit, seq.num_prompt_tokens + seq.params.max_tokens)

    def _continue_all(self, sequences: list[Sequence], draft: _Draft) -> None:
        for seq in sequences:
            if seq.status is Status.RUNNING and draft.budget:
                self._continue(seq, draft)

    def _continue(self, seq: Sequence, draft: _Draft) -> None:
        num_tokens = min(self._need(seq), draft.budget)
        while (reserved := self.blocks.reserve(seq, seq.num_computed + num_tokens)) is None:
            # Never one that this very step computes for; seq itself is always a candidate.
            victim = max((s for s in self.running if s not in draft.planned), key=_order)
            self._preempt(victim)
            draft.preempted = True
            if victim is seq:
                return
        if reserved.copy is not None:
            draft.block_copies.append(reserved.copy)
        self._plan_row(seq, num_tokens, draft, reserved.new_block_ids, reserved.replaced_block)

    def _plan_row(
        self,
        seq: Sequence,
        num_tokens: int,
        draft: _Draft,
        new_block_ids: tuple[int, ...] = (),
        replaced_block: tuple[int, int] | None = None,
    ) -> None:
        assert seq.row is not None
        seq.num_computed += num_tokens
        draft.budget -= num_tokens
        sample = seq.num_computed == seq.num_tokens
        seq.num_pending += sample
        draft.rows.append(RowStep(seq.row, num_tokens, sample, new_block_ids, replaced_block))
        draft.planned[seq] = num_tokens
        if num_tokens > 1:  # a single token's block is offered with its result: see StepPlan
            self.blocks.register(seq)

    def _admit_waiting(self, draft: _Draft, *, forks_only: bool = False) -> None:
        """First come, first served: nobody overtakes the head of the queue.

        But for forks whose prompt is being computed: others go ahead meanwhile, and leave a row
        and a block to each of them.
        """
        held = 0
        while not draft.preempted and draft.budget and held < len(self._free_rows):
            seq = self.waiting[held] if held < len(self.waiting) else None
            if seq is None or seq.num_pending:
                break
            parent = _running_parent(seq)
            if parent is not None and not _can_fork(parent, seq, draft):
                held += 1
            elif (forks_only and parent is None) or not self._admit(seq, draft, held):
                break

    def _admit(self, seq: Sequence, draft: _Draft, num_kept: int = 0) -> bool:
        """Gives seq a row, cached blocks, and its first tokens of this step, if all fit."""
        parent = _running_parent(seq)
        if parent is not None:
            self.blocks.fork(parent, seq, seq.num_prompt_tokens - 1)
        else:
            prefix = self.blocks.find_prefix(seq)
            if not self.blocks.can_admit(seq, prefix, num_kept):
                return False
            self.blocks.share(seq, prefix)
            seq.num_computed = len(prefix) * self.blocks.block_size
        num_cached = seq.num_computed
        num_tokens = min(seq.num_tokens - num_cached, draft.budget)
        reserved = self.blocks.reserve(seq, num_cached + num_tokens)
        if reserved is None:
            self.blocks.free(seq)
            seq.num_computed = 0
            return False
        if reserved.copy is not None:
            draft.block_copies.append(reserved.copy)
        self._start(seq, num_cached, draft)
        self._plan_row(seq, num_tokens, draft)
        return True

    def _start(self, seq: Sequence, num_cached: int, draft: _Draft) -> None:
        self.waiting.remove(seq)
        self.running.append(seq)
        seq.status = Status.RUNNING
        seq.fork_of = None
        seq.row = heapq.heappop(self._free_rows)
        now = self._clock()
        if seq.stats.first_scheduled is None:
            seq.stats.first_scheduled = now
            seq.stats.num_cached_tokens = num_cached
        draft.new_rows.append(
            NewRow(
                seq.row,
                tuple(seq.token_ids),
                seq.num_prompt_tokens,
                num_cached,
                tuple(seq.block_table),
                seq.params,
                seq.seed,
            )
        )
        self._tracer.emit(
            SequenceAdmitted(now, seq.request_id, seq.index, seq.num_tokens, num_cached)
        )

    def _preempt(self, seq: Sequence) -> None:
        """Takes everything from seq but its tokens, and queues it again."""
        self._tracer.emit(
            SequencePreempted(self._clock(), seq.request_id, seq.index, seq.num_computed)
        )
        self.running.remove(seq)
        self._give_back(seq, discard=False)
        seq.num_computed = 0
        seq.status = Status.WAITING
        seq.stats.num_preemptions += 1
        insort(self.waiting, seq, key=_order)

    def _give_back(self, seq: Sequence, discard: bool) -> None:
        assert seq.row is not None
        self.blocks.free(seq, discard)
        heapq.heappush(self._free_rows, seq.row)
        self._freed_rows.append(seq.row)
        seq.row = None

    def _emit(self, draft: _Draft) -> StepPlan:
        plan = StepPlan(
            self._num_plans,
            tuple(draft.rows),
            tuple(draft.new_rows),
            tuple(self._freed_rows),
            tuple(draft.block_copies),
        )
        self._num_plans += 1
        self._freed_rows.clear()
        self._in_flight.append((plan, list(draft.planned)))
        self._tracer.emit(
            StepPlanned(
                self._clock(),
                plan.step_id,
                len(plan.rows),
                plan.num_tokens,
                len(self.running),
                len(self.waiting),
                self.blocks.num_free,
            )
        )
        return plan

    # --- results ----------------------------------------------------------------------------

    def update(self, result: StepResult) -> list[SequenceUpdate]:
        """Applies the result of the oldest plan in flight."""
        plan, sequences = self._in_flight.popleft()
        assert plan.step_id == result.step_id, "results must come in the order of the plans"
        updates = []
        for step, seq, row in zip(plan.rows, sequences, result.rows, strict=True):
            seq.num_pending -= step.sample
            if seq.status is not Status.FINISHED:  # else the row was computed in vain
                updates.append(self._apply(seq, row))
        self._tracer.emit(
            StepDone(self._clock(), plan.step_id, sum(len(row.token_ids) for row in result.rows))
        )
        return updates

    def fail_step(self, error: str) -> list[SequenceUpdate]:
        """Ends every sequence of the oldest plan in flight; forgets all cached content.

        Sequences that a later plan in flight started on shared blocks end too: the blocks may be
        ones that this step should have filled.
        """
        plan, sequences = self._in_flight.popleft()
        for step, seq in zip(plan.rows, sequences, strict=True):
            seq.num_pending -= step.sample
        failed = [*sequences, *self._started_on_shared_blocks()]
        updates = []
        for seq in failed:
            if seq.status is not Status.FINISHED:
                self.finish(seq, "error")
                updates.append(SequenceUpdate(seq, finish_reason="error", error=error))
        self.blocks.reset_prefix_cache()
        return updates

    def _started_on_shared_blocks(self) -> Iterator[Sequence]:
        """Sequences that the plans in flight started on blocks which others computed."""
        for plan, sequences in self._in_flight:
            rows = {new.row for new in plan.new_rows if new.num_computed}
            for step, seq in zip(plan.rows, sequences, strict=True):
                if step.row in rows:
                    yield seq

    def _apply(self, seq: Sequence, row: RowResult) -> SequenceUpdate:
        if row.error is not None:
            self.finish(seq, "error", discard=True)
            return SequenceUpdate(seq, finish_reason="error", error=row.error)
        self.blocks.register(seq)
        reason = stop_id = None
        for token_id in row.token_ids:
            seq.token_ids.append(token_id)
            if seq.stats.first_token is None:
                seq.stats.first_token = self._clock()
            reason, stop_id = self._ends(seq, token_id)
            if reason is not None:
                self.finish(seq, reason)
                break
        return SequenceUpdate(
            seq,
            row.token_ids,
            row.logprobs,
            row.prompt_logprobs,
            row.prompt_start,
            reason,
            stop_id,
        )

    def _ends(self, seq: Sequence, token_id: int) -> tuple[str | None, int | None]:
        params = seq.params
        assert isinstance(params.stop_token_ids, tuple)
        enough = seq.num_output_tokens >= params.min_tokens
        # A form that is complete ends the text even before min_tokens.
        may_end = enough or params.structured_output is not None
        if may_end and not params.ignore_eos and token_id in self.eos_token_ids:
            return "stop", None
        if enough and token_id in params.stop_token_ids:
            return "stop", token_id
        if len(seq.token_ids) >= seq.max_tokens:
            return "length", None
        return None, None

    def check_integrity(self) -> None:
        """Raises AssertionError unless scheduler and block manager agree with each other."""
        self.blocks.check_integrity(self.running)
        rows = [seq.row for seq in self.running]
        assert None not in rows, "a running sequence has no row"
        assert len(set(rows)) == len(rows), "two sequences share a row"
        assert not set(rows) & set(self._free_rows), "a used row is in the free list"
        for seq in self.waiting:
            assert not seq.block_table, f"{seq} waits and owns blocks"
            assert seq.row is None, f"{seq} waits and owns a row"


def _order(seq: Sequence) -> tuple[int, int]:
    return seq.priority, seq.seq_id


def _running_parent(seq: Sequence) -> Sequence | None:
    """The sequence whose prompt blocks seq is going to share, while it runs."""
    parent = seq.fork_of
    return parent if parent is not None and parent.status is Status.RUNNING else None


def _can_fork(parent: Sequence, seq: Sequence, draft: _Draft) -> bool:
    """Whether an earlier step computed all that seq shares: a step copies before it computes."""
    return parent.num_computed - draft.num_tokens_of(parent) >= seq.num_prompt_tokens - 1
