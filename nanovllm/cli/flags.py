"""Flags made from option records: names, types and help come from EngineConfig and SamplingParams.

A new field of a record is a new flag without a line here. Values are only converted; whether they
are allowed is the record's own business. Imports no torch.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import Field, fields
from difflib import get_close_matches
from itertools import takewhile
from typing import Any, NoReturn

from nanovllm import EngineConfig, SamplingParams

COMMON_ENGINE = (
    "model",
    "dtype",
    "device",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "enable_prefix_caching",
    "attention_backend",
    "load_format",
    "tensor_parallel_size",
    "seed",
)
COMMON_SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "n",
    "max_tokens",
    "stop",
    "ignore_eos",
)
NOT_SAMPLING_FLAGS = ("seed", "detokenize")  # the engine has the first; text is what we print
HELP = {  # where the record's own words do not fit a command line, or there are none
    "seed": "fixes the random choices; another seed gives another answer",
    "tensor_parallel_size": "devices that one model is spread over",
    "max_tokens": "tokens to generate at most; without it the context is the limit",
    "structured_output": 'the form of the text: {"json": SCHEMA}, {"regex": ...}, {"grammar": ...} '
    'or {"choice": [...]}',
}
DESCRIPTIONS = {
    "sampling": "What is not said here is as in the model's generation_config.json where that says "
    "do_sample, and greedy elsewhere; the end of the context bounds the length.",
}
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_HELP_ENTRY = re.compile(r"^ {4}(\w+(?:, \w+)*) +(\S.*)$")


class UsageError(Exception):
    """A command line that cannot be understood; the message is the whole answer."""


class Parser(argparse.ArgumentParser):
    """One command's flags. Errors are raised as UsageError; rare flags show in --help=all only."""

    def __init__(self, prog: str, description: str, *, show_all: bool = False) -> None:
        super().__init__(
            prog=prog,
            description=description,
            add_help=False,
            allow_abbrev=False,
            formatter_class=_Formatter,
        )
        self.show_all = show_all
        self.add_argument(
            "-h", "--help", nargs="?", const="common", choices=["common", "all"],
            metavar="all", help="print the common flags, or all of them, and exit",
        )  # fmt: skip

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace | None:
        """The flags, or None if help was asked for and printed. Raises UsageError."""
        flags = takewhile(lambda a: a != "--", arguments)  # what follows it is text
        wants_help = [a for a in flags if a in ("-h", "--help") or a.startswith("--help=")]
        if wants_help and wants_help[0] in ("-h", "--help", "--help=common", "--help=all"):
            print(self.format_help(), end="")
            return None
        options, unknown = self.parse_known_args(arguments)
        if unknown:
            self._refuse(unknown)
        return options

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message}")

    def _refuse(self, unknown: Sequence[str]) -> NoReturn:
        word = unknown[0].split("=")[0]
        if not word.startswith("-"):
            raise UsageError(
                f"{self.prog}: unexpected argument {word!r} (quote a text with spaces)"
            )
        flags = list(self._option_string_actions)
        longer = [flag for flag in flags if flag.startswith(word)] if len(word) > 3 else []
        near = get_close_matches(word, longer, 1, cutoff=0) or get_close_matches(word, flags, 1)
        hint = f"; did you mean {near[0]}?" if near else f"; {self.prog} --help=all lists all"
        raise UsageError(f"{self.prog}: unknown flag {word}{hint}")


class _Formatter(argparse.HelpFormatter):
    """Two columns; a flag with a value shows it once."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=100)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if action.dest == "help":
            return "-h, --help[=all]"
        return super()._format_action_invocation(action)

    def add_usage(self, usage: Any, actions: Any, groups: Any, prefix: Any = None) -> None:
        positional = [a.metavar or a.dest for a in actions if not a.option_strings]
        words = "".join(f" [{name}]" for name in positional)
        super().add_usage(f"%(prog)s{words} [FLAGS]", actions, groups, prefix)


def add_engine_flags(parser: Parser, skip: Collection[str] = ()) -> None:
    """Every key of EngineConfig."""
    _add_record(parser, "engine", EngineConfig, COMMON_ENGINE, skip)


def add_sampling_flags(parser: Parser, skip: Collection[str] = ()) -> None:
    """Every sampling parameter but those that make no sense on a command line."""
    skip = (*skip, *NOT_SAMPLING_FLAGS)
    _add_record(parser, "sampling", SamplingParams, COMMON_SAMPLING, skip)


def given(options: argparse.Namespace, record: type) -> dict[str, Any]:
    """The fields of record that were set on the command line."""
    names = {field.name for field in fields(record)}
    return {name: value for name, value in vars(options).items() if name in names}


def convert(record: type, name: str, text: str) -> Any:
    """A field's value from text, for those who set it otherwise than by a flag.

    Raises KeyError for an unknown name, ValueError for text that is no such value.
    """
    field = {f.name: f for f in fields(record)}[name]
    if "None" in str(field.type) and text.lower() == "none":
        return None
    if "bool" in str(field.type):
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{name} is true or false")
        return text.lower() == "true"
    options = _value_options(field)
    value = options.get("type", str)(text)
    return [value] if options.get("action") == "append" else value


def field_help(record: type) -> dict[str, str]:
    """What the record's docstring says of each field."""
    known = {field.name for field in fields(record)}
    found: dict[str, str] = {}
    names: list[str] = []
    for line in (record.__doc__ or "").splitlines():
        entry = _HELP_ENTRY.match(line)
        if entry and known.issuperset(entry[1].split(", ")):
            names = entry[1].split(", ")
            found |= dict.fromkeys(names, entry[2])
        elif names and line.startswith(" " * 8):
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
        else:
            names = []
    return found | HELP


def _add_record(
    parser: Parser, title: str, record: type, common: Sequence[str], skip: Collection[str]
) -> None:
    group = parser.add_argument_group(title, DESCRIPTIONS.get(title))
    texts = field_help(record)
    for field in fields(record):
        if field.name in skip:
            continue
        text = texts.get(field.name, "").replace("%", "%%")
        shown = parser.show_all or field.name in common
        group.add_argument(
            "--" + field.name.replace("_", "-"),
            dest=field.name,
            default=argparse.SUPPRESS,
            help=text if shown else argparse.SUPPRESS,
            **_value_options(field),
        )


def _value_options(field: Field[Any]) -> dict[str, Any]:
    """argparse's options for the type of a field."""
    kind = str(field.type)
    if kind.startswith("bool"):
        return {"action": argparse.BooleanOptionalAction}
    if "StructuredOutput" in kind:
        return {"type": structure, "metavar": "JSON"}
    if "Mapping" in kind:
        return {"type": id_bias, "metavar": "ID=BIAS,..."}
    if "tuple[int" in kind:
        return {"type": integers, "metavar": "ID,..."}
    if "tuple[str" in kind:
        return {"action": "append", "metavar": "TEXT"}
    if "int" in kind:
        in_bytes = field.name.endswith("_bytes")
        return {"type": size, "metavar": "BYTES"} if in_bytes else {"type": int, "metavar": "N"}
    if "float" in kind:
        return {"type": float, "metavar": "X"}
    return {"metavar": field.name.split("_")[-1].upper()}


def size(text: str) -> int:
    """Bytes, with a unit if wanted: 4GiB, 500M. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?i?)b?", text.strip().lower())
    if match is None or match[2] not in UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; 4GiB or 500M would be")
    return int(float(match[1]) * UNITS[match[2]])


def integers(text: str) -> list[int]:
    """Integers separated by commas. Raises ValueError."""
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of integers like 1,2,3") from None


def id_bias(text: str) -> Mapping[int, float]:
    """Token ids and what is added to their logits: 50=-100,31=5. Raises ValueError."""
    try:
        pairs = [part.split("=") for part in text.split(",")]
        return {int(token_id): float(bias) for token_id, bias in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list like 50=-100,31=5") from None


def structure(text: str) -> Mapping[str, Any]:
    """The form of a text, in StructuredOutput's names. Raises ValueError."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text!r:.60} is no JSON like {{"regex": "[a-z]+"}}')
    return value


def refuse(command: str, message: str) -> NoReturn:
    """For what a flag's type cannot check."""
    raise UsageError(f"nanovllm {command}: {message}")
