"""What the terminal gets to see: styles, a passing status line, and Ctrl-C as a flag.

The answer of a command goes to stdout and nothing else does; all that is here goes to stderr.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType, TracebackType
from typing import Any, Self, TextIO

BOLD, DIM, RED, YELLOW, CYAN = "1", "2", "31", "33", "36"

# Control characters would let a model's text move the cursor or switch the character set.
_CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def write_answer(text: str) -> None:
    """A piece of the answer to stdout, at once; without control characters on a terminal."""
    if text:
        shown = text.translate(_CONTROLS) if sys.stdout.isatty() else text
        print(shown, end="", flush=True)


def has_style(stream: TextIO) -> bool:
    """A terminal that may be coloured (https://no-color.org)."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    return stream.isatty()


def styled(text: str, style: str, stream: TextIO | None = None) -> str:
    """text with a style if the stream (stderr) is a terminal that may have it."""
    return f"\x1b[{style}m{text}\x1b[0m" if has_style(stream or sys.stderr) else text


def say(text: str, style: str = DIM, end: str = "\n") -> None:
    """One line beside the answer, after what was written of it; or a piece of one."""
    sys.stdout.flush()
    print(styled(text, style), end=end, file=sys.stderr, flush=True)


class Status:
    """Shows a line while the block runs, on terminals only, and removes it."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __enter__(self) -> Self:
        self.show(self._text)
        return self

    def __exit__(self, *_: object) -> None:
        self.show("")

    def show(self, text: str) -> None:
        """Replaces the line."""
        if sys.stderr.isatty():
            print("\r\x1b[K" + styled(text, DIM), end="", file=sys.stderr, flush=True)


class InterruptFlag:
    """Ctrl-C within the block sets `is_set`, so that a step ends whole; a second one raises.

    With `raise_at_end` the first one raises when the block is over: for imports, as torch's may
    swallow an interrupt, or abort the process when one comes at a bad moment.
    """

    def __init__(self, *, raise_at_end: bool = False) -> None:
        self.is_set = False
        self._raise_at_end = raise_at_end
        self._before: Any = None

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        signal.signal(signal.SIGINT, self._before)
        if self._raise_at_end and self.is_set and kind is None:
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.is_set:
            raise KeyboardInterrupt
        self.is_set = True
