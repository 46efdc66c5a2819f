"""The benchmark scripts run, on a model small enough for a test, and report what they say."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from nanovllm.bench import shapes

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """script(name) is a benchmark's module, with a small shape in the place of SmolLM's."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name, value in SMALL.items():
        monkeypatch.setitem(shapes.SMOLLM_135M, name, value)
    return import_module


def test_cpu_vs_transformers(
    script: Any, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = str(tmp_path / "out.json")
    line = "--rounds 2 --scale 0.05 --num-requests 5 --single-requests 2 --no-startup --json"
    monkeypatch.setattr(sys, "argv", ["benchmarks/cpu_vs_transformers.py", *line.split(), file])
    script("cpu_vs_transformers").main()
    report = json.loads(Path(file).read_text())
    assert report["num_requests"] == 5
    assert set(report["static_batches"]) == {"4 sorted", "4 in order", "5 sorted"}
    assert len(report["rounds"]) == 2
    assert all(rate > 0 for rates in report["rounds"] for rate in rates.values())
    assert "ours / one by one" in capsys.readouterr().out


def test_peak_memory(script: Any, tmp_path: Path) -> None:
    shape = shapes.write_shape("smollm-135m", tmp_path)
    found = script("startup").peak_memory(shape, 2, 8 << 20, 1000)
    assert found["peak"] > found["bare torch"] > 50
    assert found["KV cache"] == pytest.approx(8, abs=0.5)
    assert sum(found.values()) == pytest.approx(2 * found["peak"])


def test_wall(script: Any) -> None:
    assert script("startup").wall([sys.executable, "-c", "import time; time.sleep(0.2)"], 1) > 0.2


def test_cpu_decode(
    script: Any, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = str(tmp_path / "out.json")
    line = "--batches 1,3 --context 9 --output 40 --repeats 1 --json"
    monkeypatch.setattr(sys, "argv", ["benchmarks/cpu_decode.py", *line.split(), file])
    script("cpu_decode").main()
    assert list(json.loads(Path(file).read_text())["tokens_per_second"]) == ["batch 1", "batch 3"]
    assert "batch 3" in capsys.readouterr().out
