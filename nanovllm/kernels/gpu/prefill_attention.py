"""Paged attention in Triton for rows of several queries: chunks of prompts.

Shape legend: T tokens, S sequences, H query heads, G KV heads, R = H / G, D head dim, B blocks,
P slots a block, N columns of the block table.
"""

# mypy: disable-error-code="no-untyped-def, attr-defined, misc"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.gpu.paged import LOG2_E, as_float16, is_narrow, precision, tile_offsets


@triton.jit
def _prefill_tiles(
    acc, total, top, q, positions, cache_ptr, table_ptr, start, stop, first_of_row, group, scale,
    G: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, P: tl.constexpr,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax (Milakov and Gimelshein 2018) over the keys [start, stop)."""
    d = tl.arange(0, D_PAD)
    offs_n = tl.arange(0, BLOCK_N)
    for n in range(start, stop, BLOCK_N):
        offset = tile_offsets(table_ptr, n, stop, offs_n, group, P, G, D, BLOCK_N)
        kv_ptrs = cache_ptr + offset[:, None] + d[None, :]
        key_positions = n + offs_n
        if MASKED:
            kv_mask = (key_positions < stop)[:, None] & (d < D)[None, :]
            keys = tl.load(kv_ptrs, mask=kv_mask, other=0.0)
            values = tl.load(kv_ptrs + G * P * D, mask=kv_mask, other=0.0)
        elif D != D_PAD:
            keys = tl.load(kv_ptrs, mask=(d < D)[None, :], other=0.0)
            values = tl.load(kv_ptrs + G * P * D, mask=(d < D)[None, :], other=0.0)
        else:
            keys = tl.load(kv_ptrs)
            values = tl.load(kv_ptrs + G * P * D)
        keys = keys.to(q.dtype)
        values = values.to(q.dtype)
        scores = tl.dot(q, keys.T, input_precision=PRECISION) * scale
        if MASKED:
            visible = (key_positions[None, :] <= positions[:, None]) & (
                key_positions[None, :] >= first_of_row[:, None]
            )
            scores = tl.where(visible, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        # A row that has seen no key yet keeps weights of zero, not NaN.
        safe_top = tl.where(new_top == float("-inf"), 0.0, new_top) if MASKED else new_top
        weights = tl.exp2(scores - safe_top[:, None])
        shrink = tl.exp2(top - safe_top)
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(
            weights.to(values.dtype), values, acc * shrink[:, None], input_precision=PRECISION
        )
        top = new_top
    return acc, total, top


@triton.jit
def _prefill_kernel(
    q_ptr, cache_ptr, out_ptr, cu_q_ptr, context_ptr, tables_ptr,
    q_stride, out_stride, table_stride, num_seqs, scale, window,
    G: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, P: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr, SKIP_SINGLE: tl.constexpr, PRECISION: tl.constexpr,
    NARROW: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of queries, G): BLOCK_Q queries of one row times the R heads of one KV head.

    Tile t of sequence s is program cu_q[s] // BLOCK_Q + s + t, so that the number of programs
    follows from T and S alone; the last programs (the longest rows of keys) start first.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    group = tl.program_id(1)
    low = 0
    high = num_seqs
    while low < high:  # the last sequence whose first tile is not after this one
        middle = (low + high) // 2
        if tl.load(cu_q_ptr + middle) // BLOCK_Q + middle <= tile:
            low = middle + 1
        else:
            high = middle
    seq = low - 1
    begin = tl.load(cu_q_ptr + seq)
    q_len = tl.load(cu_q_ptr + seq + 1) - begin
    first_query = (tile - begin // BLOCK_Q - seq) * BLOCK_Q
    context = tl.load(context_ptr + seq)
    if (first_query >= q_len) | (SKIP_SINGLE & (q_len == 1)) | (context == 0):
        return
    row = tl.arange(0, BLOCK_Q * R_PAD)
    query = first_query + row // R_PAD
    head = group * R + row % R_PAD
    d = tl.arange(0, D_PAD)
    mask = (query < q_len) & (row % R_PAD < R)
    mask_2d = mask[:, None] & (d < D)[None, :]
    rows = (begin + query).to(tl.int64)
    q = tl.load(
        q_ptr + rows[:, None] * q_stride + (head * D)[:, None] + d[None, :], mask=mask_2d, other=0.0
    )
    if NARROW:
        q, scale = as_float16(q, scale)
    positions = context - q_len + query
    table_ptr = tables_ptr + seq.to(tl.int64) * table_stride
    last = tl.minimum(first_query + BLOCK_Q, q_len) - 1
    stop = context - q_len + last + 1  # keys that any query of the tile sees: [start, stop)
    start = 0
    first_of_row = positions * 0
    if WINDOW:
        first_of_row = tl.maximum(positions - window + 1, 0)
        start = tl.maximum(context - q_len + first_query - window + 1, 0) // BLOCK_N * BLOCK_N
        full = start  # every tile may cut some query's window
    else:
        full = (context - q_len + first_query + 1) // BLOCK_N * BLOCK_N
    top = tl.full((BLOCK_Q * R_PAD,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q * R_PAD,), tl.float32)
    acc = tl.zeros((BLOCK_Q * R_PAD, D_PAD), tl.float32)
    if not WINDOW:
        acc, total, top = _prefill_tiles(
            acc, total, top, q, positions, cache_ptr, table_ptr, start, full, first_of_row, group,
            scale, G, D, D_PAD, P, BLOCK_N, False, PRECISION)  # fmt: skip
    acc, total, top = _prefill_tiles(
        acc, total, top, q, positions, cache_ptr, table_ptr, full, stop, first_of_row, group,
        scale, G, D, D_PAD, P, BLOCK_N, True, PRECISION)  # fmt: skip
    out = acc / tl.where(total > 0, total, 1.0)[:, None]  # rows past the end saw no key
    tl.store(
        out_ptr + rows[:, None] * out_stride + (head * D)[:, None] + d[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=mask_2d,
    )


def _prefill_tile(rows_pad: int, dim_pad: int, itemsize: int) -> tuple[int, int, int, int]:
    """(queries, keys, warps, stages): 64 rows of queries and heads in 16-bit."""
    row_bytes = dim_pad * itemsize
    if row_bytes <= 256:
        return max(1, 64 // rows_pad), 64, 4, 3
    if itemsize == 2:
        return max(1, 64 // rows_pad), 32, 4, 2
    return max(1, 16 // rows_pad), 16, 4, 1


def prefill(
    q: Tensor,
    kv_cache: Tensor,
    cu_q_lens: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    scale: float,
    window: int | None,
    out: Tensor,
    *,
    skip_single: bool,
    tile: tuple[int, int, int, int] | None = None,
) -> Tensor:
    """Attention of rows with several queries (all rows unless skip_single); out [T, H, D]."""
    _, _, groups, slots, dim = kv_cache.shape
    ratio = q.shape[1] // groups
    dim_pad = triton.next_power_of_2(dim)
    rows_pad = triton.next_power_of_2(ratio)
    queries, keys, warps, stages = tile or _prefill_tile(rows_pad, dim_pad, q.element_size())
    queries = max(queries, -(-16 // rows_pad))
    assert q.stride(1) == out.stride(1) == dim, "heads of a token must follow one another"
    num_seqs = len(context_lens)
    _prefill_kernel[(len(q) // queries + num_seqs, groups)](
        q, kv_cache, out, cu_q_lens, context_lens, block_tables,
        q.stride(0), out.stride(0), block_tables.stride(0), num_seqs, scale * LOG2_E, window or 0,
        groups, ratio, rows_pad, dim, dim_pad, slots, queries, keys,
        window is not None, skip_single, precision(q), is_narrow(q, kv_cache),
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out
