"""The output file: whole lines only, whatever ends the run; and what an earlier run wrote.

Each line is one write to the system, so a killed process leaves at most a torn last line, which the
next run cuts off. A lock keeps two runs from one file. Knows the format's custom_id and error.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from nanovllm.errors import ConfigError


@dataclass(slots=True)
class Done:
    """What needs no more work: requests by custom_id, bad lines by their number."""

    custom_ids: set[str] = field(default_factory=set)
    lines: set[int] = field(default_factory=set)
    num_failed: int = 0

    def add(self, entry: dict[str, Any]) -> None:
        error = entry["error"]
        self.num_failed += error is not None
        if error is not None and "line" in error:
            self.lines.add(error["line"])
        else:
            self.custom_ids.add(entry["custom_id"])


class Output(Protocol):
    done: Done

    def write(self, entry: dict[str, Any]) -> None:
        """Appends one line. Raises OSError."""
        ...

    def close(self) -> None: ...


class StandardOutput:
    """Lines to a pipe: nothing was there before."""

    def __init__(self) -> None:
        self.done = Done()

    def write(self, entry: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(entry) + "\n")  # ASCII, as the pipe's encoding is unknown
        sys.stdout.flush()

    def close(self) -> None:
        pass


class OutputFile:
    """Opens or makes the file and cuts off a torn last line.

    retry_failed takes the failed ones out, so that they are tried again. Raises OSError, and
    ConfigError if the file holds something else or another run writes it.
    """

    def __init__(self, path: Path, *, retry_failed: bool = False) -> None:
        self._path = path
        self.done = Done()
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            if stat.S_ISREG(os.fstat(self._fd).st_mode):  # a pipe or device remembers nothing
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._read(retry_failed)
        except BlockingIOError:
            os.close(self._fd)
            raise ConfigError(f"another run writes {path} at this moment") from None
        except BaseException:
            os.close(self._fd)
            raise

    def _read(self, retry_failed: bool) -> None:
        kept: list[bytes] = []
        end = 0
        with open(self._fd, "rb", closefd=False) as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                end += len(line)
                entry = _entry(line, number, self._path)
                if retry_failed and entry["error"] is not None:
                    continue
                self.done.add(entry)
                if retry_failed:
                    kept.append(line)
            size = file.seek(0, os.SEEK_END)
        if retry_failed and sum(map(len, kept)) < end:
            self._replace(kept)
        elif end < size:
            os.ftruncate(self._fd, end)

    def _replace(self, lines: list[bytes]) -> None:
        """Puts a new file in the old one's place, so that no moment has neither."""
        new = self._path.with_name(self._path.name + ".new")
        fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with open(fd, "wb", closefd=False) as file:
                file.writelines(lines)
            os.replace(new, self._path)
        except BaseException:
            os.close(fd)
            new.unlink(missing_ok=True)
            raise
        os.close(self._fd)
        self._fd = fd

    def write(self, entry: dict[str, Any]) -> None:
        line = json.dumps(entry, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        begin = os.fstat(self._fd).st_size
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        except OSError as error:
            if len(rest) < len(line):
                os.ftruncate(self._fd, begin)
            raise OSError(error.errno, error.strerror, str(self._path)) from None

    def close(self) -> None:
        os.close(self._fd)


def _entry(line: bytes, number: int, path: Path) -> dict[str, Any]:
    """A whole line that an earlier run wrote."""
    try:
        entry: dict[str, Any] = json.loads(line)
        if not {"custom_id", "response", "error"} <= set(entry):
            raise KeyError("custom_id")
        error = {} if entry["error"] is None else entry["error"]
        if not isinstance(error.get("line", 0), int):
            raise TypeError
        if not isinstance(entry["custom_id"], str | None):
            raise TypeError
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ConfigError(
            f"line {number} of {path} is no batch output: name another file, or remove it"
        ) from None
    return entry
