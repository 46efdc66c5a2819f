"""On a GPU with batch_invariant: the same bits whatever happens around a request.

Without it, float32 still gives the same tokens: only the last bits of the logits may differ.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import open_model
from test_determinism import NUM_TOKENS, PARAMS, TARGET, run
from tiny_models import make_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
BOOLS = (False, True)


def answer(
    directory: Path, kind: str, *, others: int, cached: bool, preempted: bool, **options: Any
) -> tuple[list[int], list[float]]:
    """The target's tokens and their log-probabilities."""
    changed = {"device": "cuda", "max_num_seqs": 32, "block_size": 16, "max_model_len": 256}
    blocks = 60 if preempted and others else 400
    with open_model(directory, num_kv_blocks=blocks, **(changed | options)) as llm:
        if cached:
            llm.generate(TARGET, max_tokens=1, use_tqdm=False)
        output = run(llm, PARAMS[kind], others=others, preempted=preempted)
    assert len(output.token_ids) == NUM_TOKENS
    assert (output.metrics.num_cached_tokens > 0) == cached
    own = zip(output.token_ids, output.logprobs, strict=True)
    return output.token_ids, [entry[token].logprob for token, entry in own]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("family", "kind"), [("qwen3", "greedy"), ("mistral", "seeded")])
def test_same_bits_with_batch_invariant(family: str, kind: str, dtype: str, models: Any) -> None:
    expected = None
    for others, cached, chunked, preempted, eager in product((0, 31), BOOLS, BOOLS, BOOLS, BOOLS):
        found = answer(
            models(family),
            kind,
            others=others,
            cached=cached,
            preempted=preempted,
            dtype=dtype,
            batch_invariant=True,
            enforce_eager=eager,
            enable_prefix_caching=cached,
            max_num_batched_tokens=40 if chunked else 512,
        )
        expected = expected or found
        assert found == expected, f"{others=} {cached=} {chunked=} {preempted=} {eager=}"


@pytest.mark.parametrize(("family", "kind"), [("qwen3", "greedy"), ("mistral", "seeded")])
def test_same_tokens_in_float32(family: str, kind: str, models: Any) -> None:
    expected = None
    for others, cached, chunked, preempted, ahead in product((0, 31), BOOLS, BOOLS, BOOLS, BOOLS):
        tokens, _ = answer(
            models(family),
            kind,
            others=others,
            cached=cached,
            preempted=preempted,
            enable_prefix_caching=cached,
            max_num_batched_tokens=40 if chunked else 512,
            async_scheduling=ahead,
        )
        expected = expected or tokens
        assert tokens == expected, f"{others=} {cached=} {chunked=} {preempted=} {ahead=}"


def test_long_contexts_are_the_same_bits_too(tmp_path: Path) -> None:
    """Contexts of several attention chunks, alone and with others, whole and in pieces."""
    directory = make_model(tmp_path / "long", "qwen3", head_dim=64, max_position_embeddings=1024)
    prompt = [5 + i * 7 % 190 for i in range(700)]
    found = []
    for others, tokens in ((0, 2048), (40, 2048), (40, 90)):
        options = {
            "device": "cuda",
            "dtype": "bfloat16",
            "batch_invariant": True,
            "max_model_len": 1024,
            "max_num_seqs": 64,
            "max_num_batched_tokens": tokens,
            "num_kv_blocks": 2000,
            "enable_prefix_caching": False,
        }
        with open_model(directory, **options) as llm:
            prompts = [prompt, *([3 + i] * (20 + 9 * i) for i in range(others))]
            output = llm.generate(
                prompts, max_tokens=40, temperature=0.0, ignore_eos=True, logprobs=0, use_tqdm=False
            )[0]
        lps = [e[t].logprob for t, e in zip(output.token_ids, output.logprobs, strict=True)]
        found.append((output.token_ids, lps))
    assert found[0] == found[1] == found[2]
