"""Works through a JSON-lines file of requests (OpenAI's batch format), here or on a server.

Without --url the model is loaded here and answers as `nanovllm serve` would. Answers come in the
order in which they are complete. The same command goes on after an interrupt: what the output file
holds is not asked again.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from nanovllm import ConfigError, EngineConfig
from nanovllm.batch.output import Output, OutputFile, StandardOutput
from nanovllm.batch.target import ServerTarget, Target
from nanovllm.batch.work import RETRIES, TIMEOUT, Batch, Policy, Tally
from nanovllm.cli.flags import Parser, add_engine_flags, given, refuse
from nanovllm.cli.serve import need_extra
from nanovllm.cli.terminal import YELLOW, Status, say
from nanovllm.client.loop import runner

INTERRUPT_STATUS = 130


def add_arguments(parser: Parser) -> None:
    parser.add_argument("-i", "--input-file", metavar="FILE", help='requests; "-" reads stdin')
    parser.add_argument(
        "-o", "--output-file", metavar="FILE", help='answers are added to it; "-" is stdout'
    )
    parser.add_argument("--url", metavar="URL", help="a server such as http://127.0.0.1:8000")
    parser.add_argument("--api-key", metavar="KEY", help="what the server asks for")
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="the model to load; with --url the name to send instead of the requests' own",
    )
    parser.add_argument(
        "--any-model", action="store_true", help="answer requests that name another model, too"
    )
    parser.add_argument(
        "--chat-template", metavar="FILE", help="a Jinja file instead of the model's own template"
    )
    parser.add_argument(
        "--concurrency",
        type=int,
        metavar="N",
        help="requests at once; else 64 on a server, and here somewhat more than --max-num-seqs",
    )
    parser.add_argument(
        "--retries",
        type=int,
        default=RETRIES,
        metavar="N",
        help="how often to ask again where the server is busy or cannot be reached",
    )
    parser.add_argument(
        "--timeout", type=float, default=TIMEOUT, metavar="X", help="seconds for an answer"
    )
    parser.add_argument(
        "--retry-failed",
        action="store_true",
        help="take what failed out of the output file, and do it again",
    )
    parser.add_argument("--quiet", action="store_true", help="nothing on stderr but errors")
    add_engine_flags(parser, skip=("model",))


def run(options: argparse.Namespace) -> int:
    engine = _check(options)
    if options.url is None:
        need_extra("run-batch without --url")
    with contextlib.ExitStack() as stack:
        lines, num_lines = _input(options.input_file, stack)
        output = _output(options)
        stack.callback(output.close)
        earlier_failed = output.done.num_failed
        status = stack.enter_context(Status("starting ..."))
        progress = _Progress(status, num_lines)
        tally = Tally()
        try:
            with runner() as loop:
                loop.run(_work(options, engine, output, lines, progress, tally))
        except KeyboardInterrupt:
            status.show("")
            say(f"interrupted: {_words(tally)}; the same command goes on", YELLOW)
            return INTERRUPT_STATUS
        status.show("")
        if not options.quiet:
            say(f"[{_words(tally)} in {progress.seconds:.1f} s]")
            if tally.num_duplicates:
                say(f"{tally.num_duplicates} lines repeat a custom_id: not asked", YELLOW)
        return 1 if tally.num_failed or earlier_failed else 0


async def _work(
    options: argparse.Namespace,
    engine: EngineConfig | None,
    output: Output,
    lines: Iterable[bytes],
    progress: Callable[[Tally], None],
    tally: Tally,
) -> None:
    """Fills tally, also where it raises."""
    target: Target
    if engine is None:
        target = ServerTarget(options.url, options.api_key)
    else:
        # Needs the extra 'server', which is checked by now.
        from nanovllm.batch.engine_target import EngineTarget

        target = await EngineTarget.start(
            engine, any_model=options.any_model, chat_template=options.chat_template
        )
    try:
        policy = Policy(
            options.concurrency or target.concurrency,
            options.retries,
            options.timeout,
            options.model if options.url is not None else None,
        )
        await Batch(target, output, policy, tally, progress).run(lines)
    finally:
        await target.close()


class _Progress:
    def __init__(self, status: Status, num_lines: int | None) -> None:
        self._status = status
        self._num_lines = num_lines
        self._begin = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begin

    def __call__(self, tally: Tally) -> None:
        of = "" if self._num_lines is None else f" of {self._num_lines}"
        done = tally.num_done + tally.num_skipped
        rate = f"{tally.num_tokens / max(self.seconds, 0.001):,.0f} tok/s"
        failed = f", {tally.num_failed} failed" if tally.num_failed else ""
        self._status.show(f"{done}{of} done{failed}, {rate}")


def _words(tally: Tally) -> str:
    skipped = f", {tally.num_skipped} were done before" if tally.num_skipped else ""
    return (
        f"{tally.num_done} done, {tally.num_failed} failed among them{skipped}, "
        f"{tally.num_tokens} tokens"
    )


def _check(options: argparse.Namespace) -> EngineConfig | None:
    """The engine's config, None with --url. Raises UsageError or ConfigError."""
    for flag in ("input_file", "output_file"):
        if getattr(options, flag) is None:
            refuse("run-batch", f"--{flag.replace('_', '-')} is needed")
    if options.concurrency is not None and not 1 <= options.concurrency <= 100_000:
        refuse("run-batch", f"--concurrency must be in [1, 100000], got {options.concurrency}")
    if options.retries < 0:
        refuse("run-batch", f"--retries must be at least 0, got {options.retries}")
    if not options.timeout > 0:
        refuse("run-batch", f"--timeout must be above 0 seconds, got {options.timeout:g}")
    if options.retry_failed and options.output_file == "-":
        refuse("run-batch", "--retry-failed needs an output file that it can read")
    engine = {
        name: value for name, value in given(options, EngineConfig).items() if name != "model"
    }
    if options.url is None:
        if options.api_key is not None:
            refuse("run-batch", "--api-key is for a server: give its --url too")
        return EngineConfig.from_kwargs(**engine, model=options.model or "demo")
    local = [*engine, *(n for n in ("any_model", "chat_template") if getattr(options, n))]
    if local:
        refuse("run-batch", f"--{local[0].replace('_', '-')} is the server's choice with --url")
    return None


def _input(name: str, stack: contextlib.ExitStack) -> tuple[Iterable[bytes], int | None]:
    """(its lines, how many there are if that can be known)"""
    if name == "-":
        return os.fdopen(os.dup(sys.stdin.fileno()), "rb"), None
    file = stack.enter_context(open(name, "rb"))  # noqa: SIM115 (the stack closes it)
    if not file.seekable():
        return file, None
    num_lines = sum(1 for line in file if line.strip())
    file.seek(0)
    return file, num_lines


def _output(options: argparse.Namespace) -> Output:
    if options.output_file == "-":
        return StandardOutput()
    path = Path(options.output_file)
    if options.input_file != "-" and path.exists() and path.samefile(options.input_file):
        raise ConfigError(f"{path} is the input: name another file for the answers")
    return OutputFile(path, retry_failed=options.retry_failed)
