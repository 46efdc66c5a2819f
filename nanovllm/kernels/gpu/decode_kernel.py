"""Paged attention in Triton for rows of one query.

The cache is read once, in tiles that all query heads of a KV head share. Rows with more queries
are skipped. Launched by `decode_attention`.

Shape legend: T tokens, S sequences, H query heads, G KV heads, R = H / G, D head dim, B blocks,
P slots a block, N columns of the block table.
"""

# mypy: disable-error-code="no-untyped-def, attr-defined, misc"
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda as tl_cuda

from nanovllm.kernels.gpu.narrow_tiles import narrow_tiles
from nanovllm.kernels.gpu.paged import tile_offsets

# A split shorter than this costs more to combine than it saves.
MIN_SPLIT = tl.constexpr(128)


@triton.jit
def _normed_rotated(
    x_ptr,
    norm_ptr,
    cos_sin_ptr,
    position,
    rows,
    row_mask,
    stride,
    eps,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    QK_NORM: tl.constexpr,
):
    """Head vectors [rows, D_PAD]: RMSNorm if QK_NORM, then the rotation, in x's own dtype."""
    half: tl.constexpr = D // 2
    d = tl.arange(0, D_PAD)
    other = tl.where(d < half, d + half, d - half)  # the dimension that rotates with d
    mask = row_mask[:, None] & (d < D)[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride + d[None, :], mask=mask, other=0.0)
    y = tl.load(x_ptr + rows[:, None] * stride + other[None, :], mask=mask, other=0.0)
    dtype = x.dtype
    x = x.to(tl.float32)
    y = y.to(tl.float32)
    if QK_NORM:
        scale = tl.rsqrt(tl.sum(x * x, 1) / D + eps)
        wx = tl.load(norm_ptr + d, mask=d < D, other=0.0).to(tl.float32)
        wy = tl.load(norm_ptr + other, mask=d < D, other=0.0).to(tl.float32)
        x = (x * scale[:, None]).to(dtype).to(tl.float32) * wx[None, :]
        y = (y * scale[:, None]).to(dtype).to(tl.float32) * wy[None, :]
        x = x.to(dtype).to(tl.float32)
        y = y.to(dtype).to(tl.float32)
    angle = tl.where(d < half, d, d - half)
    cos = tl.load(cos_sin_ptr + position * D + angle, mask=d < D, other=0.0)
    sin = tl.load(cos_sin_ptr + position * D + half + angle, mask=d < D, other=0.0)
    sin = tl.where(d < half, -sin, sin)
    return (x * cos[None, :] + y * sin[None, :]).to(dtype)


@triton.jit
def _part_of_keys(
    context, window, split,
    BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, WINDOW: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """(first visible key, start and stop of this part, parts in use) of a row."""
    end = context - 1 if FUSED else context  # keys that are read from the cache
    first = tl.maximum(context - window, 0) if WINDOW else 0
    low = first // BLOCK_N * BLOCK_N
    span = tl.maximum(end - low, 1)
    used = tl.minimum(tl.cdiv(span, MIN_SPLIT), SPLITS)
    chunk = tl.cdiv(tl.cdiv(span, used), BLOCK_N) * BLOCK_N
    start = low + split * chunk
    return first, start, tl.minimum(start + chunk, end), tl.cdiv(span, chunk)


@triton.jit
def _with_new_key(
    q_row, k_row, v_row, q_norm_ptr, k_norm_ptr, cos_sin_ptr, cache_ptr, table_ptr, group,
    position, owner, scale, eps,
    G: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    P: tl.constexpr, QK_NORM: tl.constexpr,
):  # fmt: skip
    """q ready for use, and the softmax over the new key alone, if this part is its owner.

    The owner stores the new key and value.
    """
    heads = tl.arange(0, R_PAD)
    d = tl.arange(0, D_PAD)
    q = _normed_rotated(
        q_row, q_norm_ptr, cos_sin_ptr, position, heads, heads < R, D, eps, D, D_PAD, QK_NORM
    )
    one = tl.arange(0, 1)
    k_new = _normed_rotated(
        k_row, k_norm_ptr, cos_sin_ptr, position, one, one == 0, 0, eps, D, D_PAD, QK_NORM
    )
    v_new = tl.load(v_row + d, mask=d < D, other=0.0)[None, :]
    # From here on the new key and value are what the cache holds, rounded as it rounds.
    k_new = k_new.to(cache_ptr.dtype.element_ty)
    v_new = v_new.to(cache_ptr.dtype.element_ty)
    block = tl.load(table_ptr + position // P).to(tl.int64)
    slot = block * (2 * G * P * D) + group * (P * D) + (position % P) * D
    tl.store(cache_ptr + slot + d[None, :], k_new, mask=(d < D)[None, :] & owner)
    tl.store(cache_ptr + slot + G * P * D + d[None, :], v_new, mask=(d < D)[None, :] & owner)
    score = tl.sum(q.to(tl.float32) * k_new.to(tl.float32), 1) * scale
    top = tl.where(owner, score, float("-inf"))
    total = tl.where(owner, 1.0, 0.0) + tl.zeros((R_PAD,), tl.float32)
    acc = tl.where(owner, v_new.to(tl.float32), 0.0) + tl.zeros((R_PAD, D_PAD), tl.float32)
    return q, acc, total, top


@triton.jit
def _decode_tiles(
    q, acc, total, top, cache_ptr, table_ptr, group, first, start, stop, scale,
    G: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, P: tl.constexpr,
    BLOCK_N: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax (Milakov and Gimelshein 2018) over the cached keys [start, stop)."""
    d = tl.arange(0, D_PAD)
    offs_n = tl.arange(0, BLOCK_N)
    for n in range(start, stop, BLOCK_N):
        inside = n + offs_n < stop
        if WINDOW:
            inside &= n + offs_n >= first
        offset = tile_offsets(table_ptr, n, stop, offs_n, group, P, G, D, BLOCK_N)
        kv_mask = inside[:, None]
        if D != D_PAD:
            kv_mask = kv_mask & (d < D)[None, :]
        keys = tl.load(cache_ptr + offset[:, None] + d[None, :], mask=kv_mask, other=0.0)
        keys = keys.to(q.dtype)
        scores = tl.dot(q, keys.T, input_precision=PRECISION) * scale
        scores = tl.where(inside[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        values = tl.load(
            cache_ptr + G * P * D + offset[:, None] + d[None, :], mask=kv_mask, other=0.0
        ).to(q.dtype)
        acc = tl.dot(
            weights.to(values.dtype), values, acc * shrink[:, None], input_precision=PRECISION
        )
        top = new_top
    return acc, total, top


@triton.jit
def _combine(
    out_row, partial_ptr, stats_ptr, pair, used,
    R: tl.constexpr, R_POW2: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """The sum of all parts of all R heads at once: one wait for memory."""
    d = tl.arange(0, D_PAD)
    part = tl.arange(0, SPLITS)
    r = tl.arange(0, R_POW2)
    spot = (pair * R + r[:, None]) * SPLITS + part[None, :]
    live = (r < R)[:, None] & (part < used)[None, :]
    tops = tl.load(stats_ptr + spot * 2, mask=live, other=-1e30, cache_modifier=".cg")
    totals = tl.load(stats_ptr + spot * 2 + 1, mask=live, other=0.0, cache_modifier=".cg")
    parts = tl.load(
        partial_ptr + spot[:, :, None] * D + d[None, None, :],
        mask=live[:, :, None] & (d < D)[None, None, :],
        other=0.0,
        cache_modifier=".cg",
    )
    gains = tl.exp2(tops - tl.max(tops, 1)[:, None])
    weight = tl.sum(totals * gains, 1)  # 0 only past R
    merged = tl.sum(parts * gains[:, :, None], 1) / tl.where(weight > 0, weight, 1.0)[:, None]
    tl.store(
        out_row + r[:, None] * D + d[None, :],
        merged.to(out_row.dtype.element_ty),
        mask=(r < R)[:, None] & (d < D)[None, :],
    )


@triton.jit
def decode_kernel(
    q_ptr, k_ptr, v_ptr,  # [T, H, D], and if FUSED the raw new keys and values [T, G, D]
    q_norm_ptr, k_norm_ptr, cos_sin_ptr,  # FUSED only
    cache_ptr, out_ptr,
    partial_ptr, stats_ptr, counter_ptr,  # [S, H, SPLITS, D], [S, H, SPLITS, 2], [S, G]
    cu_q_ptr, context_ptr, tables_ptr,
    q_stride, kv_stride, out_stride, table_stride,
    scale, eps, window,
    G: tl.constexpr, R: tl.constexpr, R_POW2: tl.constexpr, R_PAD: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, P: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr, WINDOW: tl.constexpr, FUSED: tl.constexpr, QK_NORM: tl.constexpr,
    PDL: tl.constexpr, PRECISION: tl.constexpr, NARROW: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Grid (G, S, SPLITS): the R query heads of one KV head of one row, over a part of its keys.

    The R heads share each key tile (padded to what a matrix instruction takes). With FUSED, q and k
    are normalised and rotated here, the new key and value are stored, and take part from
    registers; the cached keys are then those before them. The program that finishes last
    combines the parts.
    """
    group = tl.program_id(0)
    seq = tl.program_id(1)
    split = tl.program_id(2)
    token = seq
    q_len = 1
    if not FUSED:
        token = tl.load(cu_q_ptr + seq)
        q_len = tl.load(cu_q_ptr + seq + 1) - token
    context = tl.load(context_ptr + seq)
    if (q_len != 1) | (context == 0):
        if PDL:
            tl_cuda.gdc_wait()
        return
    table_ptr = tables_ptr + seq.to(tl.int64) * table_stride
    first, start, stop, used = _part_of_keys(
        context, window, split, BLOCK_N, SPLITS, WINDOW, FUSED)  # fmt: skip
    if split >= used:
        if PDL:
            tl_cuda.gdc_wait()
        return
    if PDL:
        # Lengths and tables are older than the kernel before; what follows is not. The next
        # kernel starts early only now, so it can rely on all but this one.
        tl_cuda.gdc_wait()
        tl_cuda.gdc_launch_dependents()

    heads = tl.arange(0, R_PAD)
    d = tl.arange(0, D_PAD)
    here = heads[:, None] * D + d[None, :]
    hd_mask = (heads < R)[:, None] & (d < D)[None, :]
    q_row = q_ptr + token.to(tl.int64) * q_stride + group * R * D
    if FUSED:
        new_row = token.to(tl.int64) * kv_stride + group * D
        q, acc, total, top = _with_new_key(
            q_row, k_ptr + new_row, v_ptr + new_row, q_norm_ptr, k_norm_ptr, cos_sin_ptr,
            cache_ptr, table_ptr, group, context - 1, split == 0, scale, eps,
            G, R, R_PAD, D, D_PAD, P, QK_NORM)  # fmt: skip
    else:
        q = tl.load(q_row + here, mask=hd_mask, other=0.0)
        top = tl.full((R_PAD,), float("-inf"), tl.float32)
        total = tl.zeros((R_PAD,), tl.float32)
        acc = tl.zeros((R_PAD, D_PAD), tl.float32)
    if NARROW:
        acc, total, top = narrow_tiles(
            q, acc, total, top, cache_ptr, table_ptr, group, first, start, stop, scale,
            G, R_PAD, D, D_PAD, P, BLOCK_N, WINDOW, PTX)  # fmt: skip
    else:
        acc, total, top = _decode_tiles(
            q, acc, total, top, cache_ptr, table_ptr, group, first, start, stop, scale,
            G, D, D_PAD, P, BLOCK_N, WINDOW, PRECISION)  # fmt: skip

    out_row = out_ptr + token.to(tl.int64) * out_stride + group * R * D
    if used > 1:
        pair = seq * G + group
        index = (pair * R + heads) * SPLITS + split
        tl.store(partial_ptr + index[:, None] * D + d[None, :], acc, mask=hd_mask)
        tl.store(stats_ptr + index * 2, top, mask=heads < R)
        tl.store(stats_ptr + index * 2 + 1, total, mask=heads < R)
        tl.debug_barrier()  # every thread's part is written before the count says so
        if tl.atomic_add(counter_ptr + pair, 1, sem="acq_rel") == used - 1:
            _combine(out_row, partial_ptr, stats_ptr, pair, used, R, R_POW2, D, D_PAD, SPLITS)
            tl.store(counter_ptr + pair, 0)  # ready for the next launch
    else:
        out = acc / total[:, None]
        tl.store(out_row + here, out.to(out_ptr.dtype.element_ty), mask=hd_mask)
