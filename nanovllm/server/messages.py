"""What crosses the socket between the HTTP process and the engine process.

Each message is one msgpack array behind its length (32 bits, little endian). Token ids, sampling
parameters and numbers cross; text, sequences and tensors never do. Clock values are of
CLOCK_MONOTONIC, which all processes of a host share.
"""

from __future__ import annotations

import signal
import struct
from collections.abc import Iterator
from dataclasses import fields
from operator import attrgetter
from typing import Any

import msgspec

from nanovllm.engine.plan import TokenLogprobs
from nanovllm.sampling_params import SamplingParams
from nanovllm.trace import events
from nanovllm.trace.events import Event

LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"  # of both processes
HELD_SIGNALS = (signal.SIGINT, signal.SIGTERM)  # of these the engine's process knows nothing
_LENGTH = struct.Struct("<I")
_EVENT_TYPES = (
    events.StepPlanned,
    events.StepDone,
    events.SequenceAdmitted,
    events.SequencePreempted,
    events.SequenceFinished,
)
_EVENT_FIELDS = {kind: attrgetter(*(field.name for field in fields(kind))) for kind in _EVENT_TYPES}
_DEFAULT_PARAMS = SamplingParams()


class Message(msgspec.Struct, array_like=True, tag=True, frozen=True):
    """Base of all messages; the class name is the first element of the array."""


# --- to the engine ------------------------------------------------------------------------------


class Add(Message, frozen=True):
    """Queue a request under a number that the sender chose; params as `pack_params` gives them."""

    handle: int
    token_ids: list[int]
    params: dict[str, Any]
    priority: int
    salt: bytes
    arrival: float


class Abort(Message, frozen=True):
    """End all sequences of a request; nothing is reported back."""

    handle: int


class Stop(Message, frozen=True):
    """End one sequence, whose text has reached a stop string; nothing is reported back."""

    handle: int
    index: int


class Shutdown(Message, frozen=True):
    """End the process."""


Command = Add | Abort | Stop | Shutdown


# --- from the engine ----------------------------------------------------------------------------


class Ready(Message, frozen=True):
    """The model is loaded. The fields are of build.EngineInfo, not all; choices is in words."""

    model: str
    device: str
    dtype: str
    choices: dict[str, str]
    num_blocks: int
    block_size: int
    max_model_len: int
    max_num_seqs: int
    vocab_size: int
    load_seconds: float


class Failed(Message, frozen=True):
    """The engine could not start, or has to end; kind is the name of the error's class."""

    kind: str
    message: str


class Load(msgspec.Struct, array_like=True, frozen=True):
    """Sequences and free KV blocks at one moment."""

    num_running: int = 0
    num_waiting: int = 0
    num_free_blocks: int = 0


class Update(msgspec.Struct, array_like=True, frozen=True):
    """What a step meant for one sequence: a scheduler.SequenceUpdate, and its stats so far.

    stats: (first scheduled, first token, finished, cached tokens, preemptions).
    """

    handle: int
    index: int
    token_ids: tuple[int, ...]
    finish_reason: str | None
    stop_token_id: int | None
    error: str | None
    logprobs: tuple[TokenLogprobs, ...]
    prompt_logprobs: tuple[TokenLogprobs, ...]
    prompt_start: int
    stats: tuple[float | None, float | None, float | None, int, int]


class Step(Message, frozen=True):
    """The updates of one step, and the engine's events since the last message."""

    updates: list[Update]
    events: list[list[Any]]
    load: Load


class Refused(Message, frozen=True):
    """The engine would not queue a request, and why."""

    handle: int
    message: str


class Beat(Message, frozen=True):
    """The engine process lives; busy_seconds is the age of the step that it waits for."""

    busy_seconds: float
    load: Load


Report = Ready | Failed | Step | Refused | Beat


# --- encoding -----------------------------------------------------------------------------------


def encode(message: Message) -> bytes:
    """One frame."""
    body = msgspec.msgpack.encode(message)
    return _LENGTH.pack(len(body)) + body


def decoder(kind: Any) -> msgspec.msgpack.Decoder[Any]:
    """Decodes bodies of frames; kind is Command or Report."""
    return msgspec.msgpack.Decoder(kind)


class Frames:
    """Cuts a stream of bytes into the bodies of frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The bodies that data completes."""
        self._buffer += data
        start = 0
        while len(self._buffer) - start >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(self._buffer, start)
            end = start + _LENGTH.size + size
            if end > len(self._buffer):
                break
            yield bytes(self._buffer[start + _LENGTH.size : end])
            start = end
        del self._buffer[:start]


def pack_params(params: SamplingParams) -> dict[str, Any]:
    """The values that differ from the defaults."""
    named = ((field.name, getattr(params, field.name)) for field in fields(params))
    return {name: value for name, value in named if value != getattr(_DEFAULT_PARAMS, name)}


def pack_event(event: Event) -> list[Any]:
    kind = type(event)
    return [_EVENT_TYPES.index(kind), *_EVENT_FIELDS[kind](event)]


def unpack_event(packed: list[Any]) -> Event:
    return _EVENT_TYPES[packed[0]](*packed[1:])
