"""--verbose: where the time of a start goes."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest

import nanovllm
from nanovllm.trace.startup import StartUp, line_of, process_seconds

PARTS = ("imports", "tokenizer", "device", "weights", "kernels", "KV cache")


def test_laps_add_up() -> None:
    start = StartUp()
    start.lap("one")
    time.sleep(0.02)
    start.lap("two")
    start.lap("one")
    assert list(start.seconds) == ["imports", "one", "two"]
    assert start.seconds["two"] >= 0.02
    line = line_of({"imports": 1.0, "weights": 0.25}, 0.5)
    assert line == (
        "start-up: imports 1.00 s · weights 0.25 s · first token 0.50 s · together 1.75 s"
    )


def test_the_process_has_an_age() -> None:
    before = process_seconds()
    time.sleep(0.05)
    assert process_seconds() >= before
    assert before < 24 * 3600


def test_an_engine_knows_its_parts(tiny: Path) -> None:
    with nanovllm.LLM(str(tiny)) as llm:
        found = llm.info.startup
    assert tuple(found) == PARTS
    assert sum(found.values()) - found["imports"] == pytest.approx(llm.info.load_seconds, abs=0.5)


def test_generate_tells_with_verbose(cli: Any, tiny: Path) -> None:
    line = ("generate", "hi", "--raw", "--model", tiny, "--max-tokens", "2", "--ignore-eos")
    assert "start-up" not in cli(*line).err
    told = cli(*line, "--verbose").err
    parts = re.search(r"start-up: (.*) · first token [\d.]+ s · together [\d.]+ s", told)
    assert parts is not None, told
    assert [p.rsplit(" ", 2)[0] for p in parts[1].split(" · ")] == list(PARTS)
    assert cli(*line, "--verbose", "--quiet").status == 2


def test_bench_tells_with_verbose(cli: Any, tiny: Path) -> None:
    line = ("bench", "cold-start", "--model", tiny, "--repeats", "1", "--verbose")
    result = cli(*line)
    assert result.status == 0, result.err
    assert re.search(r"start-up: imports .* · first token ", result.err)
    assert cli("bench", "quick", "--model", tiny, "--verbose").status == 2
