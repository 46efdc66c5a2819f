"""Files that commands write. Knows nothing of what is in them."""

from __future__ import annotations

import tempfile
from pathlib import Path


def check_writable(path: Path) -> None:
    """Raises OSError before anything is measured in vain; changes no file."""
    if path.exists():
        with path.open("a"):
            return
    with tempfile.TemporaryFile(dir=path.parent):
        pass
