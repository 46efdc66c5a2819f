"""Facts about the machine that need no torch."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def cpu_name(facts: dict[str, str] | None = None) -> str:
    known = cpuinfo() if facts is None else facts
    return known.get("model name") or platform.processor() or platform.machine()


def usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def system() -> str:
    return f"{platform.system()} {platform.release()} {platform.machine()}"


def cpuinfo() -> dict[str, str]:
    """The first processor's entries; empty where there is no /proc."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in lines}
