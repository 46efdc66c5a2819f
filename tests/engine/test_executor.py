"""The contract of an executor: plans run in order, off the caller's thread; errors come back."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import pytest

from nanovllm.engine.plan import RowStep, StepPlan, StepResult
from nanovllm.executor.inline import InlineExecutor


@dataclass
class Done:
    plan: StepPlan

    def wait(self) -> StepResult:
        return StepResult(self.plan.step_id, ())


@dataclass
class Runner:
    gate: threading.Event
    executed: list[int] = field(default_factory=list)
    threads: set[int] = field(default_factory=set)

    def execute(self, plan: StepPlan) -> Done:
        assert self.gate.wait(30)
        self.executed.append(plan.step_id)
        self.threads.add(threading.get_ident())
        if plan.step_id == 2:
            raise RuntimeError("step 2")
        return Done(plan)


def plan(step_id: int) -> StepPlan:
    return StepPlan(step_id, (RowStep(0, 1, True),))


def test_plans_run_in_order_while_the_caller_goes_on() -> None:
    runner = Runner(threading.Event())
    executor = InlineExecutor(runner, num_blocks=7)
    assert executor.num_blocks == 7
    futures = [executor.submit(plan(step_id)) for step_id in range(4)]
    assert runner.executed == []
    runner.gate.set()
    assert futures[1].result().step_id == 1
    assert futures[0].result().step_id == 0
    assert futures[0].result().step_id == 0  # asking again is allowed
    with pytest.raises(RuntimeError, match="step 2"):
        futures[2].result()
    assert futures[3].result().step_id == 3
    assert runner.executed == [0, 1, 2, 3]
    assert len(runner.threads) == 1
    assert threading.get_ident() not in runner.threads
    executor.close()
    executor.close()
    with pytest.raises(RuntimeError):
        executor.submit(plan(4))
