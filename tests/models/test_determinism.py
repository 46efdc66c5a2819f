"""A request's tokens, in float32, whatever happens around it: the same bits.

The kernels also promise the same log-probabilities; plain torch may round a batch of another size
differently, so there only the tokens are compared.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from reference import BACKENDS, open_model, prompts_of, use_torch_ops

from nanovllm import LLM, RequestOutput, SamplingParams

TARGET, *OTHERS = prompts_of([37, *range(5, 36)], seed=1)
NUM_TOKENS = 16
PARAMS = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=0),
    "seeded": SamplingParams(
        temperature=1.1, top_p=0.95, seed=11, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=0
    ),
}
OTHER = SamplingParams(temperature=0.8, max_tokens=NUM_TOKENS, ignore_eos=True)


def run(llm: LLM, params: SamplingParams, *, others: int, preempted: bool) -> RequestOutput:
    """Steps until the target's answer is there; others arrive before and after it."""
    core = llm._engine.core
    for prompt in OTHERS[: others // 2]:
        llm.add_request(prompt, OTHER)
    name = llm.add_request(TARGET, params)
    target = core._groups[name][0]
    for _ in range(2):
        llm.step()
    for prompt in OTHERS[others // 2 : others]:
        llm.add_request(prompt, OTHER)
    found = None
    while not llm.is_finished():
        force = preempted and not target.stats.num_preemptions
        if force and target.num_output_tokens == 5 and target.block_table:
            core.scheduler._preempt(target)  # as if another needed its blocks
        for output in llm.step():
            if output.request_id == name and output.finished:
                found = output
    assert found is not None
    assert found.metrics is not None
    assert (found.metrics.num_preemptions > 0) == preempted
    return found


def signature(output: RequestOutput, backend: str) -> tuple[list[int], list[float]]:
    assert output.logprobs is not None
    own = zip(output.token_ids, output.logprobs, strict=True)
    logprobs = [entry[token].logprob for token, entry in own]
    return output.token_ids, logprobs if backend == "default" else []


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        use_torch_ops(monkeypatch)
    return str(request.param)


@pytest.mark.parametrize(("family", "kind"), [("qwen3", "greedy"), ("mistral", "seeded")])
def test_same_tokens_whatever_happens(family: str, kind: str, models: Any, backend: str) -> None:
    directory, params = models(family), PARAMS[kind]
    expected = None
    for others, cached, chunked, preempted, ahead in product(
        (0, 31), (False, True), (False, True), (False, True), (True, False)
    ):
        options = {
            "max_num_seqs": 32,
            "max_num_batched_tokens": 40 if chunked else 512,
            "num_kv_blocks": 60 if preempted and others else 400,
            "enable_prefix_caching": cached,
            "async_scheduling": ahead,
        }
        with open_model(directory, backend, **options) as llm:
            if cached:
                llm.generate(TARGET, max_tokens=1, use_tqdm=False)
            output = run(llm, params, others=others, preempted=preempted)
            assert len(output.token_ids) == NUM_TOKENS
            assert (output.metrics.num_cached_tokens > 0) == cached
        found = signature(output, backend)
        expected = expected or found
        assert found == expected, f"{others=} {cached=} {chunked=} {preempted=} {ahead=}"
