"""Paged attention in Triton: one kernel for rows of one query, one for longer rows.

Both read the cache of one layer, [B, 2, G, P, D] contiguous, and leave slots outside a context
unread or masked before use. A cache of 8-bit floats is widened to q's dtype in registers, so all
arithmetic is that of the model's dtype. They know tensors alone. A batch that mixes both kinds of
rows runs both kernels: each skips the other's rows, so nothing but shapes is decided on the host.

Shape legend: T tokens, S sequences, H query heads, G KV heads, R = H / G, D head dim, B blocks,
P slots a block, N columns of the block table.
"""

# mypy: disable-error-code="no-untyped-def, attr-defined, misc"
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda as tl_cuda

# A split shorter than this costs more to combine than it saves.
MIN_SPLIT = tl.constexpr(128)
LOG2_E = math.log2(math.e)


@triton.jit
def _tile_offsets(
    table_ptr,
    n,
    end,
    offs_n,
    group,
    P: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Element offsets of the keys at positions n + offs_n; those past `end` point at block 0."""
    if P % BLOCK_N == 0:  # the whole tile lies in one block
        block = tl.load(table_ptr + n // P).to(tl.int64)
        return block * (2 * G * P * D) + group * (P * D) + (n % P + offs_n) * D
    position = n + offs_n
    block = tl.load(table_ptr + position // P, mask=position < end, other=0).to(tl.int64)
    return block * (2 * G * P * D) + group * (P * D) + (position % P) * D


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
def _decode_kernel(
    q_ptr, k_ptr, v_ptr,  # [T, H, D], and if FUSED the raw new keys and values [T, G, D]
    q_norm_ptr, k_norm_ptr, cos_sin_ptr,  # FUSED only
    cache_ptr, out_ptr,
    partial_ptr, stats_ptr, counter_ptr,  # [S, H, SPLITS, D], [S, H, SPLITS, 2], [S, G]
    cu_q_ptr, context_ptr, tables_ptr,
    q_stride, kv_stride, out_stride, table_stride,
    scale, eps, window,
    G: tl.constexpr, R: tl.constexpr, R_POW2: tl.constexpr, R_PAD: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, P: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr, WINDOW: tl.constexpr,
    FUSED: tl.constexpr, QK_NORM: tl.constexpr, PDL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (G, S, SPLITS): the R query heads of one KV head of one row, over a part of its keys.

    The R heads share each key tile (padded to the 16 rows of a matrix instruction). With FUSED,
    q and k are normalised and rotated here, the new key and value are stored, and take part from
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
    heads = tl.arange(0, R_PAD)
    d = tl.arange(0, D_PAD)
    head_mask = heads < R
    hd_mask = head_mask[:, None] & (d < D)[None, :]
    table_ptr = tables_ptr + seq.to(tl.int64) * table_stride
    end = context - 1 if FUSED else context  # keys that are read from the cache
    first = tl.maximum(context - window, 0) if WINDOW else 0
    low = first // BLOCK_N * BLOCK_N
    span = tl.maximum(end - low, 1)
    used = tl.minimum(tl.cdiv(span, MIN_SPLIT), SPLITS)
    chunk = tl.cdiv(tl.cdiv(span, used), BLOCK_N) * BLOCK_N
    used = tl.cdiv(span, chunk)
    if split >= used:
        if PDL:
            tl_cuda.gdc_wait()
        return
    start = low + split * chunk
    stop = tl.minimum(start + chunk, end)
    offs_n = tl.arange(0, BLOCK_N)
    if PDL:
        # Lengths and tables are older than the kernel before; what follows is not. The next
        # kernel starts early only now, so it can rely on all but this one.
        tl_cuda.gdc_wait()
        tl_cuda.gdc_launch_dependents()

    q_row = q_ptr + token.to(tl.int64) * q_stride + group * R * D
    if FUSED:
        position = context - 1
        q = _normed_rotated(
            q_row, q_norm_ptr, cos_sin_ptr, position, heads, head_mask, D, eps, D, D_PAD, QK_NORM
        )
        one = tl.arange(0, 1)
        new_row = token.to(tl.int64) * kv_stride + group * D
        k_new = _normed_rotated(
            k_ptr + new_row,
            k_norm_ptr,
            cos_sin_ptr,
            position,
            one,
            one == 0,
            0,
            eps,
            D,
            D_PAD,
            QK_NORM,
        )
        v_new = tl.load(v_ptr + new_row + d, mask=d < D, other=0.0)[None, :]
        # From here on the new key and value are what the cache holds, rounded as it rounds.
        k_new = k_new.to(cache_ptr.dtype.element_ty)
        v_new = v_new.to(cache_ptr.dtype.element_ty)
        owner = split == 0
        block = tl.load(table_ptr + position // P).to(tl.int64)
        slot = block * (2 * G * P * D) + group * (P * D) + (position % P) * D
        tl.store(cache_ptr + slot + d[None, :], k_new, mask=(d < D)[None, :] & owner)
        tl.store(cache_ptr + slot + G * P * D + d[None, :], v_new, mask=(d < D)[None, :] & owner)
        score = tl.sum(q.to(tl.float32) * k_new.to(tl.float32), 1) * scale
        top = tl.where(owner, score, float("-inf"))
        total = tl.where(owner, 1.0, 0.0) + tl.zeros((R_PAD,), tl.float32)
        acc = tl.where(owner, v_new.to(tl.float32), 0.0) + tl.zeros((R_PAD, D_PAD), tl.float32)
    else:
        q = tl.load(q_row + heads[:, None] * D + d[None, :], mask=hd_mask, other=0.0)
        top = tl.full((R_PAD,), float("-inf"), tl.float32)
        total = tl.zeros((R_PAD,), tl.float32)
        acc = tl.zeros((R_PAD, D_PAD), tl.float32)

    for n in range(start, stop, BLOCK_N):
        inside = n + offs_n < stop
        if WINDOW:
            inside &= n + offs_n >= first
        offset = _tile_offsets(table_ptr, n, stop, offs_n, group, P, G, D, BLOCK_N)
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

    out_row = out_ptr + token.to(tl.int64) * out_stride + group * R * D
    if used > 1:
        index = (seq * G + group) * R * SPLITS + heads * SPLITS + split
        tl.store(partial_ptr + index[:, None] * D + d[None, :], acc, mask=hd_mask)
        tl.store(stats_ptr + index * 2, top, mask=head_mask)
        tl.store(stats_ptr + index * 2 + 1, total, mask=head_mask)
        tl.debug_barrier()  # every thread's part is written before the count says so
        arrived = tl.atomic_add(counter_ptr + seq * G + group, 1, sem="acq_rel")
        if arrived != used - 1:
            return
        # All parts of all R heads at once: one wait for memory.
        part = tl.arange(0, SPLITS)
        r = tl.arange(0, R_POW2)
        spot = ((seq * G + group) * R + r[:, None]) * SPLITS + part[None, :]
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
            merged.to(out_ptr.dtype.element_ty),
            mask=(r < R)[:, None] & (d < D)[None, :],
        )
        tl.store(counter_ptr + seq * G + group, 0)  # ready for the next launch
        return
    out = acc / total[:, None]
    tl.store(
        out_row + heads[:, None] * D + d[None, :], out.to(out_ptr.dtype.element_ty), mask=hd_mask
    )


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
        offset = _tile_offsets(table_ptr, n, stop, offs_n, group, P, G, D, BLOCK_N)
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


@triton.jit
def _store_kernel(k_ptr, v_ptr, cache_ptr, slots_ptr, k_stride, v_stride,
                  G: tl.constexpr, G_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
                  P: tl.constexpr):  # fmt: skip
    """Grid (T): one token's keys and values into its slot; slot -1 is a padding row."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    if slot < 0:
        return
    g = tl.arange(0, G_PAD)
    d = tl.arange(0, D_PAD)
    mask = (g < G)[:, None] & (d < D)[None, :]
    target = slot // P * (2 * G * P * D) + (slot % P) * D + g[:, None] * (P * D) + d[None, :]
    here = g[:, None] * D + d[None, :]
    k = tl.load(k_ptr + token * k_stride + here, mask=mask)
    v = tl.load(v_ptr + token * v_stride + here, mask=mask)
    tl.store(cache_ptr + target, k.to(cache_ptr.dtype.element_ty), mask=mask)
    tl.store(cache_ptr + target + G * P * D, v.to(cache_ptr.dtype.element_ty), mask=mask)


def store_kv(k: Tensor, v: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    """Writes k and v [T, G, D] into kv_cache [B, 2, G, P, D] at slots [T] int64."""
    _, _, groups, slots, dim = kv_cache.shape
    assert k.stride(1) == v.stride(1) == dim, "heads of a token must follow one another"
    _store_kernel[(len(k),)](
        k, v, kv_cache, slot_mapping, k.stride(0), v.stride(0), groups,
        triton.next_power_of_2(groups), dim, triton.next_power_of_2(dim), slots, num_warps=2,
    )  # fmt: skip


class DecodeWorkspace:
    """Where splits meet: partial results, and counters that are zero between launches.

    Allocated once for any batch, so that a captured graph never outlives its memory.
    """

    def __init__(self, num_heads: int, head_dim: int, device: torch.device) -> None:
        rows = MAX_SPLIT_PROGRAMS * num_heads  # S * SPLITS <= MAX_SPLIT_PROGRAMS
        self.partial = torch.empty(rows * head_dim, dtype=torch.float32, device=device)
        self.stats = torch.empty(rows * 2, dtype=torch.float32, device=device)
        self.counter = torch.zeros(rows, dtype=torch.int32, device=device)


MAX_SPLIT_PROGRAMS = 1024
MAX_SPLITS = 16  # the last program holds all parts in registers
TARGET_PROGRAMS = 512  # about four on each of 132 multiprocessors


def num_splits(num_seqs: int, num_kv_heads: int, max_context_len: int) -> int:
    """Parts of each row's keys: more than one only where the grid would not fill the device."""
    wanted = 1
    while wanted * num_seqs * num_kv_heads < TARGET_PROGRAMS:
        wanted *= 2  # a power of two: few variants to compile
    useful = -(-max_context_len // MIN_SPLIT.value)
    limit = max(1, min(wanted, useful, MAX_SPLITS, MAX_SPLIT_PROGRAMS // max(1, num_seqs)))
    return 1 << (limit.bit_length() - 1)


def _decode_tile(dim_pad: int, itemsize: int, programs: int, splits: int) -> tuple[int, int, int]:
    """(keys a tile, warps, stages): measured best at D = 128 in 16 bits; others by their bytes."""
    if dim_pad != 128 or itemsize != 2 or programs <= 128:
        keys = max(16, min(128 // itemsize, 16384 // (dim_pad * itemsize)))
        return keys, 4, 5 if itemsize <= 2 else 3
    if splits >= 16 or (programs <= TARGET_PROGRAMS and splits <= 2):
        return 64, 2, 6
    return (64, 2, 4) if splits > 1 else (32, 2, 8)


def decode(
    q: Tensor,
    kv_cache: Tensor,
    cu_q_lens: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    scale: float,
    window: int | None,
    workspace: DecodeWorkspace,
    splits: int,
    out: Tensor,
    *,
    new: FusedInputs | None = None,
    pdl: bool = False,
    tile: tuple[int, int, int] | None = None,
) -> Tensor:
    """Attention of every row with one query; q and out [T, H, D], other rows stay untouched.

    With `new`, q is raw and the step's keys and values are normalised, rotated and stored here.
    """
    _, _, groups, slots, dim = kv_cache.shape
    ratio = q.shape[1] // groups
    dim_pad = triton.next_power_of_2(dim)
    keys, warps, stages = tile or _decode_tile(
        dim_pad, kv_cache.element_size(), groups * len(context_lens) * splits, splits
    )
    assert q.stride(1) == out.stride(1) == dim, "heads of a token must follow one another"
    assert splits == 1 or splits * len(context_lens) <= MAX_SPLIT_PROGRAMS
    f = new or FusedInputs(q, q, None, q, 0.0)
    options = {"launch_pdl": True} if pdl else {}
    _decode_kernel[(groups, len(context_lens), splits)](
        q, f.k, f.v, f.q_norm, f.k_norm, f.cos_sin, kv_cache, out,
        workspace.partial, workspace.stats, workspace.counter,
        cu_q_lens, context_lens, block_tables,
        q.stride(0), f.k.stride(0), out.stride(0), block_tables.stride(0),
        scale * LOG2_E, f.eps, window or 0,
        groups, ratio, triton.next_power_of_2(ratio), max(16, triton.next_power_of_2(ratio)),
        dim, dim_pad, slots, keys, splits, window is not None, new is not None,
        f.q_norm is not None, pdl, precision(q),
        num_warps=warps, num_stages=stages, **options,
    )  # fmt: skip
    return out


class FusedInputs:
    """What the fused decode kernel needs beside raw q: raw k and v [T, G, D], norms, angles."""

    def __init__(
        self,
        k: Tensor,
        v: Tensor,
        qk_norms: tuple[Tensor, Tensor] | None,
        cos_sin: Tensor,
        eps: float,
    ) -> None:
        assert k.stride(0) == v.stride(0)
        self.k, self.v = k, v
        self.q_norm = qk_norms[0] if qk_norms else None
        self.k_norm = qk_norms[1] if qk_norms else None
        self.cos_sin, self.eps = cos_sin, eps


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
        window is not None, skip_single, precision(q),
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def precision(x: Tensor) -> str:
    """float32 products stay float32; 16-bit inputs do not care."""
    return "ieee" if x.dtype == torch.float32 else "tf32"
