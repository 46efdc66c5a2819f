"""What a person types, one message or command at a time, with a history across runs."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from nanovllm.cli.terminal import BOLD, CYAN, has_style, say

try:
    import readline
except ImportError:  # a Python built without it: no history and no line editing
    readline = None  # type: ignore[assignment]

HISTORY_LINES = 2000
BLOCK = '"""'


def turns(interactive: bool) -> Iterator[str]:
    """What the user enters, one message or command at a time, until the end of the input."""
    while True:
        try:
            yield read_turn(interactive)
        except EOFError:
            if interactive:
                say("")
            return
        except KeyboardInterrupt:
            if not interactive:
                raise
            say("\n(Ctrl-D leaves)")


def read_turn(interactive: bool) -> str:
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
def history() -> Iterator[None]:
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
