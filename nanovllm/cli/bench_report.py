"""Compares what `bench serve --json` wrote: tables on stdout, --html writes a page with plots."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from nanovllm.bench import html, serve_report
from nanovllm.bench.table import table
from nanovllm.cli.files import write_file
from nanovllm.cli.flags import Parser, refuse
from nanovllm.cli.terminal import YELLOW, say


def add_arguments(parser: Parser) -> None:
    parser.add_argument("files", nargs="*", metavar="FILE", help="one or more, from --json")
    parser.add_argument("--html", metavar="FILE", help="write a page that compares them")
    parser.add_argument(
        "--labels", metavar="A,B,...", help="names of the runs; else those that they have"
    )


def run(options: argparse.Namespace) -> int:
    if not options.files:
        refuse("bench report", "name one or more files that bench serve --json wrote")
    contents = [serve_report.read(Path(name)) for name in options.files]
    names = _names(options, [content["label"] for content in contents])
    for name, content in zip(names, contents, strict=True):
        print("\n\n".join([name, *(table(rows) for rows in serve_report.tables(content))]) + "\n")
        for note in serve_report.notes(content):
            say(f"{name}, {note}", YELLOW)
    if options.html is not None:
        write_file(Path(options.html), html.page(contents, names))
    return 0


def _names(options: argparse.Namespace, labels: Sequence[str]) -> list[str]:
    """Unique: where labels are not, the files' names are added."""
    if options.labels is not None:
        names = [name.strip() for name in options.labels.split(",")]
        if len(names) != len(labels) or len(set(names)) < len(names) or not all(names):
            refuse("bench report", f"--labels must be {len(labels)} different names, with commas")
        return names
    if len(set(labels)) == len(labels):
        return list(labels)
    stems = [Path(name).stem for name in options.files]
    if len(set(stems)) == len(stems):
        return stems
    return [f"{label} {i}" for i, label in enumerate(labels, 1)]
