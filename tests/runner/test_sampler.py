"""The sampler against exact distributions: never outside the support, right within it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from exact_sampling import (
    adjusted,
    chi_square_excess,
    distribution,
    draw,
    make_sampler,
    sample,
)

from nanovllm.runner.sampler import BadWords, uniform_numbers
from nanovllm.sampling_params import SamplingParams

DRAWS = 4000
LIMIT = 4.0  # deviations; a right sampler exceeds it once in 30,000 tests, and seeds are fixed
RESTRICTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cold": {"temperature": 0.3},
    "hot": {"temperature": 5.0},
    "frozen": {"temperature": 1e-300},
    "frozen, top_p": {"temperature": 1e-300, "top_p": 0.5},
    "top_k": {"top_k": 7},
    "top_k 1": {"top_k": 1},
    "top_k all": {"top_k": 10_000},
    "top_k none": {"top_k": -1},
    "top_p": {"top_p": 0.7},
    "top_p tiny": {"top_p": 1e-6},
    "top_p least": {"top_k": 30, "top_p": 5e-324, "temperature": 9.0},
    "top_p almost all": {"top_p": 0.999},
    "min_p": {"min_p": 0.15},
    "min_p 1": {"min_p": 1.0},
    "top_k top_p": {"top_k": 9, "top_p": 0.8},
    "top_p min_p": {"top_p": 0.9, "min_p": 0.1},
    "top_k min_p": {"top_k": 5, "min_p": 0.05},
    "all": {"top_k": 20, "top_p": 0.9, "min_p": 0.02, "temperature": 1.5},
    "many": {"top_k": 700, "top_p": 0.8},
    "many, min_p": {"top_k": 700, "top_p": 0.95, "min_p": 0.01, "temperature": 2.0},
}


def logits_of(vocab_size: int, scale: float) -> np.ndarray[Any, Any]:
    values = np.random.default_rng(vocab_size).normal(size=vocab_size) * scale
    return values.astype(np.float32).astype(np.float64)


# A small vocabulary, one of a single token, and two past what is looked at without sorting.
VOCABULARIES = {"small": (40, 2.0), "peaked": (1100, 4.0), "flat": (1100, 0.4), "one": (1, 1.0)}


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("name", RESTRICTIONS)
def test_distribution(name: str, vocabulary: str) -> None:
    logits = logits_of(*VOCABULARIES[vocabulary])
    p = SamplingParams(**RESTRICTIONS[name])
    expected = distribution(logits, p)
    tokens = draw(logits, p, DRAWS if len(logits) < 100 else DRAWS // 4)
    outside = {int(token) for token in tokens if expected[token] == 0.0}
    # float32 decides the border: a token within its rounding may go either way.
    border = distribution(logits, SamplingParams(**(RESTRICTIONS[name] | widened(p))))
    assert not {token for token in outside if border[token] == 0.0}
    assert chi_square_excess(tokens, expected) < LIMIT


def widened(p: SamplingParams) -> dict[str, float]:
    return {"top_p": min(1.0, p.top_p * (1 + 1e-5)), "min_p": p.min_p * (1 - 1e-5)}


def test_a_share_of_more_tokens_than_are_looked_at_first() -> None:
    """top-p is a share of what 700 tokens have, though min-p cuts after 460."""
    logits = np.full(20_000, -5.3)
    logits[:520] = np.arange(520) * -0.01
    p = SamplingParams(top_k=700, top_p=0.9, min_p=0.01)
    tokens = draw(logits, p, 200)
    assert set(tokens) <= set(np.flatnonzero(distribution(logits, p)))


def test_the_test_sees_a_wrong_distribution() -> None:
    logits = logits_of(40, 2.0)
    tokens = draw(logits, SamplingParams(temperature=1.1), DRAWS)
    assert chi_square_excess(tokens, distribution(logits, SamplingParams())) > LIMIT
    for wrong in ({"top_k": 8}, {"top_k": 6}, {"top_p": 0.99}):
        tokens = draw(logits, SamplingParams(**wrong), DRAWS)
        right = distribution(logits, SamplingParams(top_k=7))
        assert (right[tokens] == 0).any() or chi_square_excess(tokens, right) > LIMIT


def test_positions_are_independent_draws() -> None:
    """Consecutive tokens of one seed are as good as tokens of many seeds."""
    logits = logits_of(40, 1.0)
    sampler = make_sampler([SamplingParams()] * 1, seeds=[17])
    tokens = []
    for position in range(DRAWS):
        sampler._rows.num_tokens[0] = position
        tokens.append(int(sample(sampler, logits[None]).token_ids[0]))
    assert chi_square_excess(np.array(tokens), distribution(logits, SamplingParams())) < LIMIT
    pairs = np.array(tokens[:-1]) * 40 + np.array(tokens[1:])
    probs = distribution(logits, SamplingParams())
    assert chi_square_excess(pairs, np.outer(probs, probs).ravel()) < LIMIT


def test_uniform_numbers() -> None:
    seeds = np.arange(100_000, dtype=np.uint64)
    for found in (
        uniform_numbers(seeds, np.full_like(seeds, 7)),
        uniform_numbers(np.full_like(seeds, 7), seeds),
    ):
        assert found.min() >= 0.0
        assert found.max() < 1.0
        cells = (found * 64).astype(np.int64)
        assert chi_square_excess(cells, np.full(64, 1 / 64)) < LIMIT


def test_greedy_takes_the_first_maximum() -> None:
    logits = np.array([[0.0, 3.0, 3.0, 1.0], [-1e30, -1e30, -2.0, -2.0]])
    params = [SamplingParams(temperature=0.0)] * 2
    assert sample(make_sampler(params), logits).token_ids.tolist() == [1, 2]


def test_tokens_do_not_depend_on_the_batch() -> None:
    generator = np.random.default_rng(0)
    kinds: list[dict[str, Any]] = [
        {},
        {"top_p": 0.8},
        {"top_k": 3},
        {"temperature": 0.0},
        {"min_p": 0.2},
    ]
    params = [SamplingParams(**kinds[i % 5], logprobs=2) for i in range(40)]
    logits = generator.normal(size=(40, 700)) * 2
    sampler = make_sampler(params)
    together = sample(sampler, logits)
    for rows in ([0], [3, 1], list(range(39, -1, -1)), [7, *range(20, 30)]):
        found = sample(sampler, logits[rows], rows)
        assert found.token_ids.tolist() == together.token_ids[rows].tolist()
        for index, row in enumerate(rows):
            assert found.logprobs[index].token_id == together.logprobs[row].token_id


def test_logits_that_are_no_numbers_fail_their_row_alone() -> None:
    kinds: list[dict[str, Any]] = [{"temperature": 0.0}, {}, {"top_p": 0.9}, {"top_k": 2}]
    logits = np.random.default_rng(1).normal(size=(8, 30))
    logits[1::2, 5] = np.nan
    params = [SamplingParams(**kinds[i // 2]) for i in range(8)]
    sampler = make_sampler(params)
    found = sample(sampler, logits)
    assert found.failed.tolist() == [False, True] * 4
    clean = sample(sampler, logits[::2], [0, 2, 4, 6])
    assert found.token_ids[::2].tolist() == clean.token_ids.tolist()
    nothing = np.full((8, 30), -np.inf)
    assert sample(sampler, nothing).failed.all()


ADJUSTMENTS: dict[str, dict[str, Any]] = {
    "bias": {"logit_bias": {0: 3.0, 5: -100.0, 9: 0.5}},
    "allowed": {"allowed_token_ids": [4, 8, 3]},
    "bias and allowed": {"logit_bias": {4: 2.0, 5: 9.0}, "allowed_token_ids": [4, 8]},
    "minimum": {"min_tokens": 6, "stop_token_ids": [8, 11]},
    "minimum reached": {"min_tokens": 5, "stop_token_ids": [8]},
    "repetition": {"repetition_penalty": 1.7},
    "repetition reward": {"repetition_penalty": 0.6},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": -0.7},
    "penalties": {"repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.4},
    "everything": {
        "logit_bias": {4: 2.0},
        "allowed_token_ids": list(range(12)),
        "min_tokens": 9,
        "repetition_penalty": 1.3,
        "frequency_penalty": 0.5,
        "bad_words": ["x"],
    },
    "bad words": {"bad_words": ["x"]},
}
SPELLINGS = ((6,), (8, 4, 9), (4, 9), (9, 9), (2, 3, 4, 8, 4, 9, 7))
PROMPT, OUTPUT = (2, 3, 4), (8, 4, 8, 8, 4)


@pytest.mark.parametrize("name", ADJUSTMENTS)
def test_adjustments(name: str) -> None:
    logits = np.random.default_rng(3).normal(size=16) * 3
    p = SamplingParams(**ADJUSTMENTS[name])
    bad_words = BadWords(lambda word: list(SPELLINGS))
    sampler = make_sampler([p], prompt=PROMPT, output=OUTPUT, bad_words=bad_words)
    spellings = SPELLINGS if p.bad_words else ()
    expected = adjusted(logits, p, list(PROMPT), list(OUTPUT), spellings)
    assert not np.array_equal(expected, logits) or name == "minimum reached"
    count = 3000
    many = make_sampler(
        [p] * count, prompt=PROMPT, output=OUTPUT, bad_words=BadWords(lambda word: list(SPELLINGS))
    )
    probs = distribution(expected, p)
    tokens = sample(many, np.tile(logits, (count, 1))).token_ids.numpy()
    assert probs[tokens].min() > 0.0
    assert chi_square_excess(tokens, probs) < LIMIT
    greedy = SamplingParams(**ADJUSTMENTS[name], temperature=0.0)
    sampler = make_sampler([greedy], prompt=PROMPT, output=OUTPUT, bad_words=bad_words)
    assert sample(sampler, logits[None]).token_ids.tolist() == [int(expected.argmax())]


def test_logprobs_are_of_the_model_itself() -> None:
    """Before temperature, penalties and cuts; ranks count from 1; counts differ by row."""
    logits = np.random.default_rng(5).normal(size=(4, 50)) * 2
    params = [
        SamplingParams(logprobs=3, temperature=0.0),
        SamplingParams(),
        SamplingParams(logprobs=0, temperature=0.0, logit_bias={7: 100.0}),
        SamplingParams(logprobs=20, top_k=2, temperature=3.0),
    ]
    found = sample(make_sampler(params), logits)
    assert sorted(found.logprobs) == [0, 2, 3]
    exact = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for row, entry in found.logprobs.items():
        order = np.argsort(-logits[row])
        assert entry.token_id == int(found.token_ids[row])
        assert entry.rank == 1 + order.tolist().index(entry.token_id)
        assert entry.logprob == pytest.approx(exact[row, entry.token_id], abs=1e-5)
        count = params[row].logprobs
        assert count is not None
        assert [token for token, _ in entry.top] == order[:count].tolist()
        for token, logprob in entry.top:
            assert logprob == pytest.approx(exact[row, token], abs=1e-5)
    assert found.logprobs[2].token_id == 7
