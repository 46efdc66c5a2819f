"""Shows versions, devices, and the backends that an engine would choose here, with reasons.

No weights are loaded. With --model it is about that model; every engine flag counts.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from nanovllm import EngineConfig
from nanovllm.cli.files import write_file
from nanovllm.cli.flags import Parser, add_engine_flags, given
from nanovllm.cli.terminal import InterruptFlag, Status

if TYPE_CHECKING:
    from nanovllm.bench.inspect import Inspection

GIB = 1 << 30


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="JSON to FILE, or to stdout"
    )
    add_engine_flags(parser)


def run(options: argparse.Namespace) -> int:
    config = EngineConfig.from_kwargs(**given(options, EngineConfig))
    with Status("looking around ..."):
        with InterruptFlag(raise_at_end=True):
            from nanovllm.bench.inspect import inspect  # loads torch: after the flags are checked

        found = inspect(config)
    if options.json is None:
        print(report(found))
        return 0
    text = json.dumps(asdict(found), ensure_ascii=False, indent=2)
    if options.json == "-":
        print(text)
    else:
        write_file(Path(options.json), text + "\n")
    return 0


def report(found: Inspection) -> str:
    """The same for people."""
    hardware, versions = found.machine["hardware"], found.machine["versions"]
    rows = [("versions", ", ".join(f"{name} {version}" for name, version in versions.items()))]
    rows += [("cpu", f"{hardware['cpu']}, {hardware['num_cores']} cores")]
    rows += [("cpu isa", " ".join(hardware["instruction_sets"]) or "unknown")]
    rows += [("threads", str(hardware["num_threads"]))]
    rows += [("gpu", gpu) for gpu in hardware["gpus"]] or [("gpu", "none that torch can use")]
    rows += [("model", f"{found.model} ({found.architecture})")]
    rows += [("device", f"{found.device}, {found.dtype}")]
    for part, choice in found.choices.items():
        rows.append((part, choice["name"]))
        if choice["reason"]:
            rows += [("", f"  {reason}") for reason in choice["reason"].split("; ")]
    for name, num_bytes in found.memory.items():
        rows.append(("memory", f"{num_bytes / GIB:.1f} GiB {name.replace('_', ' ')}"))
    rows += [("directory", f"{path} ({name})") for name, path in found.directories.items()]
    return "\n".join(f"{name:<10} {text}" for name, text in _without_repeats(rows))


def _without_repeats(rows: list[tuple[str, str]]) -> list[tuple[str, str]]:
    names = [name for name, _ in rows]
    return [
        ("" if i and name == names[i - 1] else name, text) for i, (name, text) in enumerate(rows)
    ]
