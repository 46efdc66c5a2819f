"""Holds Ctrl-C back while the engine's books are open. Knows signals only."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """A first Ctrl-C is handled when the block ends, a second one at once.

    An exception that strikes between two lines of scheduling would leave half a change behind.
    Does nothing outside of the main thread, where signals never strike.
    """
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[FrameType | None] = []

    def defer(signum: int, frame: FrameType | None) -> None:
        if caught:
            handler(signum, frame)
        caught.append(frame)

    signal.signal(signal.SIGINT, defer)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if caught:
            handler(signal.SIGINT, caught[0])


class Turns:
    """Lets one thread at a time at the engine's books, Ctrl-C held back meanwhile.

    Threads take turns in the order of asking: who has just had one queues behind those that wait.
    """

    def __init__(self) -> None:
        self._next = threading.Lock()  # held by the thread whose turn comes next
        self._books = threading.Lock()
        self._owner: int | None = None

    @contextmanager
    def taken(self) -> Iterator[None]:
        if self._owner == threading.get_ident():  # from within a turn: a tracer, a finalizer
            yield
            return
        with interrupts_deferred():
            with self._next:
                self._books.acquire()
            self._owner = threading.get_ident()
            try:
                yield
            finally:
                self._owner = None
                self._books.release()
