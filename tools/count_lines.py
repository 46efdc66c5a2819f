"""Prints lines of code by layer, without blanks, comments and docstrings."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterable
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "nanovllm"
# What a reader must read to understand generation; everything else plugs into it.
CORE = (
    "values",
    "api",
    "engine",
    "text",
    "trace",
    "attention",
    "layers",
    "models",
    "runner",
    "executor",
)
VALUES = (
    "__init__",
    "config",
    "errors",
    "outputs",
    "progress",
    "records",
    "sampling_params",
    "structured_output",
    "interrupts",
)
# A faster form of what is in the core, which is its specification.
FAST_PATHS = {
    "runner": re.compile("^(gpu_|cpu_|cuda_graph)"),
    "attention": re.compile("^(cpu|triton)$"),
}
SKIPPED = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}


def code_lines(path: Path) -> int:
    """Lines that hold code: a statement over three lines counts as three."""
    source = path.read_text(encoding="utf-8")
    docstrings = _docstring_lines(ast.parse(source))
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in SKIPPED and token.type != tokenize.ENDMARKER:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def _docstring_lines(tree: ast.AST) -> set[int]:
    lines: set[int] = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = body[0] if body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                lines.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return lines


def layers() -> dict[str, list[Path]]:
    """Python files by layer: a folder of the package each, its own files as values and api."""
    top = sorted(PACKAGE.glob("*.py"))
    found = {
        "values": [path for path in top if path.stem in VALUES],
        "api": [path for path in top if path.stem not in VALUES],
    }
    for folder in sorted(PACKAGE.iterdir()):
        files = sorted(folder.rglob("*.py"))
        if folder.name in FAST_PATHS:
            fast = [path for path in files if FAST_PATHS[folder.name].search(path.stem)]
            found[f"fast {folder.name}"] = fast
            files = [path for path in files if path not in fast]
        if files:
            found[folder.name] = files
    return found


def _total(files: Iterable[Path]) -> int:
    return sum(code_lines(path) for path in files)


def main() -> None:
    totals = {name: _total(files) for name, files in layers().items()}
    for name, total in sorted(totals.items(), key=lambda item: (item[0] not in CORE, item[0])):
        print(f"{name:14} {total:6}{'  core' if name in CORE else ''}")
    print(f"{'core':14} {sum(totals[name] for name in CORE):6}")
    print(f"{'all':14} {sum(totals.values()):6}")


if __name__ == "__main__":
    main()
