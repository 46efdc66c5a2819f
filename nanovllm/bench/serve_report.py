"""A serving benchmark as a table for people and as JSON that `bench report` reads again."""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

import nanovllm
from nanovllm.bench.host import cpu_name, system, usable_cores
from nanovllm.bench.load import Measured
from nanovllm.bench.serving import Session, Target
from nanovllm.bench.summary import CURVE, Spread, Summary, curve, gaps, summarize
from nanovllm.bench.traffic import Traffic
from nanovllm.errors import ConfigError

KIND = "nanovllm bench serve"
FORMAT = 1
RATES = ("load", "in", "out", "cached", "req/s", "out tok/s", "failed", "late ms")
LATENCIES = ("ms", "load", "mean", "median", "p90", "p99", "max")
NAMES = {"ttft": "TTFT", "itl": "ITL", "tpot": "TPOT", "e2el": "e2e"}


def as_json(
    session: Session,
    target: Target,
    traffic: Traffic,
    targets: Mapping[str, float],
    command: Sequence[str],
    label: str | None,
) -> dict[str, Any]:
    """Everything that a report needs; requests are columns, times in seconds."""
    rated = any(measured.load.kind == "rate" for measured in session.measured)
    return {
        "kind": KIND,
        "format": FORMAT,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(command),
        "label": label or session.model,
        "server": {
            "url": target.url,
            "model": session.model,
            "version": session.version,
            "max_model_len": session.context,
        },
        "client": {
            "nanovllm": nanovllm.__version__,
            "python": platform.python_version(),
            "system": system(),
            "cpu": cpu_name(),
            "num_cores": usable_cores(),
        },
        "traffic": {
            "endpoint": target.endpoint,
            "temperature": target.temperature,
            "ignore_eos": target.ignore_eos,
            "input": str(traffic.prompt),
            "output": str(traffic.output),
            "shared_prefix": traffic.shared_prefix,
            "arrival": traffic.arrival if rated else None,
            "seed": traffic.seed,
        },
        "targets_ms": dict(targets),
        "points": [_point(measured, targets) for measured in session.measured],
    }


def _point(measured: Measured, targets: Mapping[str, float]) -> dict[str, Any]:
    summary = summarize(measured, targets)
    columns = ("scheduled", "started", "first", "ended", "num_prompt", "num_cached", "num_output")
    records = measured.records
    requests: dict[str, list[Any]] = {
        name: [_rounded(getattr(record, name)) for record in records] for name in columns
    }
    requests["failure"] = [record.failure for record in records]
    messages = {record.failure: record.message for record in records if record.failure}
    done = [record for record in records if record.failure is None]
    return {
        "load": asdict(measured.load),
        "summary": asdict(summary) | {"keeps_up": summary.keeps_up},
        "messages": messages,
        "ttft_curve_ms": curve([r.first - r.started for r in done if r.first is not None]),
        "itl_curve_ms": curve(gaps(done)),
        "requests": requests,
    }


def _rounded(value: Any) -> Any:
    return round(value, 6) if isinstance(value, float) else value


def read(path: Path) -> dict[str, Any]:
    """A file that `as_json` made. Raises OSError, or ConfigError if it is another."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no JSON: {error}") from None
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise ConfigError(f"{path} was not written by bench serve --json")
    if content.get("format") != FORMAT:
        raise ConfigError(f"{path} has format {content.get('format')}; this version reads {FORMAT}")
    try:
        for point in content["points"]:
            _summary(point["summary"])
            if not {"kind", "value"} <= set(point["load"]) or not point["requests"]["started"]:
                raise KeyError("load")
            for name in ("ttft_curve_ms", "itl_curve_ms"):
                if len(point[name]) not in (0, len(CURVE)):
                    raise KeyError(name)
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{path} is incomplete: {error}") from None
    return content


def _summary(record: Mapping[str, Any]) -> Summary:
    spreads = ("ttft", "itl", "tpot", "e2el", "lag", "stall")
    found = {name: value for name, value in record.items() if name != "keeps_up"}
    for name in spreads:
        found[name] = None if found[name] is None else Spread(**found[name])
    return Summary(**found)


def summaries(content: Mapping[str, Any]) -> list[Summary]:
    return [_summary(point["summary"]) for point in content["points"]]


def tables(content: Mapping[str, Any]) -> list[list[tuple[str, ...]]]:
    """Rates and latencies, each with its head first; goodput only where there are targets."""
    named = [
        (load_name(point["load"]), summary)
        for point, summary in zip(content["points"], summaries(content), strict=True)
    ]
    head = (*RATES, "goodput/s") if content["targets_ms"] else RATES
    rates = [head, *(_rates(name, summary) for name, summary in named)]
    latencies: list[tuple[str, ...]] = [LATENCIES]
    for part, word in NAMES.items():
        for name, summary in named:
            spread: Spread | None = getattr(summary, part)
            if spread is not None:
                latencies.append((word, name, *map(_ms, astuple(spread))))
    return [rates, latencies] if len(latencies) > 1 else [rates]


def _rates(name: str, summary: Summary) -> tuple[str, ...]:
    return (
        name,
        f"{summary.prompt_tokens:.0f}",
        f"{summary.output_tokens:.0f}",
        f"{summary.cached_share:.0%}",
        f"{summary.request_rate:.2f}",
        f"{summary.output_rate:,.1f}",
        str(summary.num_requests - summary.num_done),
        _ms(summary.late),
        *([] if summary.goodput is None else [f"{summary.goodput:.2f}"]),
    )


def load_name(load: Mapping[str, Any]) -> str:
    value = f"{load['value']:g}"
    return f"{value}/s" if load["kind"] == "rate" else f"{value} client{'s' * (value != '1')}"


def _ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"


def notes(content: Mapping[str, Any]) -> list[str]:
    """What a reader of the figures must know: failures, and a generator that was too slow."""
    found = []
    for point, summary in zip(content["points"], summaries(content), strict=True):
        name = load_name(point["load"])
        for kind, count in summary.failures.items():
            found.append(f"{name}: {count} failed ({kind}): {point['messages'][kind]}")
        if not summary.keeps_up:
            found.append(
                f"{name}: the load generator itself was {summary.late:.1f} ms late (p99): these "
                "figures are partly its own; give it a core, or another machine"
            )
    return found
