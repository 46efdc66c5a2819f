"""A conversation in the terminal: answers stream, Ctrl-C stops an answer, Ctrl-D leaves.

A line that ends in a backslash goes on, and so does everything between two lines of three double
quotes. Lines that start with a slash are commands: /help lists them.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from pathlib import Path

from nanovllm import NanoVLLMError, RequestOutput, SamplingParams, __version__
from nanovllm.cli.conversation import ChatError, Conversation
from nanovllm.cli.flags import Parser, add_engine_flags, add_sampling_flags, given
from nanovllm.cli.session import Session, answer, open_session, speed
from nanovllm.cli.terminal import BOLD, CYAN, RED, YELLOW, has_style, say, styled, write_answer

try:
    import readline
except ImportError:  # a Python built without it: no history and no line editing
    readline = None  # type: ignore[assignment]

HISTORY_LINES = 2000
BLOCK = '"""'


def add_arguments(parser: Parser) -> None:
    parser.add_argument("--system", metavar="TEXT", help="a system message to start with")
    parser.add_argument("--load", metavar="FILE", help="go on with a chat that /save wrote")
    add_sampling_flags(parser, skip=("n", "logprobs", "prompt_logprobs"))
    add_engine_flags(parser)


def run(options: argparse.Namespace) -> int:
    conversation = Conversation({}, options.system)
    if options.load:
        _load_file(conversation, options.load)
    session = open_session(options)
    conversation.sampling = (
        session.sampling | conversation.sampling | given(options, SamplingParams)
    )
    chat = Chat(session, conversation)
    interactive = sys.stdin.isatty()
    if interactive:
        info = session.llm.info
        where = f"{info.device}, {info.dtype} · context {info.max_model_len} tokens"
        say(f"nanovllm {__version__} · {session.name} · {where}")
        say("/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves")
    with _history() if interactive else contextlib.nullcontext():
        for text in _turns(interactive):
            chat.obey(text)
            if chat.done:
                break
    session.llm.close()
    return 0


class Chat:
    """Obeys one input after the other: commands, and messages to the model."""

    def __init__(self, session: Session, conversation: Conversation) -> None:
        self._session = session
        self._conversation = conversation
        self._last: RequestOutput | None = None
        self._num_answers = self._num_tokens = 0
        self.done = False
        self.commands: dict[str, tuple[str, str, Callable[[str], None]]] = {
            "/help": ("", "this list", self._help),
            "/system": ("TEXT|none", "set or remove the system message; alone: show", self._system),
            "/set": ("NAME VALUE", "set a sampling option; alone: show them", self._set),
            "/clear": ("", "forget the conversation, keep settings and system", self._clear),
            "/save": ("FILE", "write the conversation", self._save),
            "/load": ("FILE", "go on with a saved conversation", self._load),
            "/stats": ("", "the last answer, the session and the engine in numbers", self._stats),
            "/quit": ("", "leave, as Ctrl-D does", self._quit),
        }

    def obey(self, text: str) -> None:
        """A command or a message; what goes wrong is said, never raised."""
        try:
            if text.startswith("/") and "\n" not in text:
                self._command(text)
            elif text.strip():
                self._ask(text)
        except (ChatError, NanoVLLMError, OSError) as error:
            if isinstance(error, BrokenPipeError):
                raise
            say(str(error), RED)

    def _command(self, text: str) -> None:
        name, _, argument = text.partition(" ")
        if name not in self.commands:
            near = get_close_matches(name, self.commands, 1)
            hint = f"did you mean {near[0]}?" if near else "/help lists the commands"
            raise ChatError(f"unknown command {name}; {hint}")
        self.commands[name][2](argument.strip())

    def _ask(self, text: str) -> None:
        llm, chat = self._session.llm, self._conversation
        before = list(chat.messages)
        chat.messages.append({"role": "user", "content": text})
        try:
            tokens, num_dropped = chat.fit(llm.render_chat, llm.info.max_model_len)
            if num_dropped:
                say(f"[the context is full: {num_dropped} oldest messages forgotten]", YELLOW)
            output, interrupted = answer(llm, tokens, chat.params, write_answer)
        except BaseException:
            chat.messages = before
            raise
        print(flush=True)
        chat.messages.append({"role": "assistant", "content": output.text})
        self._count(output)
        say(f"[{speed(output)} · {self._context(output)}{self._ending(output, interrupted)}]")

    def _count(self, output: RequestOutput) -> None:
        self._last = output
        self._num_answers += 1
        self._num_tokens += len(output.token_ids)

    def _context(self, output: RequestOutput) -> str:
        used = len(output.prompt_token_ids) + len(output.token_ids)
        limit = self._session.llm.info.max_model_len
        return f"context {used} / {limit} ({used / limit:.0%})"

    def _ending(self, output: RequestOutput, interrupted: bool) -> str:
        if interrupted:
            return " · stopped"
        if output.finish_reason == "length":
            limit = self._conversation.sampling.get("max_tokens")
            full = limit is None or len(output.token_ids) < limit
            return " · the context is full" if full else f" · max_tokens={limit} reached"
        return f" · {output.outputs[0].error}" if output.finish_reason == "error" else ""

    # --- commands ---------------------------------------------------------------------------

    def _help(self, argument: str) -> None:
        rows = [(f"{name} {values}", text) for name, (values, text, _) in self.commands.items()]
        rows += [("\\ at the end", "the line goes on"), (BLOCK, "opens and closes several lines")]
        rows += [("Ctrl-C", "stops an answer, not the program")]
        for keys, text in rows:
            say(f"  {styled(f'{keys:<19}', BOLD)}{text}", style="0")

    def _system(self, argument: str) -> None:
        if argument:
            self._conversation.system = None if argument == "none" else argument
        text = self._conversation.system
        say("no system message" if text is None else f"system: {text}")

    def _set(self, argument: str) -> None:
        name, *values = re.split(r"[\s=]+", argument, maxsplit=1)  # a value may hold both
        if name and not any(values):
            raise ChatError(f"/set {name} needs a value")
        if name:
            self._conversation.set(name.replace("-", "_"), values[0])
        for key, current in self._conversation.sampling.items():
            say(f"  {key} = {current}")

    def _clear(self, argument: str) -> None:
        self._conversation.messages.clear()
        say("forgotten")

    def _save(self, argument: str) -> None:
        path = _path(argument, "/save")
        self._conversation.save(path)
        say(f"{len(self._conversation.messages)} messages written to {path}")

    def _load(self, argument: str) -> None:
        path = _path(argument, "/load")
        self._conversation.load(path)
        say(f"{len(self._conversation.messages)} messages read from {path}")

    def _stats(self, argument: str) -> None:
        if self._last is not None and self._last.metrics is not None:
            metrics = self._last.metrics
            say(f"  last answer  {speed(self._last)}, {metrics.total_time:.2f} s in all")
            say(
                f"  its prompt   {metrics.num_prompt_tokens} tokens, "
                f"{metrics.num_cached_tokens} of them from the prefix cache"
            )
        say(f"  session      {self._num_answers} answers, {self._num_tokens} tokens")
        info = self._session.llm.info
        backends = ", ".join(f"{part}: {choice.name}" for part, choice in info.choices.items())
        say(f"  engine       {info.device}, {info.dtype}, {backends}")
        say(f"  KV cache     {info.num_blocks} blocks of {info.block_size} slots")

    def _quit(self, argument: str) -> None:
        self.done = True


def _path(argument: str, command: str) -> Path:
    if not argument:
        raise ChatError(f"{command} needs a file name")
    return Path(argument).expanduser()


def _load_file(conversation: Conversation, name: str) -> None:
    try:
        conversation.load(Path(name).expanduser())
    except ChatError as error:
        raise OSError(str(error)) from None


def _turns(interactive: bool) -> Iterator[str]:
    """What the user enters, one message or command at a time, until the end of the input."""
    while True:
        try:
            yield _read_turn(interactive)
        except EOFError:
            if interactive:
                say("")
            return
        except KeyboardInterrupt:
            if not interactive:
                raise
            say("\n(Ctrl-D leaves)")


def _read_turn(interactive: bool) -> str:
    """One turn, which may be several lines. Raises EOFError at the end."""
    line = _read_line("> ", interactive)
    if line.strip().startswith(BLOCK):
        return _read_block(line.strip()[len(BLOCK) :], interactive)
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(_read_line(". ", interactive))
    return "\n".join(lines)


def _read_block(first: str, interactive: bool) -> str:
    lines = [first] if first else []
    while not (lines and lines[-1].rstrip().endswith(BLOCK)):
        lines.append(_read_line(". ", interactive))
    lines[-1] = lines[-1].rstrip()[: -len(BLOCK)]
    return "\n".join(lines).strip("\n")


def _read_line(prompt: str, interactive: bool) -> str:
    if not interactive or not sys.stdout.isatty():
        if interactive:  # the answers go elsewhere, and the prompt does not belong there
            print(prompt, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\n")
    if has_style(sys.stdout) and readline is not None:
        prompt = f"\x01\x1b[{BOLD};{CYAN}m\x02{prompt}\x01\x1b[0m\x02"  # \x01..\x02: no width
    return input(prompt)


def history_file() -> Path:
    """Where what was typed is kept (XDG base directory specification)."""
    root = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(root) / "nanovllm" / "chat_history"


@contextlib.contextmanager
def _history() -> Iterator[None]:
    """Line editing with the history of earlier runs; a file that cannot be written is no error."""
    if readline is None:
        yield
        return
    path = history_file()
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        readline.read_history_file(path)
    readline.set_history_length(HISTORY_LINES)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            readline.write_history_file(path)
            path.chmod(0o600)
