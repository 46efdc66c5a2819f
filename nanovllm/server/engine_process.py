"""The engine's side of the socket: commands in, one report a step out.

Runs as a process of its own (`python -m nanovllm.server.engine_process FD`), so that HTTP and
text never wait for the engine's interpreter lock, or as a thread for debugging. Knows token ids
alone. When the other side is gone, for whatever reason, the process ends at once.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec

from nanovllm.build import EngineInfo, build_engine
from nanovllm.config import EngineConfig
from nanovllm.engine.core import EngineCore
from nanovllm.engine.scheduler import SequenceUpdate
from nanovllm.engine.sequence import Sequence, Status
from nanovllm.errors import NanoVLLMError
from nanovllm.sampling_params import SamplingParams
from nanovllm.server import messages
from nanovllm.server.messages import Abort, Add, Command, Load, Shutdown, Stop
from nanovllm.structured_output import ANY_TEXT
from nanovllm.trace.events import Event

logger = logging.getLogger("nanovllm.server")
BEAT_SECONDS = 0.5
RECEIVE_BYTES = 1 << 18


class Link:
    """The socket, read by a thread of its own from the start; `on_gone` runs at its end.

    `prepare` is called there with each command before it is queued.
    """

    def __init__(self, sock: socket.socket, on_gone: Callable[[], None]) -> None:
        self.commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._sock = sock
        self._on_gone = on_gone
        self.prepare: Callable[[Command], None] = _nothing_to_prepare
        self._sending = threading.Lock()
        self._reader = threading.Thread(target=self._read, name="nanovllm-link", daemon=True)
        self._reader.start()

    def send(self, report: messages.Message) -> None:
        frame = messages.encode(report)
        try:
            with self._sending:
                self._sock.sendall(frame)
        except OSError:
            self._on_gone()

    def close(self) -> None:
        """Tells the other side that nothing follows."""
        self._on_gone = _do_nothing
        with contextlib.suppress(OSError):  # the other side was faster
            self._sock.shutdown(socket.SHUT_RDWR)
        self._reader.join()
        self._sock.close()

    def _read(self) -> None:
        frames, decoder = messages.Frames(), messages.decoder(Command)
        try:
            while data := self._sock.recv(RECEIVE_BYTES):
                for body in frames.feed(data):
                    command = decoder.decode(body)
                    self.prepare(command)
                    self.commands.put(command)
        except OSError:
            pass  # the same as the end of the stream
        except BaseException:  # a library's panic, too: an engine that hears nothing must not go on
            logger.exception("commands cannot be read")
        self.commands.put(Shutdown())
        self._on_gone()


def _do_nothing() -> None:
    pass


def _nothing_to_prepare(command: Command) -> None:
    pass


def compiler_for(core: EngineCore) -> Callable[[Command], None]:
    """Compiles the form of a request's text while the engine goes on with others."""

    def prepare(command: Command) -> None:
        if isinstance(command, Add) and "structured_output" in command.params:
            with contextlib.suppress(NanoVLLMError):  # the engine will say the same
                core.check_structure(SamplingParams(**command.params))

    return prepare


class EventBuffer:
    """A tracer that keeps the events, packed, until the next report takes them."""

    def __init__(self) -> None:
        self._packed: list[list[Any]] = []

    def emit(self, event: Event) -> None:
        self._packed.append(messages.pack_event(event))

    def take(self) -> list[list[Any]]:
        packed, self._packed = self._packed, []
        return packed


class EngineLoop:
    """Obeys commands and advances the engine, until told to shut down or the link is gone."""

    def __init__(self, core: EngineCore, link: Link, events: EventBuffer) -> None:
        self._core = core
        self._link = link
        self._events = events
        self._sequences: dict[int, list[Sequence]] = {}
        self._open = True
        self._ended = threading.Event()
        self._step_began: float | None = None

    def run(self) -> None:
        """Raises whatever broke the engine's own state; failed steps do not."""
        beat = threading.Thread(target=self._beat, name="nanovllm-beat", daemon=True)
        beat.start()
        try:
            while self._open:
                self._obey()
                if self._open and not self._core.is_finished:
                    self._step()
        finally:
            self._ended.set()
            self._core.close()
            beat.join()

    def _obey(self) -> None:
        """Runs the commands that wait; waits for one if there is nothing else to do."""
        commands = self._link.commands
        while self._open and (self._core.is_finished or not commands.empty()):
            changed = self._obey_one(commands.get())
            if changed and self._core.is_finished:
                self._link.send(messages.Step([], self._events.take(), self._load()))

    def _obey_one(self, command: Command) -> bool:
        """Whether sequences ended."""
        if isinstance(command, Add):
            self._add(command)
        elif isinstance(command, Abort):
            self._sequences.pop(command.handle, None)
            return bool(self._core.abort(str(command.handle)))
        elif isinstance(command, Stop):
            self._stop(command)
            return True
        else:
            self._open = False
        return False

    def _add(self, command: Add) -> None:
        try:
            self._sequences[command.handle] = self._core.add(
                str(command.handle),
                command.token_ids,
                SamplingParams(**command.params),
                priority=command.priority,
                salt=command.salt,
                arrival=command.arrival,
            )
        except NanoVLLMError as error:
            self._link.send(messages.Refused(command.handle, str(error)))

    def _stop(self, command: Stop) -> None:
        group = self._sequences.get(command.handle)
        if group is not None:
            self._core.stop(group[command.index], "stop")
            self._forget_finished(command.handle)

    def _step(self) -> None:
        self._step_began = time.monotonic()
        updates = self._core.step()
        self._step_began = None
        packed = [_pack(update) for update in updates]
        for update in updates:
            if update.finish_reason is not None:
                self._forget_finished(int(update.seq.request_id))
        if packed or not self._core.is_finished:
            self._link.send(messages.Step(packed, self._events.take(), self._load()))

    def _forget_finished(self, handle: int) -> None:
        if all(seq.status is Status.FINISHED for seq in self._sequences.get(handle, ())):
            self._sequences.pop(handle, None)

    def _load(self) -> Load:
        scheduler = self._core.scheduler
        return Load(len(scheduler.running), len(scheduler.waiting), scheduler.blocks.num_free)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            began = self._step_began
            busy = 0.0 if began is None else time.monotonic() - began
            self._link.send(messages.Beat(busy, self._load()))


def _pack(update: SequenceUpdate) -> messages.Update:
    seq, stats = update.seq, update.seq.stats
    return messages.Update(
        int(seq.request_id),
        seq.index,
        update.token_ids,
        update.finish_reason,
        update.stop_token_id,
        update.error,
        update.logprobs,
        update.prompt_logprobs,
        update.prompt_start,
        (
            stats.first_scheduled,
            stats.first_token,
            stats.finished,
            stats.num_cached_tokens,
            stats.num_preemptions,
        ),
    )


def ready_message(info: EngineInfo) -> messages.Ready:
    choices = {
        what: choice.name + (f" ({choice.reason})" if choice.reason else "")
        for what, choice in info.choices.items()
    }
    return messages.Ready(
        info.model,
        info.device,
        info.dtype,
        choices,
        info.num_blocks,
        info.block_size,
        info.max_model_len,
        info.max_num_seqs,
        info.vocab_size,
        info.load_seconds,
    )


def serve_engine(
    sock: socket.socket,
    config: EngineConfig,
    on_gone: Callable[[], None],
    *,
    own_process: bool = False,
) -> bool:
    """Loads the model and obeys until the end; False if it ended with an error, which was sent."""
    link = Link(sock, on_gone)
    try:
        events = EventBuffer()
        engine = build_engine(config, events)
        link.prepare = compiler_for(engine.core)
        with contextlib.suppress(NanoVLLMError):  # whoever asks for a form is told then
            engine.core.check_structure(SamplingParams(structured_output=ANY_TEXT))
        if own_process:
            gc.freeze()  # full collections would look at all that was imported: 50 ms and more
        link.send(ready_message(engine.info))
        EngineLoop(engine.core, link, events).run()
        return True
    except Exception as error:
        if not isinstance(error, NanoVLLMError):
            logger.exception("the engine cannot go on")
        link.send(messages.Failed(type(error).__name__, str(error) or type(error).__name__))
        return False
    finally:
        link.close()


def main(argv: list[str]) -> int:
    """FD is a connected socket; JSON on standard input holds log_level, and engine: its config."""
    # The parent decides when to end; an interrupt from a terminal reaches the whole group.
    for number in messages.HELD_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, messages.HELD_SIGNALS)  # one that came is gone
    text = sys.stdin.buffer.read()
    if not text:
        return 0  # the parent ended before it said anything
    given = msgspec.json.decode(text)
    logging.basicConfig(level=given["log_level"], format=messages.LOG_FORMAT)
    config = EngineConfig.from_kwargs(**given["engine"])
    sock = socket.socket(fileno=int(argv[1]))
    done = serve_engine(sock, config, lambda: os._exit(0), own_process=True)
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv))
