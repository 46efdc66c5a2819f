"""What happens in the engine, as small frozen records, and the seam that receives them.

Metrics, logs and timelines are tracers of the same events; the engine emits and never looks back.
Times are seconds of the engine's monotonic clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class StepPlanned:
    time: float
    step_id: int
    num_rows: int
    num_tokens: int
    num_running: int
    num_waiting: int
    num_free_blocks: int


@dataclass(frozen=True, slots=True)
class StepDone:
    time: float
    step_id: int
    num_sampled: int


@dataclass(frozen=True, slots=True)
class SequenceAdmitted:
    """num_cached_tokens were found in the prefix cache, of num_tokens in all."""

    time: float
    request_id: str
    index: int
    num_tokens: int
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class SequencePreempted:
    time: float
    request_id: str
    index: int
    num_computed: int


@dataclass(frozen=True, slots=True)
class SequenceFinished:
    time: float
    request_id: str
    index: int
    reason: str
    num_prompt_tokens: int
    num_output_tokens: int


Event = StepPlanned | StepDone | SequenceAdmitted | SequencePreempted | SequenceFinished


class Tracer(Protocol):
    """Receives every event, in order, on the engine's thread; must not raise."""

    def emit(self, event: Event) -> None: ...


class NullTracer:
    """Looks at nothing."""

    def emit(self, event: Event) -> None:
        pass


class ListTracer:
    """Keeps every event; for tests and short experiments."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        self.events.append(event)
