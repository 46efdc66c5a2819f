"""Runs plans in this process, on a thread of its own, in the order of submission.

The thread launches the next plan as soon as the last one is launched; waiting for results happens
in the caller, so planning and detokenizing overlap with the model's step.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from nanovllm.engine.plan import StepPlan, StepResult


class Pending(Protocol):
    def wait(self) -> StepResult: ...


class Runner(Protocol):
    """What executes a plan: launches it and returns what can be waited for."""

    def execute(self, plan: StepPlan) -> Pending: ...


class InlineExecutor:
    """One rank in this process."""

    def __init__(self, runner: Runner, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._runner: Runner | None = runner
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="nanovllm-step")

    def submit(self, plan: StepPlan) -> StepFuture:
        if self._runner is None:
            raise RuntimeError("the executor is closed")
        return StepFuture(self._thread.submit(self._runner.execute, plan))

    def close(self) -> None:
        """Waits for the plans in flight, then lets go of the weights and the KV cache."""
        self._thread.shutdown(wait=True)
        self._runner = None


class StepFuture:
    """A submitted step. `result` may be called again after an interrupt."""

    def __init__(self, launched: Future[Pending]) -> None:
        self._launched = launched

    def result(self) -> StepResult:
        """Raises whatever the step raised."""
        return self._launched.result().wait()
