"""The entry point: finds the command, parses its flags, turns errors into one line and a status.

Imports nothing that imports torch: a command's module is loaded when it is the one asked for, and
loads the engine itself once its flags are known to be right.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module

from nanovllm import NanoVLLMError, __version__
from nanovllm.cli.flags import Parser, UsageError
from nanovllm.cli.output import named_output

USAGE_STATUS = 2
INTERRUPT_STATUS = 130  # 128 + SIGINT, as shells report it
PIPE_STATUS = 141  # 128 + SIGPIPE


@dataclass(frozen=True, slots=True)
class Command:
    """module has `add_arguments(parser)` and `run(args) -> exit status`; its docstring's first
    paragraph is the description in --help. own_log: it configures logging itself."""

    module: str
    help: str
    own_log: bool = False


# A new command is one line here; a name may have two words ("bench serve").
COMMANDS = {
    "generate": Command("nanovllm.cli.generate", "answer one prompt, streaming, and exit"),
    "chat": Command("nanovllm.cli.chat", "talk to a model in the terminal"),
    "serve": Command("nanovllm.cli.serve", "serve a model to OpenAI's clients over HTTP", True),
    "bench": Command("nanovllm.cli.bench", "measure throughput and latency offline"),
    "bench serve": Command("nanovllm.cli.bench_serve", "measure a server under load"),
    "bench report": Command("nanovllm.cli.bench_report", "compare measured servers, as a page"),
    "run-batch": Command("nanovllm.cli.run_batch", "answer a JSON-lines file of requests"),
    "info": Command("nanovllm.cli.info", "versions, devices, chosen backends and why"),
}

HELP = """\
usage: nanovllm COMMAND [FLAGS] [--help | --help=all]

An LLM inference engine. Without --model every command runs the small model inside the package.

{commands}

  --version    print the version and exit
  --help       print this; after a command, its common flags; --help=all prints all of them

examples:
  nanovllm generate "What is a KV cache?"
  nanovllm chat --model path/to/model --temperature 0.7
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit status; raises nothing but a bug of ours."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without Chinese is no reason to die
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # the engine refuses what is no text
    with named_output():
        return _run(arguments)


def _run(arguments: list[str]) -> int:
    try:
        status = _dispatch(arguments)
        sys.stdout.flush()
        return status
    except UsageError as error:
        return _fail(str(error))
    except NanoVLLMError as error:
        return _fail(f"nanovllm: {error}")
    except BrokenPipeError:
        # Nobody reads on; the interpreter's own last flush must not complain either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_STATUS
    except OSError as error:
        words = str(error) if error.filename is not None else error.strerror or str(error)
        return _fail(f"nanovllm: {words}", status=1)
    except KeyboardInterrupt:
        return INTERRUPT_STATUS


def _dispatch(arguments: list[str]) -> int:
    if not arguments:
        sys.stderr.write(_help())
        return USAGE_STATUS
    if arguments[0] in ("-h", "--help", "--help=all", "help"):
        sys.stdout.write(_help())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"nanovllm {__version__}")
        return 0
    name, rest = _find(arguments)
    command = COMMANDS[name]
    module = import_module(command.module)
    description = (module.__doc__ or "").split("\n\n")[0]
    parser = Parser(f"nanovllm {name}", description, show_all="--help=all" in rest)
    module.add_arguments(parser)
    options = parser.parse(rest)
    if options is None:
        return 0
    if command.own_log:
        return module.run(options)
    # Here because --help does not need it, and is to be quick.
    from nanovllm.cli.log import shown_warnings

    with shown_warnings(quiet=getattr(options, "quiet", False)):
        return module.run(options)


def _find(arguments: list[str]) -> tuple[str, list[str]]:
    """(command, its arguments); the longer of two names that fit."""
    for length in (2, 1):
        name = " ".join(arguments[:length])
        if name in COMMANDS:
            return name, arguments[length:]
    near = get_close_matches(arguments[0], COMMANDS, 1)
    hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(COMMANDS)}"
    raise UsageError(f"nanovllm: unknown command {arguments[0]!r}{hint}")


def _help() -> str:
    width = max(map(len, COMMANDS)) + 4
    lines = [f"  {name:<{width}}{command.help}" for name, command in COMMANDS.items()]
    return HELP.format(commands="\n".join(["commands:", *lines]))


def _fail(message: str, status: int = USAGE_STATUS) -> int:
    print(" ".join(message.split()), file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
