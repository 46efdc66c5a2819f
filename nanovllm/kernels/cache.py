"""Where compiled kernels lie between processes: directories that are ours alone, and whole files.

Knows nothing of compilers. A file's name says what it was made from (a hash of sources, flags,
compiler), so a stale or foreign one is never taken.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SCRATCH = "tmp"  # begins the name of a directory of unfinished files
LEFTOVER_SECONDS = 24 * 3600


class BuildError(Exception):
    """The compiled code cannot be had here; the message says why."""


def find(name: str) -> Path | None:
    """The cached file of that name, if there is one and it is whole."""
    for directory in _places():
        if _is_trusted(directory) and is_whole(directory / name):
            return directory / name
    return None


def writable_directory() -> Path | None:
    """Where to compile into, made if need be, or None if no directory is ours and writable."""
    return next((path for path in _places() if _is_made(path) and os.access(path, os.W_OK)), None)


def directory_in_use() -> Path | None:
    """Where compiled files lie, or else would be written; makes nothing."""
    return next((path for path in _places() if _holds_files(path) or _can_be_made(path)), None)


@contextmanager
def scratch(directory: Path) -> Iterator[Path]:
    """A directory inside this one to make files in, removed at the end.

    Also removes those that processes which were killed have left behind.
    """
    for path in directory.glob(SCRATCH + "*"):
        with suppress(OSError):  # another process has removed it
            if time.time() - path.lstat().st_mtime > LEFTOVER_SECONDS:
                shutil.rmtree(path)
    with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=directory) as name:
        yield Path(name)


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


def _places() -> list[Path]:
    """Where files may lie, best first; whether a directory is there and ours is yet to be seen."""
    root = os.environ.get("XDG_CACHE_HOME")
    home = Path(root) if root else Path(os.path.expanduser("~")) / ".cache"
    user = os.getuid() if hasattr(os, "getuid") else 0
    places = [home / "nanovllm", Path(tempfile.gettempdir()) / f"nanovllm-{user}"]
    # A path is relative where the user has no home: not into whatever directory this runs in.
    return [path for path in places if path.is_absolute()]


def _is_made(directory: Path) -> bool:
    """Whether the directory exists, or now does, and is ours."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return False
    return _is_trusted(directory)


def _is_trusted(directory: Path) -> bool:
    """Whether the directory exists and is ours: what lies there is executed."""
    try:
        info = directory.stat()
    except OSError:
        return False
    if not stat.S_ISDIR(info.st_mode):
        return False
    return not hasattr(os, "getuid") or (info.st_uid == os.getuid() and not info.st_mode & 0o002)


def _holds_files(directory: Path) -> bool:
    """Whether files are taken from there, or may be written to it."""
    if not _is_trusted(directory):
        return False
    if os.access(directory, os.W_OK):
        return True
    return os.access(directory, os.R_OK) and any(directory.iterdir())


def _can_be_made(directory: Path) -> bool:
    if os.path.lexists(directory):
        return False
    above = next(path for path in directory.parents if os.path.lexists(path))
    return above.is_dir() and os.access(above, os.W_OK | os.X_OK)
