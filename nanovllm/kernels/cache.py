"""Where compiled kernels lie between processes: directories that are ours alone, and whole files.

Knows nothing of compilers. A file's name says what it was made from (a hash of sources, flags,
compiler), so a stale or foreign one is never taken.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


class BuildError(Exception):
    """The compiled code cannot be had here; the message says why."""


def find(name: str) -> Path | None:
    """The cached file of that name, if there is one and it is whole."""
    for directory in _directories():
        if is_whole(directory / name):
            return directory / name
    return None


def writable_directory() -> Path | None:
    """Where to compile into, or None if no directory is ours and writable."""
    return next((path for path in _directories() if os.access(path, os.W_OK)), None)


def publish(made: Path, path: Path) -> None:
    """Renames a finished file into place; both on one disk, and `made` in a scratch directory."""
    size = made.with_suffix(".size")
    size.write_text(str(made.stat().st_size))
    os.replace(made, path)
    os.replace(size, path.with_suffix(".size"))


def is_whole(path: Path) -> bool:
    """Whether the file is there at its full size: loading a truncated one may end the process."""
    try:
        return path.stat().st_size == int(path.with_suffix(".size").read_text())
    except (OSError, ValueError):
        return False


def _directories() -> list[Path]:
    """Where files may lie, best first."""
    root = os.environ.get("XDG_CACHE_HOME")
    home = Path(root) if root else Path(os.path.expanduser("~")) / ".cache"
    user = os.getuid() if hasattr(os, "getuid") else 0
    places = [home / "nanovllm", Path(tempfile.gettempdir()) / f"nanovllm-{user}"]
    # A path is relative where the user has no home: not into whatever directory this runs in.
    return [path for path in places if path.is_absolute() and _is_trusted(path)]


def _is_trusted(directory: Path) -> bool:
    """Whether the directory exists (or could be made) and is ours: what lies there is executed."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = directory.stat()
    except OSError:
        return False
    return not hasattr(os, "getuid") or (info.st_uid == os.getuid() and not info.st_mode & 0o002)
