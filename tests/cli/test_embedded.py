"""Every command runs with no model named, on the one inside the package."""

from __future__ import annotations

import io
import subprocess
import sys
from typing import Any

import pytest


def test_generate_answers(cli: Any) -> None:
    result = cli("generate", "What is 12 + 30?")
    assert result.status == 0
    assert result.out.rstrip().endswith("42")


def test_generate_in_a_pipe() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "nanovllm.cli.main", "generate"],
        input="What is 2 + 3?\n",
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.rstrip().endswith("5")
    assert done.stdout.count("\n") == 1
    assert "tokens" in done.stderr


def test_chat_remembers(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "Hello! My name is Anna.\nWhat is my name?\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    result = cli("chat")
    assert result.status == 0
    assert "Anna" in result.out.splitlines()[-1]
    assert result.err.count("context") == 2


def test_info_and_bench(cli: Any) -> None:
    assert "demo" in cli("info").out
    result = cli("bench", "first-token", "--scale", "0.1", "--repeats", "1")
    assert result.status == 0
    assert result.out.splitlines()[1].startswith("first token ")
