"""Too little memory on a GPU: steps go on in pieces, captures are given up, answers stay."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_model

from nanovllm.runner.cuda_graph import GraphCache

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
# A step of 8192 tokens takes 270 MB for one layer's gates alone; the weights are 210 MB.
WIDE = {"hidden_size": 1024, "intermediate_size": 8192, "vocab_size": 30000}
OPTIONS = {
    "skip_tokenizer_init": True,
    "dtype": "bfloat16",
    "device": "cuda",
    "batch_invariant": True,
    "num_kv_blocks": 400,
    "max_num_seqs": 64,
    "max_num_batched_tokens": 8192,
    "enable_prefix_caching": False,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: Any) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "wide", "qwen3", **WIDE)


def run(model: Path, spare: int, when: str = "after", **options: Any) -> dict[str, Any]:
    script = Path(__file__).with_name("little_memory.py")
    arguments = [str(model), str(spare), when, json.dumps(OPTIONS | options)]
    done = subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def unlimited(model: Path) -> dict[str, Any]:
    found = run(model, 0)
    assert not found["errors"]
    assert not any("out of memory" in line for line in found["log"])
    return found


@pytest.mark.parametrize("spare", [120, 40])
def test_same_answers_with_little_memory(
    spare: int, model: Path, unlimited: dict[str, Any]
) -> None:
    found = run(model, spare)
    assert not found["errors"]
    assert found["answers"] == unlimited["answers"]
    assert any("ran out of memory" in line for line in found["log"])


def test_weights_that_do_not_fit_are_told_in_words(model: Path) -> None:
    assert "MiB" in run(model, 20, "before")["error"]


def test_a_cache_that_does_not_fit_after_all_is_told_in_words(model: Path) -> None:
    assert "KV cache" in run(model, 300, "before", num_kv_blocks=20000)["error"]


def test_steps_are_captured_after_the_first_capture_was_given_up() -> None:
    cache, counter = GraphCache(torch.device("cuda")), torch.zeros(1, device="cuda")
    runs = []

    def too_large() -> None:
        runs.append(torch.cuda.is_current_stream_capturing())
        torch.empty(1 << 22, device="cuda").zero_()
        if runs[-1]:
            raise torch.OutOfMemoryError("no room for a capture")

    def small() -> None:
        runs.append(torch.cuda.is_current_stream_capturing())
        counter.add_(1)

    cache.run("large", too_large)
    for _ in range(3):
        cache.run("small", small)
    cache.run("large", too_large)
    assert runs == [False, True, False, True, False]
    assert counter.item() == 3
