"""Files that commands write. Knows nothing of what is in them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError of the block names this path, as it was given: a failed write names none."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def check_writable(path: Path) -> None:
    """Raises OSError before anything is measured in vain; changes no file."""
    if path.exists():
        with path.open("a"):
            return
    with naming(path), tempfile.TemporaryFile(dir=path.parent):
        pass


def write_file(path: Path, text: str) -> None:
    """Raises OSError, which names path."""
    with naming(path):
        path.write_text(text, encoding="utf-8")
