"""Ctrl-C at any moment of a call: its requests are gone, the engine is as good as new."""

from __future__ import annotations

import contextlib
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.interrupts import interrupts_deferred
from nanovllm.trace.events import Event

OPTIONS: dict[str, Any] = {"dtype": "float32", "max_num_seqs": 4, "block_size": 8}
PARAMS = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
PROMPTS = [[5, 6, 7] * 7, [8, 9] * 5, [10]]


class InterruptAt:
    """A tracer during whose n-th event a signal arrives: in the middle of the engine's books."""

    def __init__(self) -> None:
        self.countdown = -1

    def emit(self, event: Event) -> None:
        self.countdown -= 1
        if self.countdown == 0:
            signal.raise_signal(signal.SIGINT)


def assert_as_good_as_new(llm: LLM, expected: list[list[int]]) -> None:
    core = llm._engine.core
    core.scheduler.check_integrity()
    assert core.is_finished
    assert core.scheduler.blocks.num_used == 0
    assert not llm._tracker.outputs
    outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    assert [output.token_ids for output in outputs] == expected


@pytest.fixture
def default_handler() -> Any:
    """pytest may run under a parent that ignores the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("default_handler")
def test_interrupt_in_the_middle_of_the_books(text_model: Path) -> None:
    tracer = InterruptAt()
    with LLM(str(text_model), tracer=tracer, **OPTIONS) as llm:
        expected = [output.token_ids for output in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]
        for countdown in (1, 2, 3, 4, 5, 6, 7, 8, 20, 41):
            tracer.countdown = countdown
            with pytest.raises(KeyboardInterrupt):
                llm.generate(PROMPTS, PARAMS, use_tqdm=False)
            assert_as_good_as_new(llm, expected)
            tracer.countdown = countdown
            with pytest.raises(KeyboardInterrupt):
                list(llm.stream(PROMPTS[0], PARAMS))
            assert_as_good_as_new(llm, expected)


def generate_until(timer: threading.Timer, llm: LLM) -> None:
    timer.start()
    while timer.is_alive():
        llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    timer.join()  # the signal may come as late as here


@pytest.mark.usefixtures("default_handler")
def test_interrupt_at_any_time(text_model: Path) -> None:
    main = threading.main_thread().ident
    assert main is not None
    with LLM(str(text_model), **OPTIONS) as llm:
        expected = [output.token_ids for output in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]
        for tries in range(30):
            timer = threading.Timer(
                0.001 + 0.0007 * tries, signal.pthread_kill, (main, signal.SIGINT)
            )
            with pytest.raises(KeyboardInterrupt):
                generate_until(timer, llm)
            timer.join()
            assert_as_good_as_new(llm, expected)


@pytest.mark.usefixtures("default_handler")
def test_an_interrupted_step_loses_no_output(text_model: Path) -> None:
    tracer = InterruptAt()
    with LLM(str(text_model), tracer=tracer, **OPTIONS) as llm:
        expected = llm.generate(PROMPTS[0], PARAMS, use_tqdm=False).token_ids
        llm.add_request(PROMPTS[0], PARAMS)
        for countdown in range(1, 100):
            tracer.countdown = 1 + countdown % 3
            with contextlib.suppress(KeyboardInterrupt):
                outputs = llm.step()
            if llm.is_finished():
                break
        assert [output.token_ids for output in outputs] == [expected]


def hang() -> None:
    with interrupts_deferred():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the second one must end a block that hangs")


@pytest.mark.usefixtures("default_handler")
def test_a_second_interrupt_is_not_held_back() -> None:
    with pytest.raises(KeyboardInterrupt):
        hang()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
