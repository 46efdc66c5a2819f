"""The HTTP process's side of the engine: requests out, text back.

Knows token ids, text and streams, no HTTP. The engine's sequences are mirrored here, so that the
same `RequestTracker` that serves the offline API turns token ids into deltas. Every request ends
exactly once: with a finish reason, with an error, or because its stream was closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import socket
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import cast

from nanovllm.engine.scheduler import SequenceUpdate
from nanovllm.engine.sequence import Sequence
from nanovllm.errors import ConfigError, InvalidRequestError, NanoVLLMError, StepError
from nanovllm.metrics.base import NullServerMetrics, ServerMetrics
from nanovllm.outputs import Delta, RequestOutput
from nanovllm.requests import RequestTracker
from nanovllm.server import messages
from nanovllm.server.streams import EngineDeadError, Job, ShutdownError, Stream
from nanovllm.text.tokenizer import Tokenizer

SILENT_SECONDS = 5.0
logger = logging.getLogger("nanovllm.server")


@dataclass(slots=True)
class _Request:
    stream: Stream
    job: int
    sequences: list[Sequence]  # mirrors of the engine's, without blocks
    num_unfinished: int
    last_token: float | None = None


class EngineClient(asyncio.Protocol):
    """Talks to one engine over a connected socket. All methods run on one event loop.

    `died` is set, with the reason in `death`, when the engine is gone or reports its end.
    """

    def __init__(self, tokenizer: Tokenizer, metrics: ServerMetrics | None = None) -> None:
        self.info: messages.Ready | None = None
        self.load = messages.Load()
        self.death: str | None = None
        self.refusal: str | None = None  # what is wrong with the config that it was started with
        self.changed = asyncio.Event()  # set when info or death is
        self.died = asyncio.Event()
        self._disconnected = asyncio.Event()
        self.num_sequences = 0
        self.busy_seconds = 0.0
        self._last_report = time.monotonic()
        self._ready_since: float | None = None
        self._metrics = metrics or NullServerMetrics()
        self._transport: asyncio.Transport | None = None
        self._frames = messages.Frames()
        self._decoder = messages.decoder(messages.Report)
        self._requests: dict[int, _Request] = {}
        self._handles = itertools.count(1)
        self._tracker = RequestTracker(tokenizer, stop=self._stop)
        self._tokenizer = tokenizer

    async def connect(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.create_unix_connection(lambda: self, sock=sock)
        except BaseException:  # the loop has closed it, and uvloop's does not say so
            self._transport = None
            raise

    # --- state ------------------------------------------------------------------------------

    @property
    def silent_seconds(self) -> float:
        """Since the last report of the engine; it sends two a second, even when idle."""
        return time.monotonic() - self._last_report

    @property
    def served_seconds(self) -> float:
        """Since the engine was ready, 0 before that."""
        return 0.0 if self._ready_since is None else time.monotonic() - self._ready_since

    def trouble(self) -> str | None:
        """Why the engine cannot serve at this moment, or None."""
        if self.death is not None:
            return self.death
        if self.info is None:
            return "the model is loading"
        if self.silent_seconds > SILENT_SECONDS:
            return f"the engine has been silent for {self.silent_seconds:.0f} s"
        return None

    async def ready(self) -> messages.Ready:
        """Waits until the model is loaded. Raises EngineDeadError if it cannot be."""
        while self.info is None:
            if self.death is not None:
                raise EngineDeadError(self.death)
            self.changed.clear()
            await self.changed.wait()
        return self.info

    @property
    def max_prompt_len(self) -> int:
        """Prompts must be shorter than this; only known once the engine is ready."""
        assert self.info is not None, "the engine is not ready"
        return min(self.info.max_model_len, self.info.num_blocks * self.info.block_size)

    # --- requests ---------------------------------------------------------------------------

    def start(self, jobs: SequenceOf[Job]) -> Stream:
        """Sends jobs that were validated. Raises EngineDeadError if there is no engine."""
        if self.death is not None:
            raise EngineDeadError(self.death)
        now = time.monotonic()
        stream = Stream(self.abort, sum(job.params.n for job in jobs))
        for index, job in enumerate(jobs):
            handle = next(self._handles)
            params = messages.pack_params(job.params)
            self._send(
                messages.Add(handle, job.token_ids, params, job.priority, job.salt.encode(), now)
            )
            stream.handles.append(handle)
            stream.outputs.append(self._mirror(handle, index, job, stream, now))
        return stream

    def _mirror(
        self, handle: int, index: int, job: Job, stream: Stream, now: float
    ) -> RequestOutput:
        sequences = [
            Sequence(
                handle << 8 | i,
                list(job.token_ids),
                job.params,
                request_id=str(handle),
                index=i,
                arrival=now,
            )
            for i in range(job.params.n)
        ]
        self._requests[handle] = _Request(stream, index, sequences, len(sequences))
        self.num_sequences += len(sequences)
        return self._tracker.add(str(handle), job.text, job.token_ids, job.params, sequences)

    def abort(self, handles: SequenceOf[int]) -> None:
        for handle in handles:
            request = self._requests.get(handle)
            if request is None:
                continue
            self._send(messages.Abort(handle))
            for seq in request.sequences:
                if seq.finish_reason is None:
                    seq.stats.finished = time.monotonic()
                    self._finished(request, seq, self._tracker.end(seq, "abort"))

    async def close(self, timeout: float) -> None:
        """Tells the engine to end, and waits until it has hung up, or for timeout seconds.

        One that is not ready yet reads nothing: it is not waited for. What is still in flight ends
        with ShutdownError.
        """
        if self._transport is None:
            return  # never connected
        self._die(ShutdownError("the server is shutting down"))
        self._send(messages.Shutdown())
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._disconnected.wait(), timeout if self.info else 0)
        self._transport.abort()
        await self._disconnected.wait()

    def _send(self, command: messages.Command) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(messages.encode(command))

    def _stop(self, seq: Sequence) -> None:
        """A stop string was found: the tracker's callback."""
        seq.stats.finished = time.monotonic()
        self._send(messages.Stop(int(seq.request_id), seq.index))

    # --- the socket -------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._last_report = time.monotonic()
        for body in self._frames.feed(data):
            self._receive(self._decoder.decode(body))

    def connection_lost(self, exc: Exception | None) -> None:
        self.die("the engine process ended")
        self._disconnected.set()

    def die(self, reason: str) -> None:
        """Fails everything in flight with this reason; the first reason stays."""
        self._die(EngineDeadError(reason))

    def _die(self, error: EngineDeadError) -> None:
        if self.death is not None:
            return
        self.death = str(error)
        self._metrics.engine_up(False)
        if self.info is not None:  # nothing runs or waits, whatever its last report said
            self._set_load(messages.Load(num_free_blocks=self.info.num_blocks))
        for request in list(self._requests.values()):
            request.stream.fail(error)
        self._requests.clear()
        self.num_sequences = 0
        self.changed.set()
        self.died.set()

    def _receive(self, report: messages.Report) -> None:
        if isinstance(report, messages.Step):
            self._step(report)
        elif isinstance(report, messages.Beat):
            self.busy_seconds = report.busy_seconds
            self._set_load(report.load)
        elif isinstance(report, messages.Refused):
            self._refused(report)
        elif isinstance(report, messages.Ready):
            self.info = report
            self._ready_since = time.monotonic()
            self._metrics.engine_ready(report.num_blocks)
            self._set_load(messages.Load(num_free_blocks=report.num_blocks))
            self.changed.set()
        else:
            if report.kind == ConfigError.__name__ and self.info is None:
                self.refusal = report.message
            self.die(f"{report.kind}: {report.message}")

    def _set_load(self, load: messages.Load) -> None:
        self.load = load
        self._metrics.load(load.num_running, load.num_waiting, load.num_free_blocks)

    def _step(self, step: messages.Step) -> None:
        self.busy_seconds = 0.0
        for packed in step.events:
            self._metrics.emit(messages.unpack_event(packed))
        self._set_load(step.load)
        now = time.monotonic()
        for update in step.updates:
            request = self._requests.get(update.handle)
            if request is None:
                continue
            try:
                self._update(request, update, now)
            except Exception as error:  # one request's text is nobody else's trouble
                logger.exception("request %d cannot go on", update.handle)
                self._send(messages.Abort(update.handle))
                self._drop(update.handle, StepError(f"{type(error).__name__}: {error}"))

    def _update(self, request: _Request, update: messages.Update, now: float) -> None:
        seq = request.sequences[update.index]
        if seq.finish_reason is not None:
            return  # a stop string ended it here before the engine heard of it
        seq.token_ids += update.token_ids
        stats = seq.stats
        stats.first_scheduled, stats.first_token, stats.finished = update.stats[:3]
        stats.num_cached_tokens, stats.num_preemptions = update.stats[3:]
        if update.token_ids:
            self._count_tokens(request, seq, len(update.token_ids), now)
        delta = self._tracker.apply(
            SequenceUpdate(
                seq,
                update.token_ids,
                update.logprobs,
                update.prompt_logprobs,
                update.prompt_start,
                update.finish_reason,
                update.stop_token_id,
                update.error,
            )
        )
        if delta is None:
            return
        request.stream.push(request.job, delta)
        if delta.finish_reason is not None:
            self._finished(request, seq, delta)

    def _count_tokens(self, request: _Request, seq: Sequence, count: int, now: float) -> None:
        first = seq.num_output_tokens == count
        if first and seq.index == 0:
            self._metrics.prompt_computed(seq.num_prompt_tokens, seq.stats.num_cached_tokens)
        self._metrics.tokens(count)
        if len(request.sequences) == 1:
            if request.last_token is not None:
                self._metrics.inter_token_latency(now - request.last_token)
            request.last_token = now

    def _finished(self, request: _Request, seq: Sequence, delta: Delta) -> None:
        seq.finish_reason = delta.finish_reason
        self.num_sequences -= 1
        request.num_unfinished -= 1
        assert delta.metrics is not None, "a last delta has metrics"
        self._metrics.finished(delta.finish_reason or "", delta.metrics)
        if not request.num_unfinished:
            del self._requests[int(seq.request_id)]
            self._tracker.forget(seq.request_id)

    def _refused(self, report: messages.Refused) -> None:
        self._drop(report.handle, InvalidRequestError(report.message))

    def _drop(self, handle: int, error: NanoVLLMError) -> None:
        """Forgets a request that cannot go on, and tells its stream."""
        request = self._requests.pop(handle, None)
        if request is None:
            return
        self.num_sequences -= request.num_unfinished
        for seq in request.sequences:
            if seq.finish_reason is None:
                seq.finish_reason = "error"
                with contextlib.suppress(Exception):  # its text is what failed, perhaps
                    self._tracker.end(seq, "error")
        self._tracker.forget(str(handle))
        request.stream.fail(error)


async def watch(
    client: EngineClient, timeout: float, kill: Callable[[], None], period: float = 0.25
) -> None:
    """Ends an engine that has been silent, or in one step, for longer than timeout seconds."""
    with contextlib.suppress(asyncio.CancelledError):
        while client.death is None:
            began = time.monotonic()
            await asyncio.sleep(period)
            if time.monotonic() - began > period + SILENT_SECONDS / 2:
                continue  # this process was held up: the engine's reports wait to be read
            silent = client.silent_seconds if client.info is not None else 0.0
            if max(silent, client.busy_seconds) > timeout:
                client.die(f"the engine hung: no progress for {timeout:g} s")
                kill()
