"""Log-probabilities of chosen tokens, their ranks, and the most likely tokens, in two launches.

Every tile of the vocabulary is read once: its maximum and sum of exponentials, how many of its
logits lie above the chosen one, and its best tokens. A second program a line joins the tiles. A
token's key is its logit, in an integer of the same order, above its id: lower ids win ties.

Shape legend: n lines, L lines of logits, V vocabulary, K best tokens (a power of two).
"""

# mypy: disable-error-code="no-untyped-def, attr-defined, misc"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096
LEAST = tl.constexpr(-0x7FFFFFFF00000000)  # below every key
LOW_BITS = tl.constexpr(0xFFFFFFFF)


@triton.jit
def _tile_kernel(
    logits_ptr, line_ptr, chosen_ptr, stats_ptr, keys_ptr, logits_stride, V, num_tiles,
    TILE: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Grid (n, tiles of V): stats [n, tiles, 3] are maximum, sum and count; keys [n, tiles, K]."""
    i = tl.program_id(0)
    tile = tl.program_id(1)
    line = tl.load(line_ptr + i)
    row_ptr = logits_ptr + line * logits_stride
    token = tile * TILE + tl.arange(0, TILE)
    mask = token < V
    x = tl.load(row_ptr + token, mask=mask, other=float("-inf")).to(tl.float32)
    own = tl.load(row_ptr + tl.load(chosen_ptr + line)).to(tl.float32)
    top = tl.max(x, 0)
    safe = tl.where(top == float("-inf"), 0.0, top)
    spot = stats_ptr + (i * num_tiles + tile) * 3
    tl.store(spot, top)
    tl.store(spot + 1, tl.sum(tl.exp(x - safe), 0))
    tl.store(spot + 2, tl.sum((x > own).to(tl.int32), 0).to(tl.float32))
    bits = x.to(tl.int32, bitcast=True)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = (order.to(tl.int64) << 32) | (token.to(tl.int64) ^ LOW_BITS)
    best = tl.topk(tl.where(mask, keys, keys * 0 + LEAST), K)
    tl.store(keys_ptr + (i * num_tiles + tile) * K + tl.arange(0, K), best)


@triton.jit
def _join_kernel(
    logits_ptr, line_ptr, chosen_ptr, stats_ptr, keys_ptr, out_ptr, logits_stride, num_tiles,
    TILES_PAD: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Grid (n): out [n, 3 + 2 K] float64."""
    i = tl.program_id(0)
    line = tl.load(line_ptr + i)
    chosen = tl.load(chosen_ptr + line)
    t = tl.arange(0, TILES_PAD)
    spot = stats_ptr + (i * num_tiles + t) * 3
    tops = tl.load(spot, mask=t < num_tiles, other=float("-inf"))
    sums = tl.load(spot + 1, mask=t < num_tiles, other=0.0)
    above = tl.sum(tl.load(spot + 2, mask=t < num_tiles, other=0.0), 0)
    top = tl.max(tops, 0)
    total = top + tl.log(tl.sum(sums * tl.exp(tops - top), 0))
    own = tl.load(logits_ptr + line * logits_stride + chosen).to(tl.float32)
    row = out_ptr + i * (3 + 2 * K)
    tl.store(row, chosen.to(tl.float64))
    tl.store(row + 1, (own - total).to(tl.float64))
    tl.store(row + 2, (above + 1).to(tl.float64))
    all_keys = tl.arange(0, TILES_PAD * K)
    mask = all_keys < num_tiles * K
    keys = tl.load(keys_ptr + i * num_tiles * K + all_keys, mask=mask, other=LEAST)
    best = tl.topk(keys, K)
    order = (best >> 32).to(tl.int32)
    bits = order ^ ((order >> 31) & 0x7FFFFFFF)
    k = tl.arange(0, K)
    tl.store(row + 3 + k, (bits.to(tl.float32, bitcast=True) - total).to(tl.float64))
    tl.store(row + 3 + K + k, ((best & LOW_BITS) ^ LOW_BITS).to(tl.float64))


def logprobs(logits: Tensor, lines: Tensor, token_ids: Tensor, count: int) -> Tensor:
    """[n, 3 + 2 K] float64 of lines [n] int64: token, its log-probability and rank; the most
    likely tokens' log-probabilities, then their ids, best first; K >= count.

    logits [L, V]; token_ids [L] int64.
    """
    vocab, best = logits.shape[1], max(2, triton.next_power_of_2(count))
    tiles = triton.cdiv(vocab, TILE)
    stats = torch.empty((len(lines), tiles, 3), dtype=torch.float32, device=logits.device)
    keys = torch.empty((len(lines), tiles, best), dtype=torch.int64, device=logits.device)
    out = torch.empty((len(lines), 3 + 2 * best), dtype=torch.float64, device=logits.device)
    _tile_kernel[(len(lines), tiles)](
        logits, lines, token_ids, stats, keys, logits.stride(0), vocab, tiles, TILE, best,
        num_warps=8,
    )  # fmt: skip
    _join_kernel[(len(lines),)](
        logits, lines, token_ids, stats, keys, out, logits.stride(0), tiles,
        triton.next_power_of_2(tiles), best, num_warps=4,
    )  # fmt: skip
    return out
