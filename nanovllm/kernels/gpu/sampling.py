"""Choosing tokens on the device without sorting the vocabulary.

A row with a temperature takes the maximum of logit / temperature + Gumbel noise, which is a draw
from the softmax (Gumbel 1954; Maddison et al. 2014); Gumbel noise being -log of an exponential
draw, that is the least of draw / exp(logit / temperature), at one logarithm a token instead of
two. The noise is a hash of (seed, position, token), so a row's token does not depend on what else
is in the batch. top-k, top-p and min-p
become one threshold per row, found by bisection over the ordered bits of the logits; tokens that
tie at the threshold all stay.

Shape legend: L rows that sample, V vocabulary.
"""

# mypy: disable-error-code="no-untyped-def, attr-defined, misc"
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import libdevice

TILE = 4096
LOG2_E = tl.constexpr(1.4426950408889634)
NO_TOKEN = tl.constexpr(2**31 - 1)


@triton.jit
def _mix(h):
    """The 32-bit finaliser of MurmurHash3 (Appleby 2011)."""
    h ^= h >> 16
    h = (h * 0x85EBCA6B).to(tl.uint32)
    h ^= h >> 13
    h = (h * 0xC2B2AE35).to(tl.uint32)
    return h ^ (h >> 16)


@triton.jit
def _exponential(seed, position, token, FAST: tl.constexpr):
    """Draws of the standard exponential; the small ones keep full precision, since these win."""
    low = seed.to(tl.uint32)
    high = (seed >> 32).to(tl.uint32)
    key = _mix(low ^ _mix(high ^ _mix(position.to(tl.uint32) + 0x9E3779B9)))
    bits = _mix((token.to(tl.uint32) * 0x9E3779B1 + key).to(tl.uint32))
    u = bits.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10  # in (0, 1]
    rest = tl.maximum(1.0 - u, 1e-10)
    # The device's own logarithm is good to 2**-22 here: enough where the result is not small.
    large = -libdevice.fast_logf(rest) if FAST else -tl.log(rest)
    small = u * (1.0 + u * (0.5 + u * (1.0 / 3 + u * 0.25)))  # of -log(1 - u)
    return tl.where(u < 0.03, small, large)


@triton.jit
def _best_of_tile(x, token, temperature, seed, position, FAST: tl.constexpr):
    """(largest noisy logit / temperature, the first token that has it); without noise if greedy."""
    best = tl.max(x, 0)
    index = tl.min(tl.where(x == best, token, NO_TOKEN), 0)
    if temperature > 0:
        scale = LOG2_E / temperature
        top = tl.where(tl.abs(best) == float("inf"), 0.0, best * scale)  # nothing to choose from
        race = _exponential(seed, position, token, FAST) * tl.exp2(top - x * scale)
        least = tl.min(race, 0)
        index = tl.min(tl.where(race == least, token, NO_TOKEN), 0)
        best = (top - tl.log2(tl.maximum(least, 1e-30))) / LOG2_E
    return best, index


@triton.jit
def _choose_kernel(
    logits_ptr, temperature_ptr, seed_ptr, position_ptr, threshold_ptr,
    best_ptr, index_ptr, counter_ptr, token_ptr, failed_ptr, tokens_ptr, row_ptr,
    logits_stride, tokens_stride, context_limit, V, num_tiles,
    TILE: tl.constexpr, TILES_PAD: tl.constexpr, THRESHOLD: tl.constexpr, SCATTER: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """Grid (L, tiles of V): the best token of a tile; the row's last program takes the best tile.

    With SCATTER the token also goes to tokens[row, position], if the context reaches that far.
    """
    line = tl.program_id(0)
    tile = tl.program_id(1)
    token = tile * TILE + tl.arange(0, TILE)
    x = tl.load(
        logits_ptr + line.to(tl.int64) * logits_stride + token, mask=token < V, other=float("-inf")
    ).to(tl.float32)
    broken = tl.max(tl.where(x < float("inf"), 0, 1), 0)  # or not a number
    if THRESHOLD:
        x = tl.where(x >= tl.load(threshold_ptr + line), x, float("-inf"))
    temperature = tl.load(temperature_ptr + line)
    position = tl.load(position_ptr + line)
    seed = tl.load(seed_ptr + line)
    best, index = _best_of_tile(x, token, temperature, seed, position, FAST)
    best = tl.where(broken > 0, float("inf"), best)
    tl.store(best_ptr + line * num_tiles + tile, best)
    tl.store(index_ptr + line * num_tiles + tile, tl.minimum(index, V - 1))  # all were broken
    tl.debug_barrier()
    if tl.atomic_add(counter_ptr + line, 1, sem="acq_rel") != num_tiles - 1:
        return
    t = tl.arange(0, TILES_PAD)
    bests = tl.load(
        best_ptr + line * num_tiles + t,
        mask=t < num_tiles,
        other=float("-inf"),
        cache_modifier=".cg",
    )
    winner = tl.argmax(bests, 0)
    top = tl.max(bests, 0)
    chosen = tl.load(index_ptr + line * num_tiles + winner, cache_modifier=".cg")
    tl.store(token_ptr + line, chosen.to(tl.int64))
    tl.store(failed_ptr + line, (top == float("inf")) | (top == float("-inf")))
    tl.store(counter_ptr + line, 0)
    if SCATTER:
        row = tl.load(row_ptr + line)
        if (row >= 0) & (position < context_limit):
            tl.store(tokens_ptr + row.to(tl.int64) * tokens_stride + position, chosen.to(tl.int32))


@triton.jit
def _keys(x, SHIFT: tl.constexpr):
    """Integers in the order of the floats; SHIFT drops bits that the logits' dtype never had."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def _weight_from(row_ptr, key, top, temperature, V, TILE: tl.constexpr, SHIFT: tl.constexpr,
                 COUNT: tl.constexpr):  # fmt: skip
    """How many tokens (COUNT), or how much of exp((x - top) / temperature), have at least `key`."""
    total = 0.0
    for start in range(0, V, TILE):
        token = start + tl.arange(0, TILE)
        x = tl.load(row_ptr + token, mask=token < V, other=float("-inf")).to(tl.float32)
        weight = 1.0
        if not COUNT:
            weight = tl.exp((x - top) / temperature)
        total += tl.sum(tl.where((_keys(x, SHIFT) >= key) & (token < V), weight, 0.0), 0)
    return total


@triton.jit
def _threshold_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, threshold_ptr,
    logits_stride, V, TILE: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Grid (L): the least logit that top-k, then top-p, and min-p leave; -inf if none is set."""
    line = tl.program_id(0)
    temperature = tl.load(temperature_ptr + line)
    top_k = tl.load(top_k_ptr + line)
    top_p = tl.load(top_p_ptr + line)
    min_p = tl.load(min_p_ptr + line)
    limited = (top_k > 0) & (top_k < V)
    if (temperature == 0) | ((not limited) & (top_p >= 1) & (min_p <= 0)):
        tl.store(threshold_ptr + line, float("-inf"))
        return
    row_ptr = logits_ptr + line.to(tl.int64) * logits_stride
    top = float("-inf")
    for start in range(0, V, TILE):
        token = start + tl.arange(0, TILE)
        x = tl.load(row_ptr + token, mask=token < V, other=float("-inf")).to(tl.float32)
        top = tl.maximum(top, tl.max(x, 0))
    # Tokens 60 temperatures below the best weigh nothing: bisection may start there.
    highest = _keys(top, SHIFT)
    lowest = _keys(top - 60.0 * temperature, SHIFT)
    if limited:
        low = _keys(top * 0.0 - 3.4e38, SHIFT)
        high = highest
        while low < high:
            middle = (low | high) - ((low ^ high) >> 1)  # the mean, rounded up, without overflow
            if _weight_from(row_ptr, middle, top, temperature, V, TILE, SHIFT, True) >= top_k:
                low = middle
            else:
                high = middle - 1
        lowest = low
    if top_p < 1:
        target = top_p * _weight_from(row_ptr, lowest, top, temperature, V, TILE, SHIFT, False)
        low = lowest
        high = highest
        while low < high:
            middle = (low | high) - ((low ^ high) >> 1)  # the mean, rounded up, without overflow
            if _weight_from(row_ptr, middle, top, temperature, V, TILE, SHIFT, False) >= target:
                low = middle
            else:
                high = middle - 1
        lowest = low
    key = lowest << SHIFT
    bits = key ^ ((key >> 31) & 0x7FFFFFFF)
    threshold = bits.to(tl.float32, bitcast=True)
    if min_p > 0:
        threshold = tl.maximum(threshold, top + temperature * tl.log(min_p))
    tl.store(threshold_ptr + line, tl.minimum(threshold, top))


@dataclass(frozen=True)
class RowParams:
    """Sampling parameters [L] on the device; position is that of the token to be chosen."""

    temperature: Tensor  # float32; 0 is greedy
    seed: Tensor  # int64
    position: Tensor  # int32
    top_k: Tensor  # int32; 0 keeps all
    top_p: Tensor  # float32
    min_p: Tensor  # float32


class Workspace:
    """Where tiles meet; counters are zero between launches."""

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device) -> None:
        tiles = triton.cdiv(vocab_size, TILE)
        self.best = torch.empty(num_rows * tiles, dtype=torch.float32, device=device)
        self.index = torch.empty(num_rows * tiles, dtype=torch.int32, device=device)
        self.counter = torch.zeros(num_rows, dtype=torch.int32, device=device)
        self.threshold = torch.empty(num_rows, dtype=torch.float32, device=device)


def thresholds(logits: Tensor, params: RowParams, out: Tensor) -> Tensor:
    """Least logit kept in each row of [L, V]."""
    shift = 16 if logits.dtype == torch.bfloat16 else 0
    _threshold_kernel[(len(logits),)](
        logits, params.temperature, params.top_k, params.top_p, params.min_p, out,
        logits.stride(0), logits.shape[1], min(TILE * 2, triton.next_power_of_2(logits.shape[1])),
        shift, num_warps=16,
    )  # fmt: skip
    return out


def choose(
    logits: Tensor,
    params: RowParams,
    workspace: Workspace,
    token_ids: Tensor,
    failed: Tensor,
    *,
    restricted: bool,
    scatter: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Writes token_ids [L] int64, and failed [L] bool where logits are not finite.

    restricted must be set if any row has top-k, top-p or min-p. scatter is (tokens [R, C] int32,
    row of each line [L] int32, -1 for padding): where each token goes for the next step.
    """
    num_rows, vocab = logits.shape
    if restricted:
        thresholds(logits, params, workspace.threshold)
    tiles = triton.cdiv(vocab, TILE)
    tokens, rows = scatter or (token_ids, token_ids)
    _choose_kernel[(num_rows, tiles)](
        logits, params.temperature, params.seed, params.position, workspace.threshold,
        workspace.best, workspace.index, workspace.counter, token_ids, failed, tokens, rows,
        logits.stride(0), tokens.stride(0), tokens.shape[-1], vocab, tiles,
        TILE, triton.next_power_of_2(tiles), restricted, scatter is not None, logits.is_cuda,
        num_warps=8,
    )  # fmt: skip
