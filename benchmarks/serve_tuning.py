"""What the flags of `nanovllm serve` that operators turn do, each against its neighbour.

    python benchmarks/serve_tuning.py [--rounds 3] [--model demo] [--only NAME] [--json FILE]

Each row compares two servers, started in turn, round by round, under the same load from outside.
What counts is the best round of each, as whatever else runs on the machine only ever slows a round
down; a row's result is the ratio of the two. Knows the server only from outside.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from soak import Server
from soak_clients import ask, connect, hang_up, metric, post

from nanovllm.bench.report import as_json, table, write_json

CONTEXT = ("--max-model-len", "2048")


@dataclass(frozen=True, slots=True)
class Case:
    """load(port) gives the number that is compared; the flags differ in one thing."""

    name: str
    number: str
    load: Callable[[int], Awaitable[float]]
    flags: tuple[str, ...]
    other: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """The best rounds, and their ratio."""

    name: str
    number: str
    flags: str
    other: str
    value: float
    other_value: float
    ratio: float
    rounds: list[tuple[float, float]]


def body(seed: int, length: int, max_tokens: int, shared: int = 0) -> dict[str, Any]:
    """A prompt of length token ids, the first of them the same for every seed."""
    own = [20 + (seed * 7919 + i * 104729) % 3000 for i in range(length - shared)]
    prompt = [20 + i * 31 % 3000 for i in range(shared)] + own
    return {"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0}


async def must(port: int, content: dict[str, Any]) -> None:
    status, answer = await ask(port, content)
    assert status == 200, answer


async def tokens_a_second(port: int) -> float:
    """Of 32 clients at once, short prompts, 96 tokens each."""
    await must(port, body(999, 32, 4))
    begin = time.perf_counter()
    await asyncio.gather(*(must(port, body(seed, 32, 96)) for seed in range(32)))
    return 32 * 96 / (time.perf_counter() - begin)


async def first_token(port: int) -> float:
    """Median milliseconds, one client, prompts of 1,024 tokens that begin alike for 960."""
    times = []
    for seed in range(8):
        begin = time.perf_counter()
        await must(port, body(seed, 1024, 1, shared=960))
        times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times[1:])  # nothing was cached before the first


async def longest_pause(port: int) -> float:
    """Milliseconds between two tokens of a stream while eight prompts of 1,900 tokens arrive."""
    reader, writer = await connect(port)
    writer.write(post(json.dumps(body(1, 16, 200) | {"stream": True}).encode()))
    others: list[asyncio.Task[None]] = []
    longest, last, count = 0.0, 0.0, 0
    while line := await reader.readline():
        if not line.startswith(b"data: {"):
            continue
        now, count = time.perf_counter(), count + 1
        longest = max(longest, now - last) if last else longest
        last = now
        if count == 20:
            others = [asyncio.create_task(must(port, body(5 + i, 1900, 1))) for i in range(8)]
    await asyncio.gather(*others)
    await hang_up(writer)
    assert others, f"{count} pieces came"
    return 1000 * longest


async def with_preemptions(port: int) -> float:
    """Tokens a second as above, of prompts with 128 tokens; fails unless some were preempted."""
    begin = time.perf_counter()
    await asyncio.gather(*(must(port, body(seed, 128, 128)) for seed in range(32)))
    seconds = time.perf_counter() - begin
    print(f"preemptions: {(await metric(port))['num_preemptions']:.0f}", file=sys.stderr)
    return 32 * 128 / seconds


def case(
    name: str, number: str, load: Callable[[int], Awaitable[float]], flags: str, other: str
) -> Case:
    return Case(name, number, load, tuple(flags.split()), tuple(other.split()))


RATE, TTFT = "tokens/s", "ms to the first token"
CASES = [
    case("seqs-8", RATE, tokens_a_second, "--max-num-seqs 32", "--max-num-seqs 8"),
    case("seqs-1", RATE, tokens_a_second, "--max-num-seqs 32", "--max-num-seqs 1"),
    case("prefix", TTFT, first_token, "", "--no-enable-prefix-caching"),
    case("chunks", "longest pause in ms", longest_pause,
         "--max-num-batched-tokens 256", "--max-num-batched-tokens 8192"),
    case("kv", RATE, with_preemptions,
         "--max-num-seqs 32 --num-kv-blocks 320", "--max-num-seqs 32 --num-kv-blocks 96"),
    case("kv-seqs", RATE, with_preemptions,
         "--max-num-seqs 12 --num-kv-blocks 96", "--max-num-seqs 32 --num-kv-blocks 96"),
]  # fmt: skip


def measure(load: Callable[[int], Awaitable[float]], flags: Sequence[str], model: str) -> float:
    server = Server(["--model", model, *CONTEXT, *flags])
    try:
        return asyncio.run(load(server.port))
    finally:
        server.end()


def compare(case: Case, model: str, rounds: int) -> Row:
    pairs = []
    for _ in range(rounds):
        value = measure(case.load, case.flags, model)
        pairs.append((value, measure(case.load, case.other, model)))
    best = max if case.number == RATE else min
    value, other = (best(column) for column in zip(*pairs, strict=True))
    flags, others = " ".join(case.flags) or "(default)", " ".join(case.other)
    return Row(case.name, case.number, flags, others, value, other, value / other, pairs)


def main(line: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="what the flags of the server do")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--only", choices=[case.name for case in CASES])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(line)
    wanted = [case for case in CASES if options.only in (None, case.name)]
    rows = [compare(case, options.model, options.rounds) for case in wanted]
    lines = [("row", "number", "flags", "value", "other flags", "value", "ratio")]
    for row in rows:
        values = (f"{row.value:.1f}", row.other, f"{row.other_value:.1f}", f"{row.ratio:.2f}")
        lines.append((row.name, row.number, row.flags, *values))
    print(table(lines))
    if options.json is not None:
        words = ["python", "benchmarks/serve_tuning.py", *(line or sys.argv[1:])]
        write_json(options.json, as_json(words, None, []) | {"results": [asdict(r) for r in rows]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
