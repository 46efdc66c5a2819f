"""A server under abuse for a while: at the end nothing may be lost, leaked or changed.

    python benchmarks/soak.py [--seconds 600] [--clients 24] [--json FILE]

Starts `nanovllm serve` with a KV cache too small for its clients, and lets them ask at once. A
quarter leaves early, one in a hundred is hostile (half-open, huge, malformed), some read slowly.
A canary request is repeated before, during and after. What must hold at the end, and what was
seen, is in the table that is printed and in the JSON file; the exit status is 1 if a check failed.

Flat means, of samples a second from the second fifth of the run to its end: the median of the last
fifth is at most 5%, or 8 MiB, above that of the first one, and a line through all of them rises by
at most 1% a minute (in short runs: 8 MiB in all). File descriptors and threads, once the
clients are gone, are at most as many as before they came. Before comes a warm-up: a request of each
kind, and the largest bodies at once. Knows the server only from outside.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from soak_clients import Clients, ask, get_json, metric

from nanovllm.bench.report import as_json, table, write_json

LEAVING, HOSTILE, SLOW = 0.25, 0.01, 0.03
CANARY_PERIOD = 5.0
SAMPLE_PERIOD = 1.0
GROWTH, MARGIN_MIB, RISE = 1.05, 8.0, 0.01
KEPT_SAMPLES = 120
IDLE_SECONDS = 60.0
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Sample:
    """What a process holds at one moment; memory in MiB."""

    seconds: float
    memory: float
    num_files: int
    num_threads: int


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that must hold."""

    name: str
    found: str
    bound: str
    holds: bool


@dataclass(slots=True)
class Canary:
    """Answers to the same requests; they must never differ by a bit."""

    expected: list[Any] = field(default_factory=list)
    num_same: int = 0
    num_different: int = 0
    num_refused: int = 0

    def compare(self, answers: list[Any]) -> None:
        self.num_same += answers == self.expected
        self.num_different += answers != self.expected


class Server:
    """`nanovllm serve` and its engine process, watched through /proc."""

    def __init__(self, flags: Sequence[str]) -> None:
        command = [sys.executable, "-m", "nanovllm.cli.main", "serve", "--port", "0", *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None, "it was asked for"
        line = self.process.stdout.readline()
        if not line.startswith("ready:"):
            raise SystemExit("the server did not start; its log says why")
        self.port = int(line.split("http://127.0.0.1:")[1].split("/")[0])
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        self.pids = {"http": self.process.pid, "engine": int(children.read_text().split()[0])}

    def sample(self, seconds: float) -> dict[str, Sample]:
        return {name: _sample(pid, seconds) for name, pid in self.pids.items()}

    def end(self) -> int:
        """The exit status after SIGTERM."""
        with self.process:
            self.process.send_signal(signal.SIGTERM)
            try:
                return self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                return self.process.wait()


def _sample(pid: int, seconds: float) -> Sample:
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    memory = int(status["VmRSS"].split()[0]) * 1024 / MIB
    num_files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return Sample(round(seconds, 1), round(memory, 2), num_files, int(status["Threads"]))


async def canary_answers(port: int) -> list[Any]:
    """Tokens, texts and log-probabilities, greedy and sampled; empty if the queue was full."""
    found = []
    for sampling in ({"temperature": 0}, {"temperature": 1, "seed": 11, "n": 2}):
        body = {"prompt": [7, 8, 9, 10, 11] * 8, "max_tokens": 48, "logprobs": 3}
        status, answer = await ask(port, body | sampling | {"priority": -1})
        if status == 429:
            return []
        found.append(answer["choices"] if status == 200 else answer)
    return found


async def watch_canary(port: int, canary: Canary, period: float) -> None:
    while True:
        await asyncio.sleep(period)
        answers = await canary_answers(port)
        if answers:
            canary.compare(answers)
        else:
            canary.num_refused += 1


async def watch_processes(server: Server, samples: dict[str, list[Sample]], begin: float) -> None:
    while True:
        for name, sample in server.sample(time.monotonic() - begin).items():
            samples[name].append(sample)
        await asyncio.sleep(SAMPLE_PERIOD)


async def until_idle(port: int) -> dict[str, Any]:
    """/load, as soon as nothing runs or waits, or as it is after a while."""
    deadline = time.monotonic() + IDLE_SECONDS
    while True:
        load = await get_json(port, "/load")
        idle = not (load["server_load"] or load["num_requests_running"])
        if (idle and load["num_free_blocks"] == load["num_blocks"]) or time.monotonic() > deadline:
            return load
        await asyncio.sleep(0.2)


async def soak(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    """Runs the clients; everything that was seen."""
    canary, port = Canary(), server.port
    canary.expected = await canary_answers(port)
    clients = Clients(
        port,
        min(options.max_model_len // 3, 200),
        random.Random(options.seed),
        leaving=LEAVING,
        hostile=HOSTILE,
        slow=SLOW,
    )
    await clients.one_of_each()
    await until_idle(port)
    before = server.sample(0)
    samples: dict[str, list[Sample]] = collections.defaultdict(list)
    begin = time.monotonic()
    watchers = [
        asyncio.create_task(watch_canary(port, canary, min(CANARY_PERIOD, options.seconds / 8))),
        asyncio.create_task(watch_processes(server, samples, begin)),
    ]
    deadline = begin + options.seconds
    await asyncio.gather(*(clients.run(deadline) for _ in range(options.clients)))
    for task in watchers:
        if task.done():
            task.result()  # it failed, and why is the result of this run
        task.cancel()
    await asyncio.gather(*watchers, return_exceptions=True)
    await clients.close()
    load = await until_idle(port)
    canary.compare(await canary_answers(port))
    await until_idle(port)
    return {
        "seconds": round(time.monotonic() - begin, 1),
        "outcomes": dict(sorted(clients.outcomes.items())),
        "unexpected": clients.unexpected,
        "canary": canary,
        "load": load,
        "metrics": await metric(port),
        "before": before,
        "after": server.sample(time.monotonic() - begin),
        "samples": samples,
    }


def flat(samples: Sequence[Sample]) -> tuple[str, bool]:
    """(first and last median and slope in words, whether memory is flat)."""
    fifth = max(1, len(samples) // 5)
    kept = samples[fifth:]
    first = statistics.median(sample.memory for sample in kept[:fifth])
    last = statistics.median(sample.memory for sample in kept[-fifth:])
    slope = 0.0
    if len(kept) > 1:
        times = [sample.seconds / 60 for sample in kept]
        slope = statistics.linear_regression(times, [sample.memory for sample in kept]).slope
    holds = last <= max(first * GROWTH, first + MARGIN_MIB) and slope <= max(
        RISE * first, MARGIN_MIB * 60 / max(kept[-1].seconds, 1)
    )
    return f"{first:.1f} -> {last:.1f} MiB, {slope:+.2f} MiB a minute", holds


def judge(seen: dict[str, Any]) -> list[Check]:
    canary, load, metrics = seen["canary"], seen["load"], seen["metrics"]
    free, total = load["num_free_blocks"], load["num_blocks"]
    preempted = metrics["num_preemptions"]
    checks = [
        Check("free blocks", str(free), f"= {total}", free == total),
        Check("preemptions", f"{preempted:.0f}", "> 0", preempted > 0),
        Check("canary answers that differ", str(canary.num_different), "= 0",
              not canary.num_different),
        Check("canary answers", str(canary.num_same), "> 1", canary.num_same > 1),
        Check("unexpected answers", str(len(seen["unexpected"])), "= 0", not seen["unexpected"]),
        Check("sequences ended with an error", str(metrics["errors"]), "= 0",
              not metrics["errors"]),
        Check("exit status", str(seen["exit_status"]), "= 0", seen["exit_status"] == 0),
    ]  # fmt: skip
    for name, before in seen["before"].items():
        after = seen["after"][name]
        words, holds = flat(seen["samples"][name])
        checks.append(Check(f"memory of {name}", words, "flat", holds))
        for what in ("num_files", "num_threads"):
            old, new = getattr(before, what), getattr(after, what)
            checks.append(Check(f"{what} of {name}", str(new), f"<= {old}", new <= old))
    return checks


def report(command: Sequence[str], options: argparse.Namespace, seen: dict[str, Any],
           checks: Sequence[Check]) -> dict[str, Any]:  # fmt: skip
    step = max(1, len(seen["samples"]["http"]) // KEPT_SAMPLES)
    content = as_json(command, None, [])
    for name in ("engine", "ceilings", "results"):
        del content[name]
    return content | {
        "options": vars(options) | {"json": None},
        "shares": {"leaving": LEAVING, "hostile": HOSTILE, "slow": SLOW},
        "checks": [asdict(check) for check in checks],
        "seconds": seen["seconds"],
        "outcomes": seen["outcomes"],
        "unexpected": seen["unexpected"][:20],
        "canary": {"same": seen["canary"].num_same, "different": seen["canary"].num_different,
                   "refused": seen["canary"].num_refused},
        "metrics": seen["metrics"],
        "samples": {
            name: [asdict(sample) for sample in samples[::step]]
            for name, samples in seen["samples"].items()
        },
    }  # fmt: skip


def arguments(line: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="a server under abuse; nothing may leak")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=24, help="at once")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--num-kv-blocks", type=int, default=32)
    parser.add_argument("--max-num-seqs", type=int, default=12)
    parser.add_argument("--max-waiting", type=int, default=16)
    parser.add_argument("--max-model-len", type=int, default=512)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    return parser.parse_args(line)


def main(line: Sequence[str] | None = None) -> int:
    options = arguments(line)
    names = ("model", "num_kv_blocks", "max_num_seqs", "max_waiting", "max_model_len")
    flags = [
        word for name in names for word in ("--" + name.replace("_", "-"), getattr(options, name))
    ]
    server = Server([str(flag) for flag in flags])
    try:
        seen = asyncio.run(soak(server, options))
    finally:
        status = server.end()
    seen["exit_status"] = status
    checks = judge(seen)
    rows = [("check", "found", "bound", "holds")]
    rows += [(c.name, c.found, c.bound, "yes" if c.holds else "NO") for c in checks]
    print(table(rows))
    print(json.dumps(seen["outcomes"]))
    for text in seen["unexpected"][:20]:
        print("unexpected:", text)
    if options.json is not None:
        command = ["python", "benchmarks/soak.py", *(line if line is not None else sys.argv[1:])]
        write_json(options.json, report(command, options, seen, checks))
    return 0 if all(check.holds for check in checks) else 1


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
