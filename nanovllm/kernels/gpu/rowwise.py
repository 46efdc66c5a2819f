"""Triton kernels that treat each token's row by itself: norms, rotation, activation.

Sums are float32; what a plain torch sequence would round in between is rounded here too.

Shape legend: T tokens, K features, I intermediate size, H query heads, G KV heads, D head dim.
"""

# mypy: disable-error-code="no-untyped-def, attr-defined, misc"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda as tl_cuda


@triton.jit
def _norm_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    x_stride,
    eps,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (rows): RMSNorm times weight."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, K_PAD)
    mask = k < K
    weight = tl.load(weight_ptr + k, mask=mask, other=0.0).to(tl.float32)
    if PDL:
        tl_cuda.gdc_wait()
        tl_cuda.gdc_launch_dependents()
    x = tl.load(x_ptr + row * x_stride + k, mask=mask, other=0.0)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / K + eps)
    out = (wide * scale).to(x.dtype).to(tl.float32) * weight
    tl.store(out_ptr + row * K + k, out.to(x.dtype), mask=mask)


def _warps(size: int) -> int:
    return max(1, min(16, triton.next_power_of_2(size) // 512))


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, pdl: bool = False) -> Tensor:
    """[..., K] -> the same shape; rows may be strided (K contiguous)."""
    size = x.shape[-1]
    rows = x if x.dim() == 2 else x.reshape(-1, size)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    options = {"launch_pdl": True} if pdl else {}
    _norm_kernel[(len(rows),)](
        rows, weight, out, rows.stride(0), eps, size, triton.next_power_of_2(size), pdl,
        num_warps=_warps(size), **options,
    )  # fmt: skip
    return out


@triton.jit
def _embed_kernel(ids_ptr, table_ptr, norm_ptr, rows_ptr, scaled_ptr, squares_ptr,
                  K: tl.constexpr, K_PAD: tl.constexpr):  # fmt: skip
    """Grid (rows): a row of the table, that row times the norm's weight, and its sum of squares."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, K_PAD)
    mask = k < K
    x = tl.load(table_ptr + tl.load(ids_ptr + row) * K + k, mask=mask, other=0.0)
    norm = tl.load(norm_ptr + k, mask=mask, other=0.0).to(tl.float32)
    wide = x.to(tl.float32)
    tl.store(rows_ptr + row * K + k, x, mask=mask)
    tl.store(scaled_ptr + row * K + k, (wide * norm).to(x.dtype), mask=mask)
    tl.store(squares_ptr + row, tl.sum(wide * wide, 0))


def embed(token_ids: Tensor, table: Tensor, norm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[T] token ids -> their rows [T, K] of the table [V, K], those times norm, squares [1, T].

    The last two are what `kernels.cuda.many` wants of a product with an RMSNorm before it.
    """
    size = table.shape[1]
    rows = table.new_empty((len(token_ids), size))
    scaled, squares = torch.empty_like(rows), rows.new_empty((1, len(rows)), dtype=torch.float32)
    _embed_kernel[(len(rows),)](
        token_ids, table, norm, rows, scaled, squares, size, triton.next_power_of_2(size),
        num_warps=_warps(size),
    )  # fmt: skip
    return rows, scaled, squares


@triton.jit
def _silu_mul_kernel(x_ptr, out_ptr, x_stride, size, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Grid (rows, tiles of I): silu(gate) * up."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    if PDL:
        tl_cuda.gdc_wait()
        tl_cuda.gdc_launch_dependents()
    gate = tl.load(x_ptr + row * x_stride + i, mask=mask, other=0.0)
    up = tl.load(x_ptr + row * x_stride + size + i, mask=mask, other=0.0)
    wide = gate.to(tl.float32)
    active = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    tl.store(out_ptr + row * size + i, (active * up.to(tl.float32)).to(gate.dtype), mask=mask)


def silu_mul(gate_up: Tensor, *, pdl: bool = False) -> Tensor:
    """[T, 2 I], gates first -> [T, I]"""
    size = gate_up.shape[-1] // 2
    out = torch.empty((len(gate_up), size), dtype=gate_up.dtype, device=gate_up.device)
    block = min(1024, triton.next_power_of_2(size))
    options = {"launch_pdl": True} if pdl else {}
    _silu_mul_kernel[(len(gate_up), triton.cdiv(size, block))](
        gate_up, out, gate_up.stride(0), size, block, pdl, num_warps=4, **options
    )
    return out


@triton.jit
def _rotate(
    x_ptr,
    norm_ptr,
    cos,
    sin,
    heads,
    mask,
    stride,
    eps,
    D: tl.constexpr,
    HALF: tl.constexpr,
    QK_NORM: tl.constexpr,
):
    """Both halves [heads, HALF] of head vectors: norm, then rotation, in x's dtype."""
    half: tl.constexpr = D // 2
    d = tl.arange(0, HALF)
    here = x_ptr + heads[:, None] * stride + d[None, :]
    first = tl.load(here, mask=mask, other=0.0)
    dtype = first.dtype
    first = first.to(tl.float32)
    second = tl.load(here + half, mask=mask, other=0.0).to(tl.float32)
    if QK_NORM:
        scale = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / D + eps)
        w1 = tl.load(norm_ptr + d, mask=d < half, other=0.0).to(tl.float32)
        w2 = tl.load(norm_ptr + half + d, mask=d < half, other=0.0).to(tl.float32)
        first = (first * scale[:, None]).to(dtype).to(tl.float32) * w1[None, :]
        second = (second * scale[:, None]).to(dtype).to(tl.float32) * w2[None, :]
        first = first.to(dtype).to(tl.float32)
        second = second.to(dtype).to(tl.float32)
    return (
        (first * cos[None, :] - second * sin[None, :]).to(dtype),
        (second * cos[None, :] + first * sin[None, :]).to(dtype),
    )


@triton.jit
def _rope_store_kernel(
    q_ptr, k_ptr, v_ptr, q_norm_ptr, k_norm_ptr, cos_sin_ptr, positions_ptr, slots_ptr, cache_ptr,
    q_stride, k_stride, v_stride, eps,
    H: tl.constexpr, H_PAD: tl.constexpr, G: tl.constexpr, G_PAD: tl.constexpr,
    D: tl.constexpr, HALF: tl.constexpr, P: tl.constexpr,
    QK_NORM: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """Grid (T): one token's heads: q in place; k and v into the cache if STORE, else k in place.

    A thread reads both halves of what it writes, so working in place needs no barrier.
    """
    token = tl.program_id(0).to(tl.int64)
    half: tl.constexpr = D // 2
    d = tl.arange(0, HALF)
    position = tl.load(positions_ptr + token)
    cos = tl.load(cos_sin_ptr + position * D + d, mask=d < half, other=0.0)
    sin = tl.load(cos_sin_ptr + position * D + half + d, mask=d < half, other=0.0)
    h = tl.arange(0, H_PAD)
    q_mask = (h < H)[:, None] & (d < half)[None, :]
    q_row = q_ptr + token * q_stride
    first, second = _rotate(q_row, q_norm_ptr, cos, sin, h, q_mask, D, eps, D, HALF, QK_NORM)
    tl.store(q_row + h[:, None] * D + d[None, :], first, mask=q_mask)
    tl.store(q_row + h[:, None] * D + half + d[None, :], second, mask=q_mask)
    g = tl.arange(0, G_PAD)
    k_mask = (g < G)[:, None] & (d < half)[None, :]
    k_row = k_ptr + token * k_stride
    first, second = _rotate(k_row, k_norm_ptr, cos, sin, g, k_mask, D, eps, D, HALF, QK_NORM)
    if STORE:
        slot = tl.load(slots_ptr + token)
        if slot >= 0:
            target = cache_ptr + slot // P * (2 * G * P * D) + (slot % P) * D
            target = target + g[:, None] * (P * D) + d[None, :]
            stored: tl.constexpr = cache_ptr.dtype.element_ty
            tl.store(target, first.to(stored), mask=k_mask)
            tl.store(target + half, second.to(stored), mask=k_mask)
            v = v_ptr + token * v_stride + g[:, None] * D + d[None, :]
            tl.store(target + G * P * D, tl.load(v, mask=k_mask).to(stored), mask=k_mask)
            tl.store(
                target + G * P * D + half, tl.load(v + half, mask=k_mask).to(stored), mask=k_mask
            )
    else:
        tl.store(k_row + g[:, None] * D + d[None, :], first, mask=k_mask)
        tl.store(k_row + g[:, None] * D + half + d[None, :], second, mask=k_mask)


def _launch_rope(
    q: Tensor, k: Tensor, v: Tensor, norms: tuple[Tensor, Tensor] | None, eps: float,
    cos_sin: Tensor, positions: Tensor, cache: Tensor | None, slots: Tensor,
) -> None:  # fmt: skip
    num_heads, dim = q.shape[1:]
    groups = k.shape[1]
    assert q.stride(1) == k.stride(1) == v.stride(1) == dim, "heads must follow one another"
    q_norm, k_norm = norms or (None, None)
    next_pow2 = triton.next_power_of_2
    _rope_store_kernel[(len(q),)](
        q, k, v, q_norm, k_norm, cos_sin, positions, slots, cache,
        q.stride(0), k.stride(0), v.stride(0), eps,
        num_heads, next_pow2(num_heads), groups, next_pow2(groups), dim, next_pow2(dim // 2),
        1 if cache is None else cache.shape[3], norms is not None, cache is not None,
        num_warps=4,
    )  # fmt: skip


def rope(q: Tensor, k: Tensor, cos_sin: Tensor, positions: Tensor) -> None:
    """Rotates q [T, H, D] and k [T, G, D] in place; cos_sin [max_pos, D] float32: cos | sin."""
    _launch_rope(q, k, k, None, 0.0, cos_sin, positions, None, positions)


def rope_store(
    q: Tensor, k: Tensor, v: Tensor, norms: tuple[Tensor, Tensor] | None, eps: float,
    cos_sin: Tensor, positions: Tensor, kv_cache: Tensor, slot_mapping: Tensor,
) -> None:  # fmt: skip
    """Normalises (if norms) and rotates q in place; k, likewise, and v go to their slots.

    q [T, H, D], k and v [T, G, D] may be views of one tensor; kv_cache [B, 2, G, P, D];
    slot -1 stores nothing.
    """
    _launch_rope(q, k, v, norms, eps, cos_sin, positions, kv_cache, slot_mapping)
