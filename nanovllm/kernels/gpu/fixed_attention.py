"""Paged attention whose result for a query does not depend on what else is computed, or how.

The keys of a row are cut at fixed positions into chunks. Each chunk is attended by itself, and the
chunks' results are joined in order. Whether one program goes over all chunks of a tile of queries
(long rows), or each chunk has its own program and a second kernel joins them (few single tokens),
the arithmetic is the same, operation by operation: the same compiled kernel computes a chunk, and
multiplications are not fused into additions. A masked key adds exactly nothing, so it does not
matter which queries share a tile.

Shape legend: T tokens, S sequences, H query heads, G KV heads, R = H / G, D head dim, B blocks,
P slots a block, N columns of the block table, C chunks of a row.
"""

# mypy: disable-error-code="no-untyped-def, attr-defined, misc"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.gpu.attention import LOG2_E, precision

MIN_CHUNK = 512
MAX_CHUNKS = 16
# Fewer programs than this leave multiprocessors idle: then every chunk has its own.
TARGET_PROGRAMS = 264


@triton.jit
def _join(top, total, acc, new_top, new_total, new_acc):
    """Online softmax (Milakov and Gimelshein 2018): both parts over their common maximum."""
    both = tl.maximum(top, new_top)
    safe = tl.where(both == float("-inf"), 0.0, both)  # neither has seen a key
    old_gain = tl.exp2(top - safe)
    new_gain = tl.exp2(new_top - safe)
    total = total * old_gain + new_total * new_gain
    acc = acc * old_gain[:, None] + new_acc * new_gain[:, None]
    return both, total, acc


@triton.jit
def _sequence_of(tile, cu_q_ptr, num_seqs, BLOCK_Q: tl.constexpr):
    """Tile t of sequence s is program cu_q[s] // BLOCK_Q + s + t: the last s not after `tile`."""
    low = 0
    high = num_seqs
    while low < high:
        middle = (low + high) // 2
        if tl.load(cu_q_ptr + middle) // BLOCK_Q + middle <= tile:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def _chunk(
    q, positions, first_key, cache_ptr, table_ptr, start, stop, group, scale,
    G: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, P: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(top, total, acc) of the keys [start, stop) alone; start is a multiple of BLOCK_N."""
    rows: tl.constexpr = q.shape[0]
    d = tl.arange(0, D_PAD)
    top = tl.full((rows,), float("-inf"), tl.float32)
    total = tl.zeros((rows,), tl.float32)
    acc = tl.zeros((rows, D_PAD), tl.float32)
    for n in range(start, stop, BLOCK_N):
        key = n + tl.arange(0, BLOCK_N)
        block = tl.load(table_ptr + key // P, mask=key < stop, other=0).to(tl.int64)
        offset = block * (2 * G * P * D) + group * (P * D) + (key % P) * D
        mask = (key < stop)[:, None] & (d < D)[None, :]
        kv_ptrs = cache_ptr + offset[:, None] + d[None, :]
        keys = tl.load(kv_ptrs, mask=mask, other=0.0).to(q.dtype)
        values = tl.load(kv_ptrs + G * P * D, mask=mask, other=0.0).to(q.dtype)
        scores = tl.dot(q, keys.T, input_precision=PRECISION) * scale
        visible = (key[None, :] <= positions[:, None]) & (key[None, :] >= first_key[:, None])
        scores = tl.where(visible & (key < stop)[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores - safe[:, None])
        shrink = tl.exp2(top - safe)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        acc = tl.dot(weights.to(q.dtype), values, acc, input_precision=PRECISION)
        top = new_top
    return top, total, acc


@triton.jit(do_not_specialize=["num_seqs", "num_parts"])
def _attend_kernel(
    q_ptr, cache_ptr, out_ptr, partial_ptr, stats_ptr, cu_q_ptr, context_ptr, tables_ptr,
    q_stride, out_stride, table_stride, num_seqs, num_parts, scale, window,
    G: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
    WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of queries, G, num_parts): BLOCK_Q queries times the R heads of one KV head.

    With several parts, part c computes chunk c and leaves it in partial [S, H, num_parts, D] and
    stats [S, H, num_parts, 2]; rows then have one query. With one, it joins all chunks itself.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest rows of keys start first
    group = tl.program_id(1)
    part = tl.program_id(2)
    seq = _sequence_of(tile, cu_q_ptr, num_seqs, BLOCK_Q)
    begin = tl.load(cu_q_ptr + seq)
    q_len = tl.load(cu_q_ptr + seq + 1) - begin
    first_query = (tile - begin // BLOCK_Q - seq) * BLOCK_Q
    context = tl.load(context_ptr + seq)
    if (first_query >= q_len) | (context == 0):
        return
    row = tl.arange(0, BLOCK_Q * R_PAD)
    query = first_query + row // R_PAD
    head = group * R + row % R_PAD
    d = tl.arange(0, D_PAD)
    mask = (query < q_len) & (row % R_PAD < R)
    q_rows = (begin + query).to(tl.int64)
    spot = (head * D)[:, None] + d[None, :]
    wide_mask = mask[:, None] & (d < D)[None, :]
    q = tl.load(q_ptr + q_rows[:, None] * q_stride + spot, mask=wide_mask, other=0.0)
    positions = context - q_len + query
    table_ptr = tables_ptr + seq.to(tl.int64) * table_stride
    stop = context - q_len + tl.minimum(first_query + BLOCK_Q, q_len)  # keys that any query sees
    first_key = positions * 0
    start = 0
    if WINDOW:
        first_key = tl.maximum(positions - window + 1, 0)
        start = tl.maximum(context - q_len + first_query - window + 1, 0) // BLOCK_N * BLOCK_N
    low = start // CHUNK
    high = tl.cdiv(stop, CHUNK)
    if num_parts > 1:
        low = tl.maximum(part, low)
        high = tl.minimum(part + 1, high)
    top = tl.full((BLOCK_Q * R_PAD,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q * R_PAD,), tl.float32)
    acc = tl.zeros((BLOCK_Q * R_PAD, D_PAD), tl.float32)
    for c in range(low, high):
        new_top, new_total, new_acc = _chunk(
            q, positions, first_key, cache_ptr, table_ptr, tl.maximum(c * CHUNK, start),
            tl.minimum((c + 1) * CHUNK, stop), group, scale, G, D, D_PAD, P, BLOCK_N, PRECISION,
        )  # fmt: skip
        top, total, acc = _join(top, total, acc, new_top, new_total, new_acc)
    if num_parts > 1:
        index = (seq * (G * R) + head) * num_parts + part
        tl.store(partial_ptr + index[:, None] * D + d[None, :], acc, mask=wide_mask)
        tl.store(stats_ptr + index * 2, top, mask=mask)
        tl.store(stats_ptr + index * 2 + 1, total, mask=mask)
    else:
        out = acc / tl.where(total > 0, total, 1.0)[:, None]  # rows past the end saw no key
        out = out.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + q_rows[:, None] * out_stride + spot, out, mask=wide_mask)


@triton.jit(do_not_specialize=["num_parts"])
def _join_kernel(
    partial_ptr, stats_ptr, context_ptr, out_ptr, out_stride, num_parts,
    H: tl.constexpr, H_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Grid (S): the parts of a single token's heads, in order."""
    seq = tl.program_id(0)
    context = tl.load(context_ptr + seq)
    if context == 0:
        return
    head = tl.arange(0, H_PAD)
    d = tl.arange(0, D_PAD)
    mask = head < H
    wide_mask = mask[:, None] & (d < D)[None, :]
    top = tl.full((H_PAD,), float("-inf"), tl.float32)
    total = tl.zeros((H_PAD,), tl.float32)
    acc = tl.zeros((H_PAD, D_PAD), tl.float32)
    for c in range(tl.cdiv(context, CHUNK)):
        index = (seq * H + head) * num_parts + c
        new_top = tl.load(stats_ptr + index * 2, mask=mask, other=float("-inf"))
        new_total = tl.load(stats_ptr + index * 2 + 1, mask=mask, other=0.0)
        new_acc = tl.load(partial_ptr + index[:, None] * D + d[None, :], mask=wide_mask, other=0.0)
        top, total, acc = _join(top, total, acc, new_top, new_total, new_acc)
    out = acc / tl.where(total > 0, total, 1.0)[:, None]
    out = out.to(out_ptr.dtype.element_ty)
    spot = (head * D)[:, None] + d[None, :]
    tl.store(out_ptr + seq.to(tl.int64) * out_stride + spot, out, mask=wide_mask)


def chunk_of(max_context_len: int) -> int:
    """Keys a chunk: fixed by the longest context of the engine, so that chunks stay few."""
    return max(MIN_CHUNK, triton.next_power_of_2(triton.cdiv(max_context_len, MAX_CHUNKS)))


class FixedWorkspace:
    """Where the chunks of single tokens meet; allocated once, for captured graphs."""

    def __init__(
        self, num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device
    ) -> None:
        parts = max(1, TARGET_PROGRAMS // num_kv_heads) * num_heads * MAX_CHUNKS
        self.partial = torch.empty(parts * head_dim, dtype=torch.float32, device=device)
        self.stats = torch.empty(parts * 2, dtype=torch.float32, device=device)


def _tile(rows_pad: int, dim_pad: int, itemsize: int) -> tuple[int, int, int, int]:
    """(queries, keys, warps, stages), whatever the number of queries."""
    if itemsize == 2:
        return max(1, 64 // rows_pad), 64 if dim_pad <= 128 else 32, 4, 3
    return max(1, 16 // rows_pad), 16 if dim_pad > 64 else 32, 4, 1


def attend(
    q: Tensor,
    kv_cache: Tensor,
    cu_q_lens: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    scale: float,
    window: int | None,
    workspace: FixedWorkspace,
    out: Tensor,
    *,
    single: bool,
    chunk: int,
    num_chunks: int,
) -> Tensor:
    """Attention of any rows; q and out [T, H, D], kv_cache [B, 2, G, P, D].

    single: every row has one query; then few rows are cut into num_chunks parts of `chunk` keys,
    which must hold the longest context.
    """
    _, _, groups, slots, dim = kv_cache.shape
    num_seqs, num_heads = len(context_lens), q.shape[1]
    dim_pad, rows_pad = (triton.next_power_of_2(x) for x in (dim, num_heads // groups))
    queries, keys, warps, stages = _tile(rows_pad, dim_pad, q.element_size())
    assert q.stride(1) == out.stride(1) == dim, "heads of a token must follow one another"
    assert chunk % keys == 0
    assert num_chunks <= MAX_CHUNKS
    parts = num_chunks if single and num_seqs * groups <= TARGET_PROGRAMS else 1
    _attend_kernel[(len(q) // queries + num_seqs, groups, parts)](
        q, kv_cache, out, workspace.partial, workspace.stats, cu_q_lens, context_lens,
        block_tables, q.stride(0), out.stride(0), block_tables.stride(0), num_seqs, parts,
        scale * LOG2_E, window or 0, groups, num_heads // groups, rows_pad, dim, dim_pad, slots,
        queries, keys, chunk, window is not None, precision(q),
        num_warps=warps, num_stages=stages, enable_fp_fusion=False,
    )  # fmt: skip
    if parts > 1:
        _join_kernel[(num_seqs,)](
            workspace.partial, workspace.stats, context_lens, out, out.stride(0), parts,
            num_heads, triton.next_power_of_2(num_heads), dim, dim_pad, chunk,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out
