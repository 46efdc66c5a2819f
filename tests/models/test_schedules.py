"""However the scheduler cuts, caches, preempts or forks: the tokens are those of transformers."""

from __future__ import annotations

from typing import Any

import pytest
from reference import (
    BACKENDS,
    GREEDY,
    assert_greedy,
    open_model,
    prompts_of,
    runner_of,
    use_torch_ops,
)

from nanovllm import SamplingParams

PROMPTS = prompts_of([27, 3, 19, 41, 26])
LONGEST = 41
FAMILIES = ("qwen3", "qwen2-window", "llama3", "mistral")
SHORT = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        use_torch_ops(monkeypatch)
    return str(request.param)


@pytest.mark.parametrize("budget", range(1, LONGEST + 2))
def test_chunks_of_every_size(budget: int, models: Any) -> None:
    directory = models("qwen3")
    with open_model(directory, max_num_batched_tokens=budget, max_num_seqs=1) as llm:
        runner_of(llm).kv_cache.fill_(float("nan"))
        for prompt, output in zip(PROMPTS, llm.generate(PROMPTS, SHORT, False), strict=True):
            assert_greedy(directory, prompt, output.token_ids)


@pytest.mark.parametrize("budget", [4, 10, 33])
@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_mixed_with_decoding(family: str, budget: int, models: Any, backend: str) -> None:
    directory = models(family)
    with open_model(directory, backend, max_num_batched_tokens=budget, max_num_seqs=4) as llm:
        for prompt, output in zip(PROMPTS, llm.generate(PROMPTS, SHORT, False), strict=True):
            assert_greedy(directory, prompt, output.token_ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_prefix_cache_hits(family: str, models: Any, backend: str) -> None:
    directory = models(family)
    prefix, *tails = prompts_of([24, 1, 7, 30])
    prompts = [prefix, *(prefix + tail for tail in tails), prefix[:17], prefix[:16]]
    expected = [0, 24, 24, 24, 16, 8]  # whole blocks of 8, but for the last token
    with open_model(directory, backend) as llm:
        for prompt, num_cached in zip(prompts, expected, strict=True):
            output = llm.generate(prompt, SHORT, False)
            assert output.metrics.num_cached_tokens == num_cached
            assert_greedy(directory, prompt, output.token_ids)
        again = prompts[3] + output.token_ids[:3]
        assert_greedy(directory, again, llm.generate(again, SHORT, False).token_ids)
        assert llm._engine.core.scheduler.blocks.num_used == 0


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_preemption(family: str, caching: bool, models: Any, backend: str) -> None:
    directory = models(family)
    options: dict[str, Any] = {"num_kv_blocks": 15, "enable_prefix_caching": caching}
    with open_model(directory, backend, **options) as llm:
        runner_of(llm).kv_cache.fill_(float("nan"))
        outputs = llm.generate(PROMPTS, GREEDY, False)
        assert sum(output.metrics.num_preemptions for output in outputs) > 0
        for prompt, output in zip(PROMPTS, outputs, strict=True):
            assert len(output.token_ids) == 64
            assert_greedy(directory, prompt, output.token_ids)


@pytest.mark.parametrize("length", [1, 16, 17])
@pytest.mark.parametrize("family", FAMILIES)
def test_several_completions(family: str, length: int, models: Any, backend: str) -> None:
    """Greedy completions of one prompt are equal; sampled ones equal those of a lone sequence."""
    directory = models(family)
    prompt = prompts_of([length])[0]
    with open_model(directory, backend, max_num_seqs=3) as llm:
        runner_of(llm).kv_cache.fill_(float("nan"))
        greedy = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, n=4)
        first, *others = llm.generate(prompt, greedy, False).outputs
        assert_greedy(directory, prompt, first.token_ids)
        assert all(other.token_ids == first.token_ids for other in others)
        seeded = SamplingParams(temperature=0.7, max_tokens=12, ignore_eos=True, n=4, seed=5)
        several = [o.token_ids for o in llm.generate(prompt, seeded, False).outputs]
    with open_model(directory, backend, max_num_seqs=1, enable_prefix_caching=False) as llm:
        alone = [o.token_ids for o in llm.generate(prompt, seeded, False).outputs]
    assert several == alone
    assert len({tuple(tokens) for tokens in several}) == 4


@pytest.mark.parametrize("max_model_len", [45, 48])
@pytest.mark.parametrize("family", ["qwen3", "mistral"])
def test_to_the_end_of_the_context(family: str, max_model_len: int, models: Any) -> None:
    """The last token is sampled and never computed: there is no slot for it."""
    directory, prompts = models(family), prompts_of([1, 20, max_model_len - 1])
    params = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True, n=2)
    with open_model(directory, max_model_len=max_model_len) as llm:
        for prompt, output in zip(prompts, llm.generate(prompts, params, False), strict=True):
            assert len(prompt) + len(output.token_ids) == max_model_len
            assert output.finish_reason == "length"
            assert output.outputs[1].token_ids == output.token_ids
            assert_greedy(directory, prompt, output.token_ids)


def test_more_completions_than_rows(models: Any) -> None:
    directory, prompt = models("qwen3"), prompts_of([19])[0]
    params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True, n=64)
    with open_model(directory, max_num_seqs=5, num_kv_blocks=12) as llm:
        outputs = llm.generate(prompt, params, False).outputs
    assert [output.index for output in outputs] == list(range(64))
    assert all(output.token_ids == outputs[0].token_ids for output in outputs)
    assert_greedy(directory, prompt, outputs[0].token_ids)
