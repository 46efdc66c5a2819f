"""No sequence of events makes the engine read a foreign slot, leak a block, or forget a request."""

from __future__ import annotations

from engine_machine import EngineMachine
from hypothesis import Phase, settings

TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(
    max_examples=300,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],  # a failure is short enough to read, and shrinking takes minutes
    report_multiple_bugs=False,
)
