"""Every example runs, on the model inside the package, and prints what it promises."""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from nanovllm.model_files import ASSETS

EXAMPLES = Path(__file__).parent.parent / "examples"
PROMISED = {
    "offline": ("KV cache?", "42", "[stop]"),
    "streaming": ("[stop, ",),
    "chat": ("user: What is my name?", "assistant: "),
    "async_streaming": ("prefix caching?", "first word"),
    "prefix_caching": ("tokens cached",),
    "structured_output": ("json    ", "years old", "choice  ", "[stop]"),
    "tracing": ("step 0: 64 tokens of 1 sequences", "of 2 sequences", "request-1 ends: length"),
}


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, *arguments: str) -> None:
    result: Any = load(name).main(*arguments)
    if inspect.isawaitable(result):
        asyncio.run(result)  # type: ignore[arg-type]


def test_no_example_is_forgotten() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(PROMISED)


@pytest.mark.parametrize("name", PROMISED)
def test_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert (ASSETS / "demo").is_dir(), "the embedded model is part of the package"
    run(name)
    out = capsys.readouterr().out
    for words in PROMISED[name]:
        assert words in out


def test_the_prefix_is_cached(capsys: pytest.CaptureFixture[str]) -> None:
    run("prefix_caching")
    cached = [
        int(line.split(" of ")[0].split()[-1]) for line in capsys.readouterr().out.splitlines()
    ]
    assert cached[0] == 0
    assert min(cached[1:]) >= 64
