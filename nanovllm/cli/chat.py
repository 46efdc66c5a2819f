"""A conversation in the terminal: answers stream, Ctrl-C stops an answer, Ctrl-D leaves.

With --url the answers come from a server, else from a model in this process. A line that ends in a
backslash goes on, and so does everything between two lines of three double quotes. Lines that
start with a slash are commands: /help lists them.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from nanovllm import EngineConfig, NanoVLLMError, SamplingParams, __version__
from nanovllm.cli.conversation import NOT_SENT, ChatError, Conversation
from nanovllm.cli.flags import Parser, add_engine_flags, add_sampling_flags, given, refuse
from nanovllm.cli.partner import LocalPartner, Partner, Reply
from nanovllm.cli.session import open_session
from nanovllm.cli.terminal import BOLD, RED, YELLOW, say, styled, write_answer
from nanovllm.cli.turns import BLOCK, history, turns

ALIASES = {"/exit": "/quit", "/q": "/quit", "/bye": "/quit", "/?": "/help"}  # of other chats
WITH_URL = ("model", "seed")  # of the engine's flags those that mean something to a server


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--url",
        metavar="URL",
        help="talk to a server with OpenAI's interface, such as http://127.0.0.1:8000; "
        "--model is then a name that it knows, and what is not said here is its own default",
    )
    parser.add_argument("--api-key", metavar="KEY", help="what the server asks for")
    parser.add_argument("--system", metavar="TEXT", help="a system message to start with")
    parser.add_argument("--load", metavar="FILE", help="go on with a chat that /save wrote")
    add_sampling_flags(parser, skip=("n", "logprobs", "prompt_logprobs"))
    add_engine_flags(parser)


def run(options: argparse.Namespace) -> int:
    refused = NOT_SENT if options.url is not None else ()
    conversation = Conversation({}, options.system, refused=refused)
    if options.load:
        _load_file(conversation, options.load)
    partner, sampling = _open(options)
    try:
        conversation.sampling = sampling | conversation.sampling | given(options, SamplingParams)
        _talk(Chat(partner, conversation), sys.stdin.isatty())
    finally:
        partner.close()
    return 0


def _talk(chat: Chat, interactive: bool) -> None:
    if interactive:
        say(f"nanovllm {__version__} · {chat.headline}")
        say("/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves")
    with history() if interactive else contextlib.nullcontext():
        for text in turns(interactive):
            chat.obey(text)
            if chat.done:
                break


def _open(options: argparse.Namespace) -> tuple[Partner, dict[str, Any]]:
    """(whom to talk to, its sampling options where nothing else is said)"""
    if options.url is None:
        if options.api_key is not None:
            refuse("chat", "--api-key is for a server: give its --url too")
        session = open_session(options)
        return LocalPartner(session), session.sampling
    wrong = [name for name in given(options, EngineConfig) if name not in WITH_URL]
    if wrong:
        refuse("chat", f"--{wrong[0].replace('_', '-')} is the server's own choice with --url")
    wanted = {"max_tokens": None} | given(options, SamplingParams)
    SamplingParams.from_kwargs(**wanted)
    for name in wanted:
        if name in NOT_SENT:
            refuse("chat", f"--{name.replace('_', '-')} has no meaning with --url")
    # asyncio takes a while to load, and chats with a model in this process do without.
    from nanovllm.cli.remote import RemotePartner

    partner = RemotePartner(options.url, options.api_key, getattr(options, "model", None))
    return partner, wanted


class Chat:
    """Obeys one input after the other: commands, and messages to the model."""

    def __init__(self, partner: Partner, conversation: Conversation) -> None:
        self.headline = partner.headline()
        self._partner = partner
        self._conversation = conversation
        self._last: Reply | None = None
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
            if isinstance(error, OSError) and error.filename is None:
                raise  # no file that the user named: nobody reads the answers, or the disk is full
            say(str(error), RED)

    def _command(self, text: str) -> None:
        name, _, argument = text.partition(" ")
        name = ALIASES.get(name, name)
        if name not in self.commands:
            near = get_close_matches(name, self.commands, 1)
            hint = f"did you mean {near[0]}?" if near else "/help lists the commands"
            raise ChatError(f"unknown command {name}; {hint}")
        self.commands[name][2](argument.strip())

    def _ask(self, text: str) -> None:
        chat = self._conversation
        before = list(chat.messages)
        chat.messages.append({"role": "user", "content": text})
        try:
            reply = self._partner.reply(chat, write_answer, lambda words: say(words, YELLOW))
        except BaseException:
            chat.messages = before
            raise
        print(flush=True)
        if reply.interrupted and not reply.text:
            chat.messages = before
            say("[stopped before the first word: the question is forgotten]")
            return
        chat.messages.append({"role": "assistant", "content": reply.text})
        self._last = reply
        self._num_answers += 1
        self._num_tokens += reply.num_tokens
        say(f"[{reply.speed()}{self._context(reply)}{self._ending(reply)}]")

    def _context(self, reply: Reply) -> str:
        if reply.num_prompt_tokens is None:
            return ""
        used, limit = reply.num_prompt_tokens + reply.num_tokens, self._partner.context
        return f" · context {used}" + (f" / {limit} ({used / limit:.0%})" if limit else " tokens")

    def _ending(self, reply: Reply) -> str:
        if reply.interrupted:
            return " · stopped"
        if reply.finish_reason == "length":
            limit = self._conversation.sampling.get("max_tokens")
            full = limit is None or reply.num_tokens < limit
            return " · the context is full" if full else f" · max_tokens={limit} reached"
        return f" · {reply.error}" if reply.finish_reason == "error" else ""

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
        rows = {}
        if self._last is not None:
            rows["last answer"] = f"{self._last.speed()}, {self._last.seconds:.2f} s in all"
            if self._last.num_prompt_tokens is not None:
                cached = self._last.num_cached_tokens
                known = "" if cached is None else f", {cached} of them from the prefix cache"
                rows["its prompt"] = f"{self._last.num_prompt_tokens} tokens{known}"
        rows["session"] = f"{self._num_answers} answers, {self._num_tokens} tokens"
        for name, text in (rows | self._partner.facts()).items():
            say(f"  {name:<12} {text}")

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
