"""Results as a table for people and as JSON for later comparisons."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nanovllm.bench.machine import machine
from nanovllm.bench.offline import Report, Result
from nanovllm.bench.roofline import Ceilings
from nanovllm.bench.table import table

HEADER = ("case", "in", "out", "seconds", "result", "first token", "roof", "of roof")
UNITS = {"output": "out tok/s", "prompt": "in tok/s"}


def results_table(results: Sequence[Result]) -> str:
    return table([HEADER, *(_row(result) for result in results)])


def _row(result: Result) -> tuple[str, ...]:
    seconds = sorted(result.seconds)[len(result.seconds) // 2]
    return (
        result.case,
        str(result.num_prompt_tokens),
        str(result.num_output_tokens),
        f"{seconds:.3f}",
        _value(result.metric, result.value),
        f"{result.first_token * 1000:.1f} ms",
        "" if result.roof is None else _value(result.metric, result.roof),
        "" if result.share is None else f"{result.share:.0%}",
    )


def _value(metric: str, value: float) -> str:
    return f"{value:,.1f} {UNITS[metric]}" if metric in UNITS else f"{value * 1000:.1f} ms"


def ceilings_line(ceilings: Ceilings) -> str:
    return (
        f"ceilings measured: read {ceilings.read / 1e9:.1f} GB/s, "
        f"matrix product {ceilings.matmul / 1e9:,.0f} GFLOP/s; what fits the caches may beat them"
    )


def as_json(command: Sequence[str], report: Report | None, results: list[Result]) -> dict[str, Any]:
    """Date, hardware, versions, command, what the engine chose, and all results."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(command),
        **machine(),
        "engine": None if report is None else asdict(report.info),
        "ceilings": None if report is None else asdict(report.ceilings),
        "results": [asdict(result) for result in results],
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Raises OSError."""
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
