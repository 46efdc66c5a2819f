"""Scheduler and engine core, one rule at a time, with an executor that simulates the KV cache."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from simulated_kv import EOS, SimulatedKV, answer

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.core import EngineCore
from nanovllm.engine.plan import RowResult, StepPlan, StepResult
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence, SequenceStats, Status
from nanovllm.errors import ContextLengthError, EngineClosedError, InvalidRequestError
from nanovllm.sampling_params import SamplingParams
from nanovllm.trace.events import ListTracer, SequenceAdmitted, SequencePreempted

ENDLESS = SamplingParams(ignore_eos=True, max_tokens=None)


class Engine:
    """A core over a simulated device, and the plans that it made."""

    def __init__(
        self,
        *,
        num_blocks: int = 32,
        block_size: int = 4,
        max_num_seqs: int = 4,
        budget: int = 16,
        max_model_len: int = 64,
        depth: int = 1,
        caching: bool = True,
    ) -> None:
        ticks = itertools.count()
        self.tracer = ListTracer()
        self.kv = SimulatedKV(num_blocks, block_size, max_num_seqs, budget)
        self.blocks = BlockManager(num_blocks, block_size, caching)
        self.scheduler = Scheduler(
            self.blocks,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_model_len=max_model_len,
            eos_token_ids=frozenset([EOS]),
            tracer=self.tracer,
            clock=lambda: float(next(ticks)),
        )
        clock = self.scheduler._clock
        self.core = EngineCore(self.scheduler, self.kv, vocab_size=3, depth=depth, clock=clock)

    def add(self, name: str, length: int, params: SamplingParams = ENDLESS, **options: Any) -> Any:
        prompt = [1 + (i * i + ord(name[0])) % 2 for i in range(length)]
        group = self.core.add(name, prompt, params, **options)
        self.kv.know(group)
        return group[0] if params.n == 1 else group

    def step(self) -> StepPlan:
        """One step; the plan whose result came back."""
        self.core.step()
        self.scheduler.check_integrity()
        assert not self.kv.delivered[-1].wrong
        return self.kv.delivered[-1].plan

    def finish(self) -> None:
        while not self.core.is_finished:
            self.step()
        assert self.blocks.num_used == 0


def tokens(plan: StepPlan) -> list[tuple[int, int]]:
    return [(step.row, step.num_tokens) for step in plan.rows]


def test_long_prompts_go_in_chunks_and_delay_nobody() -> None:
    engine = Engine(budget=8)
    engine.add("a", 5)
    assert tokens(engine.step()) == [(0, 5)]
    engine.add("b", 20)
    assert tokens(engine.step()) == [(0, 1), (1, 7)]
    assert tokens(engine.step()) == [(0, 1), (1, 7)]
    plan = engine.step()
    assert tokens(plan) == [(0, 1), (1, 6)]
    assert [step.sample for step in plan.rows] == [True, True]


def test_decoding_rows_come_before_running_prompts() -> None:
    engine = Engine(budget=8)
    engine.add("a", 20)
    engine.step()
    engine.add("b", 1)
    engine.step()
    assert tokens(engine.step()) == [(0, 4), (1, 1)]
    assert tokens(engine.step()) == [(0, 1), (1, 1)]


def test_first_come_first_served_within_a_priority() -> None:
    engine = Engine(max_num_seqs=1)
    params = SamplingParams(max_tokens=1)
    for name, priority in (("a", 1), ("b", 0), ("c", 1), ("d", 0), ("e", -1)):
        engine.add(name, 3, params, priority=priority)
    engine.finish()
    admitted = [e.request_id for e in engine.tracer.events if isinstance(e, SequenceAdmitted)]
    assert admitted == ["e", "b", "d", "a", "c"]


def test_nobody_overtakes_the_head_of_the_queue() -> None:
    """A large request that must wait for blocks is not starved by small ones behind it."""
    engine = Engine(num_blocks=8, max_model_len=32, caching=False)
    first = engine.add("a", 12, SamplingParams(max_tokens=8, ignore_eos=True))
    engine.step()
    engine.add("big", 25)
    small = engine.add("small", 1, SamplingParams(max_tokens=1))
    while first.status is not Status.FINISHED:
        assert small.status is Status.WAITING
        engine.step()
    engine.finish()


def test_the_newest_of_the_lowest_priority_is_preempted() -> None:
    engine = Engine(num_blocks=6, max_model_len=24, budget=32, caching=False)
    old = engine.add("old", 7)
    urgent = engine.add("urgent", 7, priority=-1)
    new = engine.add("new", 7)
    while not any(isinstance(event, SequencePreempted) for event in engine.tracer.events):
        engine.step()
    assert new.stats.num_preemptions == 1
    assert new.status is Status.WAITING
    engine.finish()
    assert old.stats.num_preemptions >= 1  # later, when urgent needed what was left
    assert urgent.stats.num_preemptions == 0
    for seq in (old, urgent, new):
        prompt, output = seq.token_ids[:7], seq.output_token_ids
        assert output == answer(prompt, b"", seq.seed, len(output))
        assert len(seq.token_ids) == 24


def test_times_of_a_request() -> None:
    """The clock ticks once a look, so events and stats of one moment agree exactly."""
    engine = Engine(depth=1, max_num_seqs=1)
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    seq = engine.add("a", 20, params, arrival=-5.0)  # two chunks
    engine.add("b", 3, params)
    engine.step()
    assert seq.stats.first_token is None
    engine.step()
    first_token = seq.stats.first_token
    for _ in range(2):
        engine.scheduler._preempt(seq)
        engine.step()
    engine.finish()
    events = [event for event in engine.tracer.events if getattr(event, "request_id", "") == "a"]
    admitted, preempted, again, _, _, finished = events
    assert seq.stats == SequenceStats(
        arrival=-5.0,
        first_scheduled=admitted.time,  # not the second time
        first_token=first_token,
        finished=finished.time,
        num_cached_tokens=0,  # what was cached when it came, not what it cached itself
        num_preemptions=2,
    )
    assert first_token is not None
    assert admitted.time < first_token < preempted.time < again.time < finished.time
    assert isinstance(again, SequenceAdmitted)
    assert again.num_cached_tokens > 0


def test_recomputing_after_preemption_uses_the_cache() -> None:
    engine = Engine(max_model_len=40)
    seq = engine.add("a", 14)
    for _ in range(4):
        engine.step()
    engine.scheduler._preempt(seq)
    engine.step()
    again = [e for e in engine.tracer.events if isinstance(e, SequenceAdmitted)][-1]
    assert (again.num_tokens, again.num_cached_tokens) == (18, 16)
    engine.finish()


def test_the_block_of_a_single_token_is_offered_with_its_result() -> None:
    """Such a token may be stored and attended at once: another row of the step would be early."""
    engine = Engine()
    first = engine.add("a", 3)
    engine.step()
    prompt = [*first.token_ids, 1]

    def follow(name: str) -> Sequence:
        (seq,) = engine.core.add(name, prompt, ENDLESS)
        engine.kv.know([seq])
        engine.step()
        return seq

    assert len(first.token_ids) == engine.blocks.block_size
    assert follow("in the same step").stats.num_cached_tokens == 0
    assert follow("in the next").stats.num_cached_tokens == 4
    engine.finish()


def test_the_last_block_of_a_finished_sequence_is_offered() -> None:
    engine = Engine()
    engine.add("a", 3, SamplingParams(max_tokens=2, ignore_eos=True))
    engine.finish()
    assert engine.blocks.num_cached == 1


def test_completions_share_what_the_first_one_computed() -> None:
    engine = Engine(max_num_seqs=3, block_size=4)
    group: list[Sequence] = engine.add("a", 10, SamplingParams(n=3, max_tokens=4, ignore_eos=True))
    assert tokens(engine.step()) == [(0, 10)]
    plan = engine.step()
    assert tokens(plan) == [(0, 1), (1, 1), (2, 1)]
    assert len(plan.block_copies) == 2  # the first one writes its own block on
    assert engine.blocks.num_used == 2 + 3
    engine.finish()
    for seq in group:
        assert seq.output_token_ids == answer(seq.token_ids[:10], b"", seq.seed, 4)


def test_others_are_admitted_while_forks_wait_for_the_prompt() -> None:
    engine = Engine(budget=8, num_blocks=64, max_num_seqs=4)
    endless = SamplingParams(n=2, max_tokens=4, ignore_eos=True)
    first, fork = engine.add("a", 20, endless)
    other = engine.add("b", 24)
    assert tokens(engine.step()) == [(0, 8)]
    assert tokens(engine.step()) == [(0, 8)]
    assert tokens(engine.step()) == [(0, 4), (1, 4)]  # b starts, its prompt takes 6 steps
    plan = engine.step()
    assert fork.status is Status.RUNNING  # and does not delay the fork that is ready now
    assert tokens(plan) == [(0, 1), (fork.row, 1), (other.row, 6)]
    assert fork.stats.num_cached_tokens == 19
    engine.finish()
    assert first.output_token_ids == answer(first.token_ids[:20], b"", first.seed, 4)


def test_who_overtakes_waiting_forks_leaves_them_rows_and_blocks() -> None:
    params = SamplingParams(n=3, max_tokens=4, ignore_eos=True)
    engine = Engine(budget=8, max_num_seqs=3)
    _, *forks = engine.add("a", 15, params)
    other = engine.add("b", 1)
    for _ in range(3):
        engine.step()
    assert [seq.status for seq in (*forks, other)] == [Status.RUNNING] * 2 + [Status.WAITING]
    engine.finish()

    engine = Engine(budget=8, num_blocks=8, max_num_seqs=4, max_model_len=32, caching=False)
    group = engine.add("a", 15, params)  # 4 blocks, and a copy of the last one for each fork
    large, small = engine.add("b", 12), engine.add("c", 5)
    for _ in range(3):
        engine.step()
    assert [seq.status for seq in group] == [Status.RUNNING] * 3
    assert [large.status, small.status] == [Status.WAITING] * 2
    engine.finish()


def test_plans_ahead_compute_one_row_in_vain_at_most() -> None:
    engine = Engine(depth=2)
    seq = engine.add("a", 3, SamplingParams(stop_token_ids=(1, 2), max_tokens=10))
    engine.step()
    assert seq.status is Status.FINISHED
    assert engine.core.is_finished
    engine.core.step()
    engine.core.step()
    assert len(engine.kv.delivered) == 2
    assert seq.output_token_ids == answer(seq.token_ids[:3], b"", seq.seed, 1)


def test_a_step_is_never_planned_past_the_end() -> None:
    engine = Engine(depth=2)
    engine.add("a", 3, SamplingParams(max_tokens=4, ignore_eos=True))
    engine.finish()
    engine.core.step()
    assert [step.plan.num_tokens for step in engine.kv.delivered] == [3, 1, 1, 1]


def test_seeds() -> None:
    engine, other = Engine(), Engine()
    fixed = SamplingParams(seed=5, n=3)
    first, again = engine.add("a", 3, fixed), other.add("b", 9, fixed)
    assert [seq.seed for seq in first] == [seq.seed for seq in again]
    assert first[0].seed == 5
    fresh = [engine.add(name, 3).seed for name in "cdef"]
    assert len({*fresh, *(seq.seed for seq in first)}) == 7


@pytest.mark.parametrize(("length", "num_blocks"), [(64, 32), (65, 32), (32, 8), (100, 8)])
def test_a_prompt_that_can_never_fit_is_refused(length: int, num_blocks: int) -> None:
    engine = Engine(num_blocks=num_blocks)
    limit = min(64, num_blocks * 4)
    with pytest.raises(ContextLengthError, match=f"{limit} tokens, but the prompt has {length}"):
        engine.add("a", length)
    assert engine.core.is_finished
    engine.add("a", limit - 1)
    engine.finish()


def test_bad_requests_leave_no_trace() -> None:
    engine = Engine()
    engine.add("a", 3)
    for prompt, name in (([], "b"), ([3], "b"), ([-1], "b"), ([1.0], "b"), ([1], "a")):
        with pytest.raises(InvalidRequestError):
            engine.core.add(name, prompt, ENDLESS)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match=r"logit_bias must be in \[0, 2\], got 3"):
        engine.core.add("b", [1], SamplingParams(logit_bias={3: 1.0}))
    assert len(engine.scheduler.waiting) == 1
    engine.finish()
    engine.core.close()
    with pytest.raises(EngineClosedError):
        engine.core.add("c", [1], ENDLESS)


def test_something_must_be_left_to_choose() -> None:
    engine = Engine()
    for options in (
        {"allowed_token_ids": [EOS]},
        {"allowed_token_ids": [EOS, 1], "stop_token_ids": [1]},
        {"allowed_token_ids": [1], "stop_token_ids": [1, 2]},
    ):
        with pytest.raises(InvalidRequestError, match="min_tokens=1 forbids every token"):
            engine.core.add("a", [1], SamplingParams(min_tokens=1, **options))
        engine.core.add("b", [1], SamplingParams(min_tokens=0, **options))
        engine.core.abort("b")
    engine.core.add("c", [1], SamplingParams(min_tokens=1, allowed_token_ids=[EOS, 2]))
    engine.core.abort("c")
    assert engine.core.is_finished


def test_sharers_of_a_failed_step_end_with_it() -> None:
    """The second plan in flight started on blocks that the first one never filled."""
    engine = Engine(budget=12)
    first = engine.add("a", 12)
    engine.kv.fail_next = True
    engine.core._plan_ahead()
    sharer, unrelated = engine.add("a2", 12), engine.add("b", 9)
    engine.core._depth = 2
    updates = engine.core.step()
    assert sharer.stats.num_cached_tokens == 8
    assert [update.seq for update in updates] == [first, sharer]
    assert {update.error for update in updates} == {"RuntimeError: the device is on fire"}
    assert engine.blocks.num_cached == 0
    engine.scheduler.check_integrity()
    while not engine.core.is_finished:
        engine.core.step()
    assert unrelated.finish_reason == "length"
    assert unrelated.output_token_ids == answer(unrelated.token_ids[:9], b"", unrelated.seed, 55)


def test_what_a_broken_row_computed_is_not_offered() -> None:
    engine = Engine()
    fine = engine.add("b", 9)
    engine.step()
    assert engine.blocks.num_cached == 2
    broken = engine.add("a", 9)
    assert fine.token_ids[:8] != broken.token_ids[:8]
    engine.core._plan_ahead()  # the plan in which it is offered
    assert engine.blocks.num_cached == 4
    engine.scheduler.update(StepResult(1, (RowResult(0, (1,)), RowResult(1, error="not a number"))))
    assert (broken.finish_reason, broken.block_table) == ("error", [])
    assert engine.blocks.num_cached == 2
    assert engine.blocks.find_prefix(fine)
    engine.scheduler.check_integrity()


def test_a_plan_that_the_executor_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine()
    first = engine.add("a", 12)

    def refuse(plan: StepPlan) -> Any:
        raise ConnectionError("rank 1 is gone")

    with monkeypatch.context() as patch:
        patch.setattr(engine.kv, "submit", refuse)
        (update,) = engine.core.step()
    assert (update.seq, update.error) == (first, "ConnectionError: rank 1 is gone")
    assert engine.core.is_finished
    engine.add("b", 9)
    engine.finish()
