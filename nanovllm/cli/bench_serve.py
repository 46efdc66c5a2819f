"""Measures a server with OpenAI's interface under load: rates, latencies, goodput.

Without --url it starts our own server on the model inside the package (or --model), measures it,
and stops it. A table goes to stdout; --json and --html write the rest.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from nanovllm import EngineConfig
from nanovllm.bench import html, serve_report, serving
from nanovllm.bench.summary import parse_targets
from nanovllm.bench.table import table
from nanovllm.bench.traffic import ARRIVALS, CHAT, PATHS, Load, Range, Traffic
from nanovllm.cli.files import check_writable, write_file
from nanovllm.cli.flags import Parser, add_engine_flags, given, refuse
from nanovllm.cli.terminal import YELLOW, Status, say
from nanovllm.client.loop import runner

DEFAULT_CLIENTS = "1,8,32"
INTERRUPT_STATUS = 130
TERMINATED_STATUS = 143  # 128 + SIGTERM
NOT_ENGINE = ("model", "seed")  # flags of ours with names of the engine's


def add_arguments(parser: Parser) -> None:
    parser.add_argument("--url", metavar="URL", help="the server, such as http://127.0.0.1:8000")
    parser.add_argument("--api-key", metavar="KEY", help="what the server asks for")
    parser.add_argument(
        "--model", metavar="MODEL", help="its name there, or what to serve where there is no --url"
    )
    parser.add_argument(
        "--endpoint", choices=list(PATHS), default=CHAT, help=f"what to ask; {CHAT} if not named"
    )
    load = parser.add_argument_group("load")
    load.add_argument(
        "--request-rate", metavar="X,...", help="requests/s that come whatever happens, in turn"
    )
    load.add_argument(
        "--concurrency",
        metavar="N,...",
        help=f"clients that each wait for their answers, in turn; {DEFAULT_CLIENTS} if there is "
        "no rate",
    )
    load.add_argument(
        "--arrival", choices=ARRIVALS, help=f"gaps of a rate; {ARRIVALS[0]} if not named"
    )
    load.add_argument(
        "--num-requests",
        type=int,
        metavar="N",
        help="for each load; else 100, and at least 4 for each client",
    )
    load.add_argument("--warm-up", type=int, default=4, metavar="N", help="requests before all")
    load.add_argument("--timeout", type=float, default=600.0, metavar="X", help="seconds a request")
    _add_traffic(parser)
    results = parser.add_argument_group("results")
    results.add_argument(
        "--goodput", metavar="NAME:MS,...", help="count requests that meet these: ttft, tpot, e2el"
    )
    results.add_argument("--label", metavar="TEXT", help="the run's name; else the model's")
    results.add_argument("--json", metavar="FILE", help="write everything; bench report reads it")
    results.add_argument("--html", metavar="FILE", help="write a page with plots")
    add_engine_flags(parser, skip=NOT_ENGINE)


def _add_traffic(parser: Parser) -> None:
    group = parser.add_argument_group("requests")
    group.add_argument("--input-len", default="128", metavar="N[-M]", help="tokens of a prompt")
    group.add_argument("--output-len", default="64", metavar="N[-M]", help="tokens of an answer")
    group.add_argument(
        "--shared-prefix", type=int, default=0, metavar="N", help="tokens before every prompt"
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of lengths, words, times")
    group.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 is greedy")
    group.add_argument(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="ask for all of --output-len; servers that do not know the field need the negative",
    )


def run(options: argparse.Namespace) -> int:
    with _sigterm_interrupts() as terminated:
        try:
            _run(options)
        except KeyboardInterrupt:
            return TERMINATED_STATUS if terminated else INTERRUPT_STATUS
    return 0


@contextmanager
def _sigterm_interrupts() -> Iterator[list[int]]:
    """SIGTERM ends the block as Ctrl-C does, and leaves nothing; the list tells of it."""
    came: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        came.append(number)
        handler = signal.getsignal(signal.SIGINT)
        if callable(handler):  # the event loop's own, while one runs
            handler(signal.SIGINT, frame)
        else:  # a job in the background may ignore SIGINT
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(options: argparse.Namespace) -> None:
    """Raises KeyboardInterrupt, what is complete being reported."""
    loads, traffic, targets = _loads(options), _traffic(options), _targets(options)
    if options.label is not None and options.json is None and options.html is None:
        refuse("bench serve", "--label goes into --json and --html: give one of them too")
    engine = given(options, EngineConfig)
    if options.url is not None and (named := set(engine) - set(NOT_ENGINE)):
        refuse("bench serve", f"--{min(named).replace('_', '-')} is the server's choice with --url")
    for name in (options.json, options.html):
        if name is not None:
            check_writable(Path(name))
    session = serving.Session()
    interrupted = False
    with Status("starting a server ...") as status, _server(options, engine) as url:
        target = serving.Target(
            url,
            key=options.api_key,
            model=options.model if options.url is not None else None,
            endpoint=options.endpoint,
            temperature=options.temperature,
            ignore_eos=options.ignore_eos,
            timeout=options.timeout,
        )
        work = serving.run(
            session,
            target,
            traffic,
            loads,
            count=options.num_requests,
            warm_up=options.warm_up,
            tell=status.show,
        )
        try:
            with runner() as loop:
                loop.run(work)
        except KeyboardInterrupt:
            interrupted = True
    if session.measured:
        command = _without_key(["nanovllm", *sys.argv[1:]])
        _report(
            serve_report.as_json(session, target, traffic, targets, command, options.label), options
        )
    if interrupted:
        say(f"interrupted: {len(session.measured)} of {len(loads)} loads are complete", YELLOW)
        raise KeyboardInterrupt


def _report(content: dict[str, Any], options: argparse.Namespace) -> None:
    print("\n\n".join(table(rows) for rows in serve_report.tables(content)))
    for note in serve_report.notes(content):
        say(note, YELLOW)
    if options.json is not None:
        write_file(Path(options.json), json.dumps(content, ensure_ascii=False) + "\n")
    if options.html is not None:
        write_file(Path(options.html), html.page([content], [content["label"]]))


def _without_key(command: Sequence[str]) -> list[str]:
    """The command as it may stand in a file that is passed on."""
    shown = list(command)
    for i, word in enumerate(shown):
        if word == "--api-key" and i + 1 < len(shown):
            shown[i + 1] = "..."
        elif word.startswith("--api-key="):
            shown[i] = "--api-key=..."
    return shown


@contextmanager
def _server(options: argparse.Namespace, engine: dict[str, Any]) -> Iterator[str]:
    """The URL to measure; for as long as the block runs if the server is our own."""
    if options.url is not None:
        yield options.url
        return
    if options.api_key is not None:
        refuse("bench serve", "--api-key is for a server: give its --url too")
    wanted = {name: value for name, value in engine.items() if name not in NOT_ENGINE}
    if options.model is not None:
        wanted["model"] = options.model
    EngineConfig.from_kwargs(**wanted)
    with tempfile.TemporaryDirectory(prefix="nanovllm-bench-") as directory:
        config = Path(directory) / "server.yaml"
        config.write_text(json.dumps(wanted), encoding="utf-8")  # JSON is YAML, too
        command = [sys.executable, "-m", "nanovllm.cli.main", "serve", "--port", "0"]
        command += ["--config", str(config), "--log-level", "error", "--max-waiting", "100000"]
        with serving.own_server(command, Path(directory) / "log") as url:
            yield url


# --- flags --------------------------------------------------------------------------------------


def _loads(options: argparse.Namespace) -> list[Load]:
    rates, clients = options.request_rate, options.concurrency
    if rates is not None and clients is not None:
        refuse("bench serve", "--request-rate and --concurrency are two kinds of load: give one")
    if options.num_requests is not None and options.num_requests < 1:
        refuse("bench serve", f"--num-requests must be at least 1, got {options.num_requests}")
    if options.warm_up < 0:
        refuse("bench serve", f"--warm-up must be at least 0, got {options.warm_up}")
    if not options.timeout > 0:
        refuse("bench serve", f"--timeout must be above 0 seconds, got {options.timeout:g}")
    if rates is None and options.arrival is not None:
        refuse("bench serve", "--arrival says nothing without a --request-rate")
    if rates is not None:
        return [Load("rate", value) for value in _numbers("--request-rate", rates, float)]
    wanted = _numbers("--concurrency", clients or DEFAULT_CLIENTS, int)
    return [Load("concurrency", value) for value in wanted]


def _numbers(flag: str, text: str, kind: type[int] | type[float]) -> list[float]:
    values: list[float] = []
    with suppress(ValueError):
        values = [kind(part) for part in text.split(",")]
    limit = 100_000
    if not values or not all(0 < value <= limit for value in values):
        word = "numbers above 0" if kind is float else "whole numbers from 1"
        refuse("bench serve", f"{flag} must be {word} to {limit}, with commas, got {text!r}")
    if len(set(values)) < len(values):
        refuse("bench serve", f"{flag} names a value twice: {text}")
    return values


def _traffic(options: argparse.Namespace) -> Traffic:
    lengths = {}
    for flag in ("input_len", "output_len"):
        try:
            lengths[flag] = Range.parse(getattr(options, flag))
        except ValueError as error:
            refuse("bench serve", f"--{flag.replace('_', '-')}: {error}")
    if options.shared_prefix < 0:
        refuse("bench serve", f"--shared-prefix must be at least 0, got {options.shared_prefix}")
    if not 0 <= options.temperature <= 100:
        refuse("bench serve", f"--temperature must be in [0, 100], got {options.temperature:g}")
    return Traffic(
        lengths["input_len"],
        lengths["output_len"],
        options.shared_prefix,
        options.arrival or ARRIVALS[0],
        options.seed,
    )


def _targets(options: argparse.Namespace) -> dict[str, float]:
    if options.goodput is None:
        return {}
    try:
        return parse_targets(options.goodput)
    except ValueError as error:
        refuse("bench serve", f"--goodput: {error}")
