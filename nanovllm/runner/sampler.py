"""Chooses the next token of each row from its logits.

The order of operations: logit bias, allowed ids, bad words and minimum length; repetition,
presence and frequency penalties; temperature; top-k; top-p on what is left of the mass; min-p
relative to the most likely token. Greedy rows take the first maximum. A sampled row inverts the
cumulative distribution at one uniform number, a hash of (seed, position): the same seed gives the
same token whatever else is in the batch.

Shape legend: L rows that sample, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanovllm.engine.plan import TokenLogprobs
from nanovllm.runner.constraints import Masks
from nanovllm.runner.rows import RowState
from nanovllm.sampling_params import SamplingParams

# Rows with top-k or top-p look at this many candidates first, and sort the whole vocabulary only
# if these do not hold the mass that was asked for.
NUM_CANDIDATES = 512
# Colder than this is not greedier, but divides logits to infinity.
MIN_TEMPERATURE = 1e-6
NOT_FINITE = "the model's logits are not finite numbers"
# The cumulative sum goes in two levels: over tiles, then inside one.
TILE = 256
PAIR_BYTES = 16  # of a token id and its log-probability: see TokenLogprobs


@dataclass(slots=True)
class Sampled:
    """token_ids [L] on the device; failed [L] where the logits were not numbers.

    logprobs and errors are by index into the L rows; an error ends the row's sequence.
    """

    token_ids: Tensor
    failed: Tensor
    logprobs: dict[int, TokenLogprobs]
    errors: dict[int, str] = field(default_factory=dict)

    def reasons(self) -> dict[int, str]:
        """Why rows cannot go on, by index into the L rows; waits for the device."""
        failed = {i: NOT_FINITE for i, wrong in enumerate(self.failed.tolist()) if wrong}
        return failed | self.errors


class Sampler:
    """stop_ids are the model's own end tokens, which min_tokens forbids at first."""

    def __init__(self, rows: RowState, stop_ids: tuple[int, ...], bad_words: BadWords) -> None:
        self._rows = rows
        self._stop_ids = stop_ids
        self._bad_words = bad_words

    def sample(
        self,
        logits: Tensor,
        sample_rows: NDArray[np.int64],
        filling: Future[Masks] | None = None,
    ) -> Sampled:
        """logits [L, V] float32 (changed in place) of rows sample_rows [L]; filling gives the
        masks of those that are constrained."""
        params = [self._params(row) for row in sample_rows]
        wanted = [i for i, p in enumerate(params) if p.logprobs is not None]
        raw = logits[wanted].clone() if wanted else None
        for i, (row, p) in enumerate(zip(sample_rows, params, strict=True)):
            self.adjust(logits[i], int(row), p)
        errors = filling.result().apply(logits) if filling is not None else {}
        greedy = [i for i, p in enumerate(params) if p.greedy]
        plain = [i for i, p in enumerate(params) if not (p.greedy or p.restricted)]
        restricted = [i for i, p in enumerate(params) if p.restricted]
        token_ids = torch.empty(len(params), dtype=torch.int64, device=logits.device)
        failed = torch.zeros(len(params), dtype=torch.bool, device=logits.device)
        if greedy:
            token_ids[greedy], failed[greedy] = _largest(_pick(logits, greedy))
        for group, choose in ((plain, _sample_plain), (restricted, _sample_restricted)):
            if group:
                uniform = self._uniform(sample_rows[group]).to(logits.device)
                chosen = [params[i] for i in group]
                token_ids[group], failed[group] = choose(_pick(logits, group), chosen, uniform)
        logprobs = {}
        if raw is not None:
            counts = [params[i].logprobs or 0 for i in wanted]
            found = token_logprobs(raw, token_ids[wanted], counts)
            logprobs = dict(zip(wanted, found, strict=True))
        return Sampled(token_ids, failed, logprobs, errors)

    def _params(self, row: int) -> SamplingParams:
        params = self._rows.params[row]
        assert params is not None, f"row {row} samples but holds no sequence"
        return params

    def _uniform(self, rows: NDArray[np.int64]) -> Tensor:
        positions = self._rows.num_tokens[rows].astype(np.uint64)
        return torch.from_numpy(uniform_numbers(self._rows.seeds[rows], positions))

    def adjust(self, logits: Tensor, row: int, p: SamplingParams) -> None:
        """Applies what one row asks for, in place; most rows ask for nothing."""
        if p.logit_bias:
            ids = torch.tensor(list(p.logit_bias), device=logits.device)
            logits[ids] += torch.tensor(list(p.logit_bias.values()), device=logits.device)
        if p.allowed_token_ids is not None:
            allowed = torch.tensor(p.allowed_token_ids, device=logits.device)
            kept = logits[allowed]
            logits.fill_(float("-inf"))
            logits[allowed] = kept
        if p.bad_words:
            known = self._rows.tokens[row, : self._rows.num_tokens[row]]
            self._bad_words.forbid(logits, known, p)
        num_output = self._rows.num_tokens[row] - self._rows.num_prompt[row]
        if num_output < p.min_tokens:
            logits[[*self._stop_ids, *(p.stop_token_ids or ())]] = float("-inf")
        self._penalize(logits, row, p)

    def _penalize(self, logits: Tensor, row: int, p: SamplingParams) -> None:
        if p.repetition_penalty == 1.0 and not p.presence_penalty and not p.frequency_penalty:
            return
        known = self._rows.tokens[row, : self._rows.num_tokens[row]].long()
        if p.repetition_penalty != 1.0:
            scores = logits[known]
            by = p.repetition_penalty
            logits[known] = torch.where(scores > 0, scores / by, scores * by)
        if p.presence_penalty or p.frequency_penalty:
            output = known[self._rows.num_prompt[row] :]
            ids, counts = output.unique(return_counts=True)
            logits[ids] -= p.presence_penalty + p.frequency_penalty * counts


BadWordEncoder = Callable[[str], list[tuple[int, ...]]]


class BadWords:
    """Token sequences of forbidden words; `encode` turns a word into its possible spellings."""

    def __init__(self, encode: BadWordEncoder | None = None) -> None:
        self._encode = encode
        self._cache: dict[tuple[str, ...], list[tuple[int, ...]]] = {}

    def forbid(self, logits: Tensor, known: Tensor, params: SamplingParams) -> None:
        """Forbids each token that would complete a bad word after the tokens in `known`."""
        for spelling in self.spellings(tuple(params.bad_words or ())):
            *head, last = spelling
            if len(head) > len(known):
                continue
            tail = known[len(known) - len(head) :]
            prefix = torch.tensor(head, dtype=known.dtype, device=known.device)
            forbidden = (tail == prefix).all()
            logits[last] = torch.where(forbidden, float("-inf"), logits[last])

    def spellings(self, words: tuple[str, ...]) -> list[tuple[int, ...]]:
        if words not in self._cache:
            assert self._encode is not None, "bad_words need a tokenizer"
            if len(self._cache) >= 256:
                self._cache.clear()
            found = (ids for word in words for ids in self._encode(word))
            self._cache[words] = list(dict.fromkeys(found))
        return self._cache[words]


def _pick(logits: Tensor, index: list[int]) -> Tensor:
    return logits if len(index) == len(logits) else logits[index]


def _largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """First maximum of each row [L, V], and whether it is no number."""
    if logits.device.type == "cpu":  # numpy's is vectorised: 13 times as fast as torch's
        ids = torch.from_numpy(logits.numpy().argmax(-1))
    else:
        ids = logits.argmax(-1)
    return ids, ~logits.gather(1, ids.unsqueeze(1)).squeeze(1).isfinite()


def uniform_numbers(
    seeds: NDArray[np.uint64], positions: NDArray[np.uint64]
) -> NDArray[np.float64]:
    """Numbers in [0, 1) from (seed, position): SplitMix64 (Steele et al. 2014) as a hash."""
    with np.errstate(over="ignore"):
        z = _splitmix64(seeds) ^ (positions * np.uint64(0x9E3779B97F4A7C15))
        return (_splitmix64(z) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _splitmix64(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _temperatures(params: list[SamplingParams], device: torch.device) -> Tensor:
    values = [[max(p.temperature, MIN_TEMPERATURE)] for p in params]
    return torch.tensor(values, dtype=torch.float32, device=device)


def _sample_plain(
    logits: Tensor, params: list[SamplingParams], uniform: Tensor
) -> tuple[Tensor, Tensor]:
    """Temperature only: no token is cut off."""
    probs = (logits / _temperatures(params, logits.device)).softmax(-1)
    return invert_cdf(probs, uniform), probs[:, 0].isnan()


def invert_cdf(weights: Tensor, uniform: Tensor) -> Tensor:
    """Index i of [L, V] with cdf[i - 1] <= u * total < cdf[i]; never one of weight zero.

    Rows without any weight (their logits were not numbers) get some index below V.
    """
    num_rows, vocab = weights.shape
    padded = torch.nn.functional.pad(weights, (0, -vocab % TILE)).view(num_rows, -1, TILE)
    tile_cdf = padded.sum(-1, dtype=torch.float64).cumsum(-1)
    target = (uniform * tile_cdf[:, -1]).unsqueeze(1)
    tile = (tile_cdf <= target).sum(-1, keepdim=True).clamp_(max=tile_cdf.shape[1] - 1)
    before = torch.where(tile > 0, tile_cdf.gather(1, (tile - 1).clamp(min=0)), 0.0)
    inside = padded[torch.arange(num_rows, device=tile.device), tile[:, 0]].double()
    cdf = inside.cumsum(-1)
    offset = (cdf <= target - before).sum(-1, keepdim=True)
    # Rounding may leave the target past the tile's end: take its last token of any weight.
    last = TILE - 1 - (inside > 0).flip(-1).int().argmax(-1, keepdim=True)
    return (tile * TILE + torch.minimum(offset, last)).squeeze(1).clamp_(max=vocab - 1)


def _sample_restricted(
    logits: Tensor, params: list[SamplingParams], uniform: Tensor
) -> tuple[Tensor, Tensor]:
    """top-k, top-p and min-p over the most likely tokens, in order of probability."""
    scaled = logits / _temperatures(params, logits.device)
    log_total = scaled.logsumexp(-1, keepdim=True)
    count = min(NUM_CANDIDATES, scaled.shape[1])
    values, ids = scaled.topk(count, dim=-1)
    probs = (values - log_total).exp()
    kept = _cut(probs, params)
    chosen = ids.gather(1, invert_cdf(kept, uniform).unsqueeze(1)).squeeze(1)
    if count < scaled.shape[1]:
        for i in _unsure(probs, params):
            row_values, row_ids = scaled[i : i + 1].sort(dim=-1, descending=True, stable=True)
            row_kept = _cut((row_values - log_total[i]).exp(), params[i : i + 1])
            chosen[i] = row_ids[0, invert_cdf(row_kept, uniform[i : i + 1])[0]]
    return chosen, ~log_total.squeeze(1).isfinite()


def _cut(probs: Tensor, params: list[SamplingParams]) -> Tensor:
    """Zeroes what top-k, top-p and min-p drop from [L, C] probabilities in descending order."""
    size, device = probs.shape[1], probs.device
    limited = [0 < p.top_k <= size for p in params]
    top_k = torch.tensor(
        [[p.top_k if limit else size] for p, limit in zip(params, limited, strict=True)],
        device=device,
    )
    top_p = torch.tensor([[p.top_p] for p in params], dtype=torch.float64, device=device)
    min_p = torch.tensor([[p.min_p] for p in params], dtype=torch.float32, device=device)
    kept = torch.where(torch.arange(size, device=device) < top_k, probs, 0.0)
    mass = kept.double().cumsum(-1)
    # top-p is a share of what top-k left
    all_k = torch.where(torch.tensor(limited, device=device)[:, None], mass[:, -1:], 1.0)
    kept = torch.where(mass - kept < top_p * all_k, kept, 0.0)
    kept[:, 0] = probs[:, 0]  # the most likely one stays, even if the share rounds to nothing
    return torch.where(probs >= min_p * probs[:, :1], kept, 0.0)


def _unsure(probs: Tensor, params: list[SamplingParams]) -> list[int]:
    """Rows whose candidates may not hold everything that is to be kept."""
    size = probs.shape[1]
    mass = probs.double().sum(-1).tolist()
    least = (probs[:, -1] / probs[:, 0]).tolist()
    return [
        i
        for i, p in enumerate(params)
        if not (0 < p.top_k <= size)
        and not (p.top_p < 1.0 and p.top_k <= 0 and mass[i] >= p.top_p)
        and not (p.min_p > 0.0 and least[i] < p.min_p and (p.top_k <= 0 or p.top_p == 1.0))
    ]


def token_logprobs(logits: Tensor, token_ids: Tensor, counts: list[int]) -> list[TokenLogprobs]:
    """Log-softmax of [L, V] at token_ids [L], with the counts[i] most likely tokens of row i."""
    logprobs = logits.float().log_softmax(-1)
    own = logprobs.gather(1, token_ids.unsqueeze(1))
    ranks = (logprobs > own).sum(-1).add(1)
    values, ids = logprobs.topk(min(max(1, *counts), logprobs.shape[1]), dim=-1)
    tops = torch.stack([ids.cpu().double(), values.cpu().double()], -1)
    return pack_logprobs(token_ids, own[:, 0], ranks, tops, counts)


def pack_logprobs(
    token_ids: Tensor, own: Tensor, ranks: Tensor, tops: Tensor, counts: Sequence[int]
) -> list[TokenLogprobs]:
    """One record for each of L tokens, with the first counts[i] of its tops.

    token_ids, ranks [L] integers, own [L]; tops [L, K, 2] float64 on the host: (token id,
    log-probability), best first, K >= counts.
    """
    packed = tops.numpy().tobytes()
    starts = range(0, len(packed), PAIR_BYTES * tops.shape[1])
    columns = (token_ids.tolist(), own.tolist(), ranks.tolist(), starts, counts)
    return [
        TokenLogprobs(token, logprob, rank, packed[start : start + PAIR_BYTES * count])
        for token, logprob, rank, start, count in zip(*columns, strict=True)
    ]
