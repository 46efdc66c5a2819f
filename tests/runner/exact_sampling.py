"""What a sampler should do, in plain numpy and float64, one row at a time."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from nanovllm.engine.plan import NewRow
from nanovllm.runner.rows import RowState
from nanovllm.runner.sampler import BadWords, Sampled, Sampler
from nanovllm.sampling_params import SamplingParams

Floats = NDArray[np.float64]
STOP_IDS = (1,)


def adjusted(
    logits: Floats,
    p: SamplingParams,
    prompt: list[int],
    output: list[int],
    bad_words: tuple[tuple[int, ...], ...] = (),
) -> Floats:
    """Logits after bias, allowed ids, bad words, minimum length and penalties."""
    logits = logits.astype(np.float64)
    known = prompt + output
    for token_id, bias in (p.logit_bias or {}).items():
        logits[token_id] += bias
    forbidden = set()
    if p.allowed_token_ids is not None:
        forbidden |= set(range(len(logits))) - set(p.allowed_token_ids)
    for *head, last in bad_words:
        if known[len(known) - len(head) :] == head:
            forbidden.add(last)
    if len(output) < p.min_tokens:
        forbidden |= {*STOP_IDS, *(p.stop_token_ids or ())}
    logits[list(forbidden)] = -np.inf
    for token_id in set(known):
        by = p.repetition_penalty
        logits[token_id] = logits[token_id] / by if logits[token_id] > 0 else logits[token_id] * by
    for token_id in set(output):
        logits[token_id] -= p.presence_penalty + p.frequency_penalty * output.count(token_id)
    return logits


def distribution(logits: Floats, p: SamplingParams) -> Floats:
    """Probabilities after temperature, top-k, top-p and min-p."""
    probs = np.exp((logits - logits.max()) / max(p.temperature, 1e-9))
    probs /= probs.sum()
    order = np.argsort(-probs, kind="stable")
    kept = np.ones(len(probs), bool)
    if p.top_k > 0:
        kept[order[p.top_k :]] = False
    probs_k = np.where(kept, probs, 0.0)
    probs_k /= probs_k.sum()
    before = np.cumsum(probs_k[order]) - probs_k[order]
    kept[order[1:][before[1:] >= p.top_p]] = False
    kept &= probs >= p.min_p * probs.max()
    result: Floats = np.where(kept, probs, 0.0)
    return result / result.sum()


def make_sampler(
    params: list[SamplingParams],
    *,
    prompt: tuple[int, ...] = (2, 3),
    output: tuple[int, ...] = (),
    seeds: list[int] | None = None,
    bad_words: BadWords | None = None,
) -> Sampler:
    """A sampler over one row for each of params."""
    rows = RowState(len(params), 64, 8, torch.device("cpu"))
    for row, p in enumerate(params):
        seed = row if seeds is None else seeds[row]
        rows._start(NewRow(row, prompt + output, len(prompt), 0, (), p, seed))
    return Sampler(rows, STOP_IDS, bad_words or BadWords())


def draw(logits: Floats, p: SamplingParams, count: int, first_seed: int = 0) -> NDArray[np.int64]:
    """`count` tokens from one distribution, with as many seeds."""
    sampler = make_sampler([p] * count, seeds=list(range(first_seed, first_seed + count)))
    found = sample(sampler, np.tile(logits, (count, 1)))
    assert not found.failed.any()
    tokens: NDArray[np.int64] = found.token_ids.numpy()
    return tokens


def sample(sampler: Sampler, logits: Floats, rows: list[int] | None = None) -> Sampled:
    chosen = np.arange(len(logits)) if rows is None else np.array(rows)
    return sampler.sample(torch.tensor(logits, dtype=torch.float32), chosen)


def chi_square_excess(tokens: NDArray[np.int64], probs: Floats) -> float:
    """How many deviations the statistic lies above its mean; cells of small expectation merge.

    The cube root of chi-square over its degrees of freedom is close to normal (Wilson and
    Hilferty 1931).
    """
    expected = probs * len(tokens)
    counts = np.bincount(tokens, minlength=len(probs)).astype(np.float64)
    large = expected >= 5
    observed = np.append(counts[large], counts[~large].sum())
    wanted = np.append(expected[large], expected[~large].sum())
    cells = wanted > 1e-9
    statistic = ((observed[cells] - wanted[cells]) ** 2 / wanted[cells]).sum()
    freedom = max(1, cells.sum() - 1)
    spread = 2 / (9 * freedom)
    return float(((statistic / freedom) ** (1 / 3) - (1 - spread)) / spread**0.5)
