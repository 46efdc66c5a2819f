"""The soak in small: it passes on a sound server, and its checks see what they are there for."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMALL = "--seconds 4 --clients 12 --num-kv-blocks 24 --max-model-len 384 --json"


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return import_module("soak")


@pytest.mark.slow
def test_a_few_seconds_of_it(soak: Any, tmp_path: Path, model_dir: Path) -> None:
    file = tmp_path / "soak.json"
    status = soak.main([*SMALL.split(), str(file), "--model", str(model_dir)])
    report = json.loads(file.read_text())
    assert status == 0, report["checks"]
    outcomes = report["outcomes"]
    assert sum(n for name, n in outcomes.items() if name.startswith("hostile")) >= 10
    assert outcomes["polite: answered"] > 4
    assert outcomes["left early: gone"] > 1
    assert report["metrics"]["num_preemptions"] > 0
    assert set(report["samples"]) == {"http", "engine"}


def samples(soak: Any, memory: Any) -> list[Any]:
    return [soak.Sample(second, memory(second), 10, 5) for second in range(600)]


@pytest.mark.parametrize(
    ("memory", "holds"),
    [
        (lambda second: 200.0 + second % 7, True),
        (lambda second: 200.0 + 50 * (second < 100), True),  # what is given back
        (lambda second: 200.0 + 50 * (second > 60), True),  # grown while it warmed up
        (lambda second: 200.0 + second / 10, False),
        (lambda second: 200.0 + 30 * (second > 400), False),
    ],
)
def test_flat(soak: Any, memory: Any, holds: bool) -> None:
    assert soak.flat(samples(soak, memory))[1] is holds


def test_each_loss_is_seen(soak: Any) -> None:
    def seen(**changes: Any) -> dict[str, Any]:
        canary = soak.Canary(expected=[1])
        for answer in ([1], [1]):
            canary.compare(answer)
        sound = {
            "canary": canary,
            "load": {"num_free_blocks": 9, "num_blocks": 9},
            "metrics": {"num_preemptions": 1.0, "errors": 0.0},
            "unexpected": [],
            "exit_status": 0,
            "before": {"http": soak.Sample(0, 200.0, 10, 5)},
            "after": {"http": soak.Sample(600, 200.0, 10, 5)},
            "samples": {"http": samples(soak, lambda second: 200.0)},
        }
        return sound | changes

    def failed(**changes: Any) -> list[str]:
        return [check.name for check in soak.judge(seen(**changes)) if not check.holds]

    assert failed() == []
    assert failed(load={"num_free_blocks": 8, "num_blocks": 9}) == ["free blocks"]
    assert failed(metrics={"num_preemptions": 0.0, "errors": 0.0}) == ["preemptions"]
    assert failed(metrics={"num_preemptions": 1.0, "errors": 2.0}) == [
        "sequences ended with an error"
    ]
    changed = soak.Canary(expected=[1], num_same=2)
    changed.compare([2])
    assert failed(canary=changed) == ["canary answers that differ"]
    assert failed(canary=soak.Canary(num_same=1)) == ["canary answers"]
    assert failed(unexpected=["500"]) == ["unexpected answers"]
    assert failed(exit_status=1) == ["exit status"]
    more = {"http": soak.Sample(600, 200.0, 11, 6)}
    assert failed(after=more) == ["num_files of http", "num_threads of http"]
    growing = {"http": samples(soak, lambda second: 200.0 + second)}
    assert failed(samples=growing) == ["memory of http"]
