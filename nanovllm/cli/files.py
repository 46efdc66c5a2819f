"""Files that commands write. Knows nothing of what is in them."""

from __future__ import annotations

import tempfile
from pathlib import Path


def check_writable(path: Path) -> None:
    """Raises OSError before anything is measured in vain; changes no file."""
    if path.exists():
        with path.open("a"):
            return
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None  # the name that was given
