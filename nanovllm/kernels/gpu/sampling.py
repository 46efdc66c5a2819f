"""Choosing tokens on the device without sorting the vocabulary.

A row with a temperature inverts its cumulative distribution at one uniform number (Devroye 1986,
chapter III), a hash of (seed, position): the one that the CPU's sampler uses. So its token does
not depend on what else is in the batch. First every program sums the weights of pieces of the
vocabulary; then a row's last program finds the piece in which the number falls, and the token
inside it. The largest of logit + Gumbel noise would be the same draw without a second look, but
takes a hash and a logarithm a token, some 45 instructions instead of 9: on an H200 that
arithmetic was 45 us for 128 rows of 151,936 logits, which are read in 9. A greedy row goes the
same way: its largest logits weigh 1, all others nothing, and the number is 0.

Resolution: the number has 53 bits, and sums over pieces and over the tokens of one are float64,
so a token of probability 1e-12 has its share too. Weights, and their sums over a piece, are
float32 relative to its largest logit: probabilities are off by less than 1e-5 of themselves.

top-k, top-p and min-p become one threshold per row, found by bisection over the ordered bits of
the logits; tokens that tie at the threshold all stay.

Shape legend: L rows that sample, V vocabulary.
"""

# mypy: disable-error-code="no-untyped-def, attr-defined, misc"
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # tokens that a program reads at once
WARPS = tl.constexpr(4)  # of a program; each sums a piece of its own, without the others' help
PIECE = tl.constexpr(TILE // WARPS.value)
PROGRAMS = 1056  # that run at once: 8 on each of an H200's multiprocessors
LOG2_E = tl.constexpr(1.4426950408889634)
MIN_TEMPERATURE = tl.constexpr(1e-6)  # as on the CPU
NO_INDEX = tl.constexpr(2**31 - 1)


@triton.jit
def _splitmix64(z):
    """Steele et al. 2014."""
    z += 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def _uniform(seed, position):
    """A float64 in [0, 1)."""
    z = _splitmix64(seed.to(tl.uint64)) ^ (position.to(tl.uint64) * 0x9E3779B97F4A7C15)
    return (_splitmix64(z) >> 11).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def _weights(x, largest, temperature):
    """exp((x - largest) / temperature); nothing for -inf; not a number if x is none, or inf."""
    top = tl.where(largest == float("-inf"), 0.0, largest)
    if temperature > 0:
        weights = tl.exp2((x - top) * (LOG2_E / tl.maximum(temperature, MIN_TEMPERATURE)))
    else:
        weights = tl.where(x == top, 1.0, 0.0)
        weights = tl.where(x < float("inf"), weights, float("nan"))
    return weights


@triton.jit
def _load(row_ptr, threshold_ptr, token, V, THRESHOLD: tl.constexpr):
    x = tl.load(row_ptr + token, mask=token < V, other=float("-inf")).to(tl.float32)
    if THRESHOLD:
        x = tl.where(x < tl.load(threshold_ptr), float("-inf"), x)  # what is no number stays
    return x


@triton.jit
def _invert(weights, u, SIZE: tl.constexpr):
    """(the index of weights [SIZE] in which u of their sum falls, how far inside, the sum).

    Never an index of no weight, even where rounding puts u behind all of them; if there is no
    weight at all, or it is not a number, some index.
    """
    i = tl.arange(0, SIZE)
    weights = weights.to(tl.float64)
    cdf = tl.cumsum(weights, 0)
    total = tl.sum(weights, 0)
    first = tl.min(tl.where((cdf > u * total) & (weights > 0), i, NO_INDEX), 0)
    last = tl.max(tl.where(weights > 0, i, 0), 0)
    index = tl.minimum(first, last)
    weight = tl.sum(tl.where(i == index, weights, 0.0), 0)
    before = tl.sum(tl.where(i == index, cdf - weights, 0.0), 0)
    inside = tl.maximum(u * total - before, 0.0) / tl.where(weight > 0, weight, 1.0)
    return index, inside, total


@triton.jit
def _sum_pieces(
    row_ptr, threshold_ptr, temperature_ptr, largest_ptr, sum_ptr, V, num_tiles,
    TILE: tl.constexpr, THRESHOLD: tl.constexpr,
):  # fmt: skip
    """Largest logits and sums of weights, relative to it, of the pieces of a program's tiles."""
    # A warp has a piece to itself, and a lane reads 16 bytes at a time: no reduction below needs
    # another warp. (Triton gives the last axis to lanes, then the first to warps.)
    COLUMNS: tl.constexpr = 4096 // row_ptr.dtype.element_ty.primitive_bitwidth
    piece = tl.arange(0, WARPS)
    step = tl.arange(0, PIECE // COLUMNS) * COLUMNS
    token = (piece * PIECE)[:, None, None] + step[None, :, None]
    token = token + tl.arange(0, COLUMNS)[None, None, :]
    temperature = tl.load(temperature_ptr)
    for tile in range(tl.program_id(1), num_tiles, tl.num_programs(1)):
        x = _load(row_ptr, threshold_ptr, tile * TILE + token, V, THRESHOLD)
        largest = tl.max(tl.max(x, 1), 1)
        weights = _weights(x, largest[:, None, None], temperature)
        tl.store(largest_ptr + tile * WARPS + piece, largest)
        tl.store(sum_ptr + tile * WARPS + piece, tl.sum(tl.sum(weights, 1), 1))


@triton.jit
def _choose_kernel(
    logits_ptr, temperature_ptr, seed_ptr, position_ptr, threshold_ptr,
    largest_ptr, sum_ptr, counter_ptr, token_ptr, failed_ptr, tokens_ptr, row_ptr,
    logits_stride, tokens_stride, context_limit, V, num_tiles,
    TILE: tl.constexpr, PIECES_PAD: tl.constexpr, THRESHOLD: tl.constexpr, SCATTER: tl.constexpr,
):  # fmt: skip
    """Grid (L, n): n programs share the tiles of a row; the last one to end takes a token.

    With SCATTER the token also goes to tokens[row, position], if the context reaches that far.
    """
    line = tl.program_id(0)
    logits_ptr += line.to(tl.int64) * logits_stride
    threshold_ptr += line
    num_pieces = num_tiles * WARPS
    largest_ptr += line * num_pieces
    sum_ptr += line * num_pieces
    _sum_pieces(
        logits_ptr, threshold_ptr, temperature_ptr + line, largest_ptr, sum_ptr, V, num_tiles,
        TILE, THRESHOLD,
    )  # fmt: skip
    tl.debug_barrier()
    if tl.atomic_add(counter_ptr + line, 1, sem="acq_rel") != tl.num_programs(1) - 1:
        return
    temperature = tl.load(temperature_ptr + line)
    position = tl.load(position_ptr + line)
    u = tl.where(temperature > 0, _uniform(tl.load(seed_ptr + line), position), 0.0)
    i = tl.arange(0, PIECES_PAD)
    known = i < num_pieces
    x = tl.load(largest_ptr + i, mask=known, other=float("-inf"), cache_modifier=".cg")
    sums = tl.load(sum_ptr + i, mask=known, other=0.0, cache_modifier=".cg")
    piece, u, total = _invert(sums * _weights(x, tl.max(x, 0), temperature), u, PIECES_PAD)
    token = piece * PIECE + tl.arange(0, PIECE)
    x = _load(logits_ptr, threshold_ptr, token, V, THRESHOLD)
    index, _, _ = _invert(_weights(x, tl.max(x, 0), temperature), u, PIECE)
    chosen = tl.minimum(piece * PIECE + index, V - 1)
    tl.store(token_ptr + line, chosen.to(tl.int64))
    tl.store(failed_ptr + line, (total > 0) == 0)  # so also if not a number
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
    """Where pieces meet; counters are zero between launches."""

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device) -> None:
        pieces = triton.cdiv(vocab_size, TILE) * WARPS.value
        self.largest = torch.empty(num_rows * pieces, dtype=torch.float32, device=device)
        self.sum = torch.empty(num_rows * pieces, dtype=torch.float32, device=device)
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
    rounds = triton.cdiv(tiles, max(1, PROGRAMS // num_rows))
    tokens, rows = scatter or (token_ids, token_ids)
    _choose_kernel[(num_rows, triton.cdiv(tiles, rounds))](
        logits, params.temperature, params.seed, params.position, workspace.threshold,
        workspace.largest, workspace.sum, workspace.counter, token_ids, failed, tokens, rows,
        logits.stride(0), tokens.stride(0), tokens.shape[-1], vocab, tiles,
        TILE, triton.next_power_of_2(tiles * WARPS.value), restricted, scatter is not None,
        num_warps=WARPS.value,
    )  # fmt: skip
