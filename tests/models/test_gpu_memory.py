"""Too little memory on a GPU: steps go on in pieces, captures are given up, answers stay."""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_model

from nanovllm import LLM, OutOfMemoryError, SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
MIB = 1 << 20
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
PROMPTS = [[5 + (7 * i * j + i) % 20000 for j in range(400)] for i in range(30)]
PARAMS = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: Any) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "wide", "qwen3", **WIDE)


def limit_memory(spare: int) -> None:
    """Lets torch take `spare` bytes more than it holds."""
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + spare) / total)


@pytest.fixture(autouse=True)
def _unlimited_again() -> Any:
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("spare", [120 * MIB, 40 * MIB])
def test_same_answers_with_little_memory(
    spare: int, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with LLM(str(model), **OPTIONS) as llm:
        want = [(o.token_ids, o.logprobs) for o in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]
    with LLM(str(model), **OPTIONS) as llm, caplog.at_level(logging.WARNING, "nanovllm"):
        limit_memory(spare)
        found = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
        assert [(o.token_ids, o.logprobs) for o in found] == want
        assert any("ran out of memory" in record.message for record in caplog.records)


def test_weights_that_do_not_fit_say_by_how_much(model: Path) -> None:
    limit_memory(20 * MIB)
    with pytest.raises(OutOfMemoryError, match=r"MiB"):
        LLM(str(model), **OPTIONS)


def test_a_cache_that_does_not_fit_after_all_is_told_in_words(model: Path) -> None:
    limit_memory(300 * MIB)
    with pytest.raises(OutOfMemoryError, match="KV cache"):
        LLM(str(model), **(OPTIONS | {"num_kv_blocks": 20000}))
