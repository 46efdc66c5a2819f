"""One LLM used by several threads at once: whole answers, shared steps, nobody waits for all."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, EngineClosedError, SamplingParams
from nanovllm.interrupts import Turns
from nanovllm.trace.events import Event, SequenceAdmitted, SequenceFinished, StepDone

OPTIONS: dict[str, Any] = {"dtype": "float32", "max_num_seqs": 8, "block_size": 8}
PROMPTS = [[5, 6, 7] * n for n in range(1, 9)]


class Tracer:
    """Keeps events, and hands each to `watch`."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.watch: Callable[[Event], None] = self.events.append

    def emit(self, event: Event) -> None:
        self.watch(event)


@pytest.fixture(scope="module")
def tracer() -> Tracer:
    return Tracer()


@pytest.fixture(scope="module")
def shared(text_model: Path, tracer: Tracer) -> Iterator[LLM]:
    with LLM(str(text_model), max_model_len=512, tracer=tracer, **OPTIONS) as llm:
        yield llm


@pytest.fixture
def llm(shared: LLM) -> Iterator[LLM]:
    yield shared
    core = shared._engine.core
    core.scheduler.check_integrity()
    assert core.is_finished
    assert core.scheduler.blocks.num_used == 0
    assert not shared._tracker.outputs
    assert not shared._streams


def params(number: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=20 + number, ignore_eos=True)


def test_every_thread_gets_its_own_answers(llm: LLM) -> None:
    expected = [
        llm.generate(prompt, params(number), use_tqdm=False).token_ids
        for number, prompt in enumerate(PROMPTS)
    ]
    start = threading.Barrier(len(PROMPTS))

    def generate(number: int) -> list[int]:
        start.wait()
        return llm.generate(PROMPTS[number], params(number), use_tqdm=False).token_ids

    def stream(number: int) -> list[int]:
        start.wait()
        deltas = llm.stream(PROMPTS[number], params(number))
        return [token_id for delta in deltas for token_id in delta.token_ids]

    def leave_early(number: int) -> list[int]:
        start.wait()
        for delta in llm.stream(PROMPTS[number], params(number)):
            return list(delta.token_ids)
        raise AssertionError("a stream without deltas")

    for uses in (generate,), (stream,), (generate, stream, leave_early):
        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            calls = [
                pool.submit(uses[number % len(uses)], number) for number in range(len(PROMPTS))
            ]
            answers = [call.result(timeout=120) for call in calls]
        for number, answer in enumerate(answers):
            left_early = uses[number % len(uses)] is leave_early
            assert answer == expected[number][:1] if left_early else answer == expected[number]


def test_a_second_thread_is_served_while_the_first_one_generates(llm: LLM, tracer: Tracer) -> None:
    """It is started from the first one's first step, which goes on for hundreds of others."""
    second = threading.Thread(
        target=lambda: llm.generate([9], max_tokens=2, ignore_eos=True, use_tqdm=False)
    )

    def watch(event: Event) -> None:
        tracer.events.append(event)
        if isinstance(event, StepDone) and second.ident is None:
            second.start()

    tracer.events.clear()
    tracer.watch = watch
    llm.generate([5], max_tokens=500, ignore_eos=True, use_tqdm=False)
    second.join(timeout=120)
    tracer.watch = tracer.events.append
    kinds = [type(e) for e in tracer.events if isinstance(e, (SequenceAdmitted, SequenceFinished))]
    assert kinds == [SequenceAdmitted, SequenceAdmitted, SequenceFinished, SequenceFinished]


def test_close_ends_the_calls_of_other_threads(text_model: Path) -> None:
    llm = LLM(str(text_model), **OPTIONS)
    deltas = llm.stream([5], max_tokens=500, ignore_eos=True)
    next(deltas)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(llm.close).result(timeout=120)
    with pytest.raises(EngineClosedError):
        list(deltas)


def test_turns_go_to_who_waits_longest() -> None:
    turns, order = Turns(), []
    waiting = threading.Event()

    def other() -> None:
        waiting.set()
        with turns.taken():
            order.append("other")

    thread = threading.Thread(target=other)
    with turns.taken():
        with turns.taken():  # a turn within a turn is the same one
            order.append("first")
        thread.start()
        waiting.wait(timeout=120)
        while not turns._next.locked():  # it waits for the turn, not only about to
            pass
    with turns.taken():
        order.append("first again")
    thread.join(timeout=120)
    assert order == ["first", "other", "first again"]
