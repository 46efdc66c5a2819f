"""Log-probabilities of prompts and answers against transformers, however the prompt is cut."""

from __future__ import annotations

from typing import Any

import pytest
from reference import open_model, prompts_of, reference_logits

from nanovllm import SamplingParams

PROMPTS = prompts_of([30, 12, 1])
PARAMS = SamplingParams(
    temperature=0.0, max_tokens=6, ignore_eos=True, logprobs=5, prompt_logprobs=3, n=2
)
TOLERANCE = 1e-4


def assert_entry(entry: Any, token_id: int, logprobs: Any, count: int) -> None:
    order = logprobs.argsort(descending=True).tolist()
    assert set(entry) == {token_id, *order[:count]}
    for token, found in entry.items():
        assert found.logprob == pytest.approx(float(logprobs[token]), abs=TOLERANCE)
        assert found.rank == 1 + order.index(token)
        assert found.token is None  # there is no tokenizer


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_batched_tokens": 8},
        {"max_num_batched_tokens": 7, "max_num_seqs": 1},
        {"num_kv_blocks": 6, "max_num_seqs": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["qwen3", "qwen2-window"])
def test_logprobs(family: str, options: dict[str, Any], models: Any) -> None:
    directory = models(family)
    with open_model(directory, **options) as llm:
        for _ in range(2):  # the second time everything is cached, and computed all the same
            outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
            for prompt, output in zip(PROMPTS, outputs, strict=True):
                ids = prompt + output.token_ids
                exact = reference_logits(directory, ids).log_softmax(-1)
                assert output.prompt_logprobs is not None
                assert len(output.prompt_logprobs) == len(prompt)
                assert output.prompt_logprobs[0] is None
                for position, entry in enumerate(output.prompt_logprobs[1:], 1):
                    assert_entry(entry, prompt[position], exact[position - 1], 3)
                for completion in output.outputs:
                    assert completion.token_ids == output.token_ids
                    assert completion.logprobs is not None
                    for index, entry in enumerate(completion.logprobs):
                        token = completion.token_ids[index]
                        assert_entry(entry, token, exact[len(prompt) + index - 1], 5)
                    total = sum(
                        e[t].logprob
                        for e, t in zip(completion.logprobs, completion.token_ids, strict=True)
                    )
                    assert completion.cumulative_logprob == pytest.approx(total)
