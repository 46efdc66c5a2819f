"""Measures offline throughput and latency on stated workloads; a server: bench serve.

A table goes to stdout; --json also writes the numbers with date, hardware, versions and command.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from nanovllm import ConfigError, EngineConfig
from nanovllm.bench import workloads
from nanovllm.bench.shapes import SHAPES, find_shape, write_shape
from nanovllm.cli.files import check_writable, naming
from nanovllm.cli.flags import Parser, add_engine_flags, given, refuse
from nanovllm.cli.terminal import InterruptFlag, Status, say

DEFAULT = "quick"
COLD_START = "cold-start"
SINGLE = ("first-token", COLD_START)  # one request, whatever is asked for
NAMES = (*workloads.WORKLOADS, COLD_START)


def add_arguments(parser: Parser) -> None:
    words = [
        f"{name}: {' '.join((w.__doc__ or '').split())}" for name, w in workloads.WORKLOADS.items()
    ]
    words.append(f"{COLD_START}: From process start to the first token.")
    parser.add_argument(
        "workload",
        nargs="*",
        default=[DEFAULT],
        metavar="WORKLOAD",
        help=f"one or more, {DEFAULT} if none is named. {' '.join(words)}",
    )
    parser.add_argument(
        "--shape",
        metavar="NAME",
        help=f"random weights in the shape of a model: {', '.join(SHAPES)}",
    )
    parser.add_argument(
        "--num-requests",
        type=int,
        metavar="N",
        help=f"instead of the workload's own number; {' and '.join(SINGLE)} have one",
    )
    parser.add_argument(
        "--scale", type=float, default=1.0, metavar="X", help="times all lengths, for slow machines"
    )
    parser.add_argument(
        "--shared-prefix", type=int, default=0, metavar="N", help="tokens before each smollm prompt"
    )
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="the median counts")
    parser.add_argument("--json", metavar="FILE", help="write everything to a file")
    parser.add_argument(
        "--verbose", action="store_true", help=f"say where the time of each {COLD_START} goes"
    )
    add_engine_flags(parser)


def run(options: argparse.Namespace) -> int:
    cases = _cases(options)
    if options.verbose and COLD_START not in options.workload:
        refuse("bench", f"--verbose tells of {COLD_START} alone: name that workload")
    engine = given(options, EngineConfig)
    EngineConfig.from_kwargs(**engine)
    if options.json:
        check_writable(Path(options.json))
    with _model(options, engine) as chosen, Status("loading ...") as status:
        with InterruptFlag(raise_at_end=True):
            from nanovllm.bench import offline, report  # loads torch: the flags are right

        done = None
        cold, results = [], []
        if COLD_START in options.workload:  # first: an engine of ours would hold the memory
            status.show("cold start ...")
            tell = [say] if options.verbose else []
            cold = [offline.cold_start(chosen, options.repeats, *tell)]
        if cases:
            done = offline.run_cases(cases, chosen, repeats=options.repeats, tell=status.show)
            results += done.results
        results += cold
    print(report.results_table(results))
    if done is not None:
        say(report.ceilings_line(done.ceilings))
    if options.json:
        content = report.as_json(["nanovllm", *sys.argv[1:]], done, results)
        with naming(Path(options.json)):
            report.write_json(Path(options.json), content)
    return 0


def _cases(options: argparse.Namespace) -> list[workloads.Case]:
    """All cases of the named workloads. Raises UsageError."""
    for name in options.workload:
        if name not in NAMES:
            near = get_close_matches(name, NAMES, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(NAMES)}"
            refuse("bench", f"unknown workload {name!r}; {hint}")
    for flag in ("num_requests", "repeats"):
        value = getattr(options, flag)
        if value is not None and value < 1:
            refuse("bench", f"--{flag.replace('_', '-')} must be at least 1, got {value}")
    if not 0 < options.scale <= 100:
        refuse("bench", f"--scale must be in (0, 100], got {options.scale}")
    if options.shared_prefix < 0:
        refuse("bench", f"--shared-prefix must be at least 0, got {options.shared_prefix}")
    if options.shared_prefix and "smollm" not in options.workload:
        refuse("bench", "--shared-prefix belongs to the workload smollm")
    if options.num_requests and set(options.workload) <= set(SINGLE):
        refuse("bench", f"--num-requests says nothing to {' and '.join(SINGLE)}: they have one")
    cases = []
    for name in options.workload:
        if name != COLD_START:
            extra = {"shared_prefix": options.shared_prefix} if name == "smollm" else {}
            cases += workloads.WORKLOADS[name](options.num_requests, **extra)
    return [case.shortened(options.scale) for case in cases]


@contextmanager
def _model(options: argparse.Namespace, engine: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Engine options with the model, which --shape makes for as long as the block runs."""
    engine = {"model": "demo", "skip_tokenizer_init": True} | engine
    if not options.shape:
        yield engine
        return
    if "model" in given(options, EngineConfig):
        raise ConfigError("give --model or --shape, not both")
    find_shape(options.shape)
    with tempfile.TemporaryDirectory(prefix="nanovllm-shape-") as directory:
        model = str(write_shape(options.shape, Path(directory)))
        yield engine | {"model": model, "load_format": "dummy"}
