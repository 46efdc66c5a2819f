"""Requests on their way: what is asked of the engine, and what has come back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from nanovllm.errors import NanoVLLMError
from nanovllm.outputs import Delta, RequestOutput
from nanovllm.sampling_params import SamplingParams


class EngineDeadError(NanoVLLMError):
    """The engine process ended, or answers no more; the message says which."""


class ShutdownError(EngineDeadError):
    """The server ends, and the engine with it: neither has failed."""


@dataclass(frozen=True, slots=True)
class Job:
    """One prompt of a request; text is what the prompt was, if it was text."""

    token_ids: list[int]
    params: SamplingParams
    text: str | None = None
    priority: int = 0
    salt: str = ""


class Stream:
    """The deltas of a few jobs: iterate for batches of (index of the job, delta).

    What nobody has read yet waits here, at most as much as the jobs may generate; the engine
    never waits for a reader. `outputs` grow along, and are complete at the end.
    """

    def __init__(self, abort: Callable[[Sequence[int]], None], num_unfinished: int) -> None:
        self.outputs: list[RequestOutput] = []
        self.handles: list[int] = []
        self._abort = abort
        self._num_unfinished = num_unfinished
        self._items: list[tuple[int, Delta]] = []
        self._error: NanoVLLMError | None = None
        self._changed = asyncio.Event()

    def push(self, job: int, delta: Delta) -> None:
        self._items.append((job, delta))
        self._num_unfinished -= delta.finish_reason is not None
        self._changed.set()

    def fail(self, error: NanoVLLMError) -> None:
        self._error = error
        self._changed.set()

    async def __aiter__(self) -> AsyncIterator[list[tuple[int, Delta]]]:
        """Raises EngineDeadError or InvalidRequestError if there will be no more deltas."""
        while True:
            items, self._items = self._items, []
            if items:
                yield items
            elif self._error is not None:
                raise self._error
            elif not self._num_unfinished:
                return
            else:
                self._changed.clear()
                await self._changed.wait()

    async def finish(self) -> list[RequestOutput]:
        """Waits for the end."""
        async for _ in self:
            pass
        return self.outputs

    def close(self) -> None:
        """Aborts what has not finished; its KV blocks are free before the engine's next step."""
        if self._num_unfinished:
            self._num_unfinished = 0
            self._abort(self.handles)
