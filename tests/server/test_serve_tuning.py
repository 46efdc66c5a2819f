"""The comparison of flags: its arithmetic, its loads on a live server, and that the flags exist."""

from __future__ import annotations

import asyncio
import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from nanovllm.cli import serve
from nanovllm.cli.flags import Parser

from .live_server import Live

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def tuning(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return import_module("serve_tuning")


def test_flags_exist(tuning: Any) -> None:
    for case in tuning.CASES:
        for flags in (case.flags, case.other):
            parser = Parser("nanovllm serve", "")
            serve.add_arguments(parser)
            assert parser.parse([*tuning.CONTEXT, *flags]) is not None
        assert case.flags != case.other


@pytest.mark.parametrize(("name", "best"), [("prefix", (20.0, 8.0)), ("seqs-1", (99.0, 12.0))])
def test_ratio_of_best_rounds(
    tuning: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: Any,
    name: str,
    best: tuple[float, float],
) -> None:
    found = iter([30.0, 10.0, 20.0, 8.0, 99.0, 12.0])
    monkeypatch.setattr(tuning, "measure", lambda load, flags, model: next(found))
    file = tmp_path / "out.json"
    assert tuning.main(["--only", name, "--json", str(file)]) == 0
    (row,) = json.loads(file.read_text())["results"]
    assert (row["value"], row["other_value"]) == best
    assert row["ratio"] == best[0] / best[1]
    assert row["rounds"] == [[30.0, 10.0], [20.0, 8.0], [99.0, 12.0]]
    assert f"{row['ratio']:.2f}" in capsys.readouterr().out


def test_loads(tuning: Any, live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    shared, other = (tuning.body(seed, 60, 4, shared=50)["prompt"] for seed in (1, 2))
    assert len(shared) == len(other) == 60
    assert shared[:50] == other[:50] != shared[50:]
    assert shared != other
    make = tuning.body
    monkeypatch.setattr(
        tuning, "body",
        lambda seed, length, max_tokens, shared=0: make(seed, 20, max_tokens)
        | {"prompt": [5 + (seed * 31 + i) % 200 for i in range(20)]},
    )  # fmt: skip
    for load in (tuning.first_token, tuning.longest_pause, tuning.tokens_a_second):
        assert asyncio.run(load(live.port)) > 0
