"""The public API for asyncio: requests as asynchronous streams over an engine on its own thread.

The thread owns the engine; coroutines send it commands and receive deltas. A stream that is left
early, or whose task is cancelled, aborts its request.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any, Self

from nanovllm.errors import EngineClosedError
from nanovllm.llm import OpenModel
from nanovllm.outputs import Delta
from nanovllm.prompts import Prompt, encode_prompt, encode_salt, params_for
from nanovllm.sampling_params import SamplingParams
from nanovllm.trace.events import Tracer

Sink = Callable[[Delta | BaseException], None]
Command = Callable[[], None]


class AsyncLLM(OpenModel):
    """`async for delta in llm.generate(...)`; takes the options of `EngineConfig` as keywords.

    `async with AsyncLLM(...) as llm` closes it at the end of the block. May be used
    from any event loop, and from several.
    """

    def __init__(
        self, model: str = "demo", *, tracer: Tracer | None = None, **options: Any
    ) -> None:
        super().__init__(model, tracer=tracer, **options)
        self._sinks: dict[str, Sink] = {}
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._closed = False
        self._closing = threading.Lock()  # no command is queued after the last look at the queue
        self._thread = threading.Thread(target=self._run, name="nanovllm-engine", daemon=True)
        self._thread.start()

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        **sampling: Any,
    ) -> AsyncIterator[Delta]:
        """Yields what each step adds to the prompt's completions, until all have finished.

        Sampling options may be given as keywords instead of SamplingParams.
        Raises InvalidRequestError before the first delta if the prompt cannot be served, and
        EngineClosedError if the engine is closed meanwhile.
        """
        (params,) = params_for(1, sampling_params, sampling)
        text, token_ids = encode_prompt(self.tokenizer, prompt, params)
        salt = encode_salt(cache_salt)
        if params.structured_output is not None:  # compiled on the engine's thread, all would wait
            await asyncio.to_thread(self._engine.core.check_structure, params)
        request_id = f"async-{next(self._ids)}" if request_id is None else request_id
        loop = asyncio.get_running_loop()
        deltas: asyncio.Queue[Delta | BaseException] = asyncio.Queue()

        def sink(item: Delta | BaseException) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
                loop.call_soon_threadsafe(deltas.put_nowait, item)

        def add() -> None:
            sequences = self._engine.core.add(
                request_id, token_ids, params, priority=priority, salt=salt
            )
            self._tracker.add(request_id, text, token_ids, params, sequences)
            self._sinks[request_id] = sink

        self._submit(lambda: _report(add, sink))
        unfinished = params.n
        try:
            while unfinished:
                item = await deltas.get()
                if isinstance(item, BaseException):
                    unfinished = 0
                    raise item
                unfinished -= item.finish_reason is not None
                yield item
        finally:
            if unfinished:
                self._submit_quietly(lambda: self._leave(request_id, sink))

    async def abort(self, request_id: str) -> None:
        """Ends a request; its stream receives a last delta with finish_reason "abort"."""
        self._submit(lambda: self._abort(request_id))

    def close(self) -> None:
        """Ends all streams with EngineClosedError and stops the thread. Safe to call twice."""
        self._submit_quietly(self._stop)
        self._thread.join()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)  # the step that runs ends first; the loop goes on

    # --- on the engine's thread -------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._closed:
                self._obey(block=self._engine.core.is_finished)
                for update in self._engine.core.step():
                    delta = self._tracker.apply(update)
                    if delta is not None:
                        self._deliver(delta)
        finally:
            self._stop()
            self._obey(block=False)
            for sink in self._sinks.values():
                sink(EngineClosedError("the engine was closed"))
            self._engine.core.close()

    def _obey(self, *, block: bool) -> None:
        """Runs the commands that wait; with `block`, waits for one."""
        if block:
            self._commands.get()()
        while not self._commands.empty():
            self._commands.get()()

    def _deliver(self, delta: Delta) -> None:
        self._sinks[delta.request_id](delta)
        if self._tracker.outputs[delta.request_id].finished:
            self._sinks.pop(delta.request_id)
            self._tracker.forget(delta.request_id)

    def _leave(self, request_id: str, sink: Sink) -> None:
        """Aborts a request on behalf of its own stream; another's of the same id goes on."""
        if self._sinks.get(request_id) is sink:
            self._abort(request_id)

    def _abort(self, request_id: str) -> None:
        for seq in self._engine.core.abort(request_id):
            self._deliver(self._tracker.end(seq, "abort"))

    def _stop(self) -> None:
        with self._closing:
            self._closed = True

    def _submit(self, command: Command) -> None:
        if not self._submit_quietly(command):
            raise EngineClosedError("the engine is closed: make a new one")

    def _submit_quietly(self, command: Command) -> bool:
        """False if the engine is closed and will never run the command."""
        with self._closing:
            if not self._closed:
                self._commands.put(command)
            return not self._closed


def _report(command: Command, sink: Sink) -> None:
    """Whatever a request's own arguments raise is its caller's to see, never the engine's end."""
    try:
        command()
    except Exception as error:
        sink(error)
