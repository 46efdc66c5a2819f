"""Records of requests to figures: percentiles, rates, goodput. Pure; times in, milliseconds out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nanovllm.bench.load import Measured, Record

TARGETS = {
    "ttft": "time to the first token",
    "tpot": "mean time per token after the first",
    "e2el": "the whole answer",
}
CURVE = (*(i / 200 for i in range(200)), 0.999, 1.0)
MAX_LATE_MS = 10.0  # a generator later than this spoils the tails that it measures


@dataclass(frozen=True, slots=True)
class Spread:
    """Of one quantity, in milliseconds."""

    mean: float
    median: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread | None:
        if not seconds:
            return None
        ms = sorted(1000 * value for value in seconds)
        p50, p90, p99 = (quantile(ms, q) for q in (0.5, 0.9, 0.99))
        return cls(sum(ms) / len(ms), p50, p90, p99, ms[-1])


@dataclass(frozen=True, slots=True)
class Summary:
    """Rates per second, counted from the first request's start to the last one's end.

    lag is how late requests went out, stall how long the generator did not look: both are its
    own fault, not the server's. goodput is None where no targets were named.
    """

    num_requests: int
    num_done: int
    failures: dict[str, int]
    seconds: float
    request_rate: float
    output_rate: float
    prompt_tokens: float
    output_tokens: float
    cached_share: float
    ttft: Spread | None
    itl: Spread | None
    tpot: Spread | None
    e2el: Spread | None
    goodput: float | None
    lag: Spread | None
    stall: Spread | None

    @property
    def late(self) -> float:
        """The worse of both, p99 in milliseconds."""
        return max((s.p99 for s in (self.lag, self.stall) if s is not None), default=0.0)

    @property
    def keeps_up(self) -> bool:
        """Whether the load generator was fast enough for its figures to be the server's."""
        return self.late <= MAX_LATE_MS


def quantile(ordered: Sequence[float], q: float) -> float:
    """Of sorted values, between two of them by interpolation."""
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def parse_targets(text: str) -> dict[str, float]:
    """ "ttft:200,tpot:50" in milliseconds. Raises ValueError."""
    targets: dict[str, float] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\w+)\s*:\s*(\d+(?:\.\d+)?)\s*", part)
        if match is None or match[1] not in TARGETS or not float(match[2]):
            names = ", ".join(TARGETS)
            raise ValueError(f"{part!r} is no target like ttft:200 in ms; there are {names}")
        targets[match[1]] = float(match[2])
    return targets


def tpot(record: Record) -> float | None:
    """Seconds per token after the first; None for an answer of one token."""
    if record.first is None or record.num_output < 2:
        return None
    return (record.ended - record.first) / (record.num_output - 1)


def is_good(record: Record, targets: Mapping[str, float]) -> bool:
    """Done, and within every target (milliseconds)."""
    if record.failure is not None or record.first is None:
        return False
    per_token = tpot(record)
    taken = {
        "ttft": record.first - record.started,
        "tpot": 0.0 if per_token is None else per_token,
        "e2el": record.ended - record.started,
    }
    return all(1000 * taken[name] <= limit for name, limit in targets.items())


def summarize(measured: Measured, targets: Mapping[str, float]) -> Summary:
    records = measured.records
    done = [record for record in records if record.failure is None]
    begin = min(record.started for record in records)
    seconds = max(max(record.ended for record in records) - begin, 1e-9)
    num_prompt = sum(record.num_prompt for record in done)
    num_output = sum(record.num_output for record in done)
    return Summary(
        num_requests=len(records),
        num_done=len(done),
        failures=dict(Counter(r.failure for r in records if r.failure is not None)),
        seconds=seconds,
        request_rate=len(done) / seconds,
        output_rate=num_output / seconds,
        prompt_tokens=num_prompt / max(len(done), 1),
        output_tokens=num_output / max(len(done), 1),
        cached_share=sum(record.num_cached for record in done) / max(num_prompt, 1),
        ttft=Spread.of([r.first - r.started for r in done if r.first is not None]),
        itl=Spread.of(gaps(done)),
        tpot=Spread.of([t for t in map(tpot, done) if t is not None]),
        e2el=Spread.of([record.ended - record.started for record in done]),
        goodput=sum(is_good(r, targets) for r in records) / seconds if targets else None,
        lag=Spread.of([max(0.0, r.started - r.scheduled) for r in records])
        if measured.load.kind == "rate"
        else None,
        stall=Spread.of(measured.stalls),
    )


def gaps(records: Sequence[Record]) -> list[float]:
    return [gap for record in records for gap in record.gaps]


def curve(seconds: Sequence[float]) -> list[float]:
    """Milliseconds at each share of CURVE: a distribution in bounded space."""
    if not seconds:
        return []
    ms = sorted(1000 * value for value in seconds)
    return [round(quantile(ms, q), 3) for q in CURVE]


def in_flight(spans: Sequence[tuple[float, float]]) -> list[tuple[float, int]]:
    """(second, requests in flight from then on) for each change, from (start, end) of requests."""
    changes = sorted([(start, 1) for start, _ in spans] + [(end, -1) for _, end in spans])
    levels, level = [(0.0, 0)], 0
    for at, change in changes:
        level += change
        levels.append((at, level))
    return levels
