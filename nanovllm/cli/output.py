"""Standard output whose errors say that it is the standard output."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO


class _Output(io.FileIO):
    """The error has no filename: no file that the user named is to blame."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OSError(error.errno, f"standard output: {error.strerror}") from None


@contextmanager
def named_output() -> Iterator[None]:
    """Within the block an OSError of sys.stdout names it; whatever is no file stays as it is."""
    given = sys.stdout
    buffer = getattr(given, "buffer", None)
    raw = getattr(buffer, "raw", buffer)
    if not isinstance(given, io.TextIOWrapper) or type(raw) is not io.FileIO:
        yield
        return
    given.flush()
    named = _Output(raw.fileno(), "wb", closefd=False)
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(named) if buffer is not raw else named,
        encoding=given.encoding,
        errors=given.errors,
        line_buffering=given.line_buffering,
        write_through=given.write_through,
    )
    try:
        yield
    finally:
        _flush(sys.stdout)
        sys.stdout = given


def _flush(output: TextIO) -> None:
    """What cannot be written is dropped: else the interpreter complains of it at its end."""
    try:
        output.flush()
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, output.fileno())
        os.close(null)
