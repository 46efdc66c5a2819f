"""What the engine logs, as lines on stderr for a person. Knows nothing of what is logged."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from nanovllm.cli.terminal import YELLOW, Status, say


class _Lines(logging.Handler):
    """One line a record, in place of a passing status."""

    def emit(self, record: logging.LogRecord) -> None:
        Status("").show("")
        say(f"nanovllm: {record.levelname.lower()}: {record.getMessage()}", YELLOW)


@contextmanager
def shown_warnings(*, quiet: bool = False) -> Iterator[None]:
    """Shows the package's warnings while the block runs; errors alone if quiet."""
    logger = logging.getLogger("nanovllm")
    lines = _Lines(logging.ERROR if quiet else logging.WARNING)
    logger.addHandler(lines)
    try:
        yield
    finally:
        logger.removeHandler(lines)
