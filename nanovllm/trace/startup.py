"""Where the time of a start goes, from the first moment of the process. Knows names and seconds."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path


class StartUp:
    """Laps of one start: `lap(name)` ends one; laps of the same name add up.

    The first, "imports", is all that the process did before: the interpreter, imports, flags; 0 if
    the system does not tell when the process began.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {"imports": process_seconds()}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now


def line_of(seconds: Mapping[str, float], first_token: float | None = None) -> str:
    """One line for people; first_token is counted from the end of the last lap."""
    laps = dict(seconds)
    if first_token is not None:
        laps["first token"] = first_token
    parts = " · ".join(f"{name} {value:.2f} s" for name, value in laps.items())
    return f"start-up: {parts} · together {sum(laps.values()):.2f} s"


def process_seconds() -> float:
    """How long this process has been running; 0 where the system does not say."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        return max(0.0, uptime - int(fields[19]) / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        return 0.0
