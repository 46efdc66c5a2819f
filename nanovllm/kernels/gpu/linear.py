"""Matrix products with few rows, fused with the norm before and the residual or SiLU after.

At few rows a product is a read of its weights. Up to GEMV_ROWS rows a program holds whole weight
rows in registers; up to SKINNY_ROWS rows the matrix units do the work. Weights do not depend on
the kernel before, so with programmatic dependent launch their reads start before it ends.

RMSNorm is applied as (x * weight) @ W.T scaled by 1 / rms(x): the norm needs no pass of its own.

Shape legend: M rows, K input features, N output features (of one of gate and up, if GATED).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda as tl_cuda

GEMV_ROWS = 4
SKINNY_ROWS = 64
GEMV_ELEMENTS = 16384  # weights a program: 64 in each of 256 threads' registers


@triton.jit
def _finish(value, gate, residual_ptrs, out_ptrs, mask, dtype: tl.constexpr,
            GATED: tl.constexpr, RESIDUAL: tl.constexpr):  # fmt: skip
    """Rounds once like the unfused sequence, then SiLU(gate) * value or the residual sum."""
    value = value.to(dtype).to(tl.float32)
    if GATED:
        gate = gate.to(dtype).to(tl.float32)
        value = value * (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    if RESIDUAL:
        value += tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptrs, value.to(out_ptrs.dtype.element_ty), mask=mask)


@triton.jit
def _gemv_kernel(
    x_ptr, norm_ptr, w_ptr, bias_ptr, residual_ptr, out_ptr, M, N, eps,
    K: tl.constexpr, K_PAD: tl.constexpr, BLOCK_N: tl.constexpr,
    NORM: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of N): BLOCK_N whole weight rows against every row of x."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, K_PAD)
    n_mask = n < N
    w_mask = n_mask[:, None] & (k < K)[None, :]
    w_ptrs = w_ptr + n.to(tl.int64)[:, None] * K + k[None, :]
    if PDL:
        tl_cuda.gdc_launch_dependents()
    w = tl.load(w_ptrs, mask=w_mask, other=0.0, eviction_policy="evict_first")
    if GATED:
        up = tl.load(w_ptrs + N * K, mask=w_mask, other=0.0, eviction_policy="evict_first")
    if NORM:
        norm = tl.load(norm_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    if BIAS:
        bias = tl.load(bias_ptr + n, mask=n_mask, other=0.0).to(tl.float32)
    if PDL:
        tl_cuda.gdc_wait()
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    for m in range(0, M):
        x = tl.load(x_ptr + m * K + k, mask=k < K, other=0.0).to(tl.float32)
        scale = 1.0
        if NORM:
            scale = tl.rsqrt(tl.sum(x * x, 0) / K + eps)
            x = x * norm
        y = tl.sum(w.to(tl.float32) * x[None, :], 1) * scale
        gate = y
        if GATED:
            y = tl.sum(up.to(tl.float32) * x[None, :], 1) * scale
        if BIAS:
            y += bias
        _finish(y, gate, residual_ptr + m * N + n, out_ptr + m * N + n, n_mask, dtype, GATED,
                RESIDUAL)


@triton.jit
def _skinny_kernel(
    x_ptr, norm_ptr, w_ptr, bias_ptr, residual_ptr, out_ptr, M, N, eps,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    NORM: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr,
    PDL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of N, tiles of M): x is small and comes from cache, weights are read once."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    n_mask = n < N
    m_mask = m < M
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    w_ptrs = w_ptr + n.to(tl.int64)[:, None] * K + k[None, :]
    x_ptrs = x_ptr + m[:, None] * K + k[None, :]
    if PDL:
        tl_cuda.gdc_launch_dependents()
        # Brings the program's weights to the L2 cache while the kernel before still runs.
        first = tl.program_id(0) * BLOCK_N
        rows = tl.minimum(BLOCK_N, N - first)
        start = w_ptr + first.to(tl.int64) * K
        _prefetch(start, rows * K * 2)
        if GATED:
            _prefetch(start + N * K, rows * K * 2)
        tl_cuda.gdc_wait()
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        inside = k0 + k < K
        x = tl.load(x_ptrs + k0, mask=m_mask[:, None] & inside[None, :], other=0.0)
        w = tl.load(w_ptrs + k0, mask=n_mask[:, None] & inside[None, :], other=0.0)
        if NORM:
            wide = x.to(tl.float32)
            squares += tl.sum(wide * wide, 1)
            norm = tl.load(norm_ptr + k0 + k, mask=inside, other=0.0).to(tl.float32)
            x = (wide * norm[None, :]).to(dtype)
        if GATED:
            gate = tl.dot(x, w.T, gate, input_precision=PRECISION)
            w = tl.load(w_ptrs + N * K + k0, mask=n_mask[:, None] & inside[None, :], other=0.0)
        acc = tl.dot(x, w.T, acc, input_precision=PRECISION)
    if NORM:
        scale = tl.rsqrt(squares / K + eps)[:, None]
        acc = acc * scale
        gate = gate * scale
    if BIAS:
        acc += tl.load(bias_ptr + n, mask=n_mask, other=0.0).to(tl.float32)[None, :]
    offsets = m.to(tl.int64)[:, None] * N + n[None, :]
    mask = m_mask[:, None] & n_mask[None, :]
    _finish(acc, gate, residual_ptr + offsets, out_ptr + offsets, mask, dtype, GATED, RESIDUAL)


@triton.jit
def _prefetch(ptr, num_bytes):
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;", "=r,l,r",
        [ptr.to(tl.int64, bitcast=True), num_bytes], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


def _skinny_tile(m: int, n: int, k: int, gated: bool) -> tuple[int, int, int, int, int]:
    """(rows, outputs, inputs a tile, warps, stages): enough programs for every multiprocessor."""
    rows = max(16, triton.next_power_of_2(m))
    outputs = 16 if n <= 2560 else (32 if n <= 16384 else 64)
    inputs = 256 if rows <= 32 else 128
    return rows, outputs, inputs, 4, 3 if gated else 4


def linear(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    bias: Tensor | None = None,
    gated: bool = False,
    residual: Tensor | None = None,
    pdl: bool = False,
    tile: tuple[int, ...] | None = None,
) -> Tensor:
    """x [M, K] contiguous, M at most SKINNY_ROWS -> out [M, N], which may be `residual` itself.

    weight is [N, K], or if gated [2 N, K]: rows of the gate, then of up. norm [K] is the weight
    of an RMSNorm of x. bias [N] is not for gated products.
    """
    m, k = x.shape
    n = len(weight) // 2 if gated else len(weight)
    assert x.is_contiguous() and weight.is_contiguous() and out.is_contiguous()
    assert not (gated and bias is not None) and out.shape == (m, n)
    options = {"launch_pdl": True} if pdl else {}
    flags = (norm is not None, bias is not None, gated, residual is not None, pdl)
    if m <= GEMV_ROWS and (tile is None or len(tile) == 2):
        k_pad = triton.next_power_of_2(k)
        block_n, warps = tile or (max(1, GEMV_ELEMENTS // k_pad // (2 if gated else 1)), 8)
        _gemv_kernel[(triton.cdiv(n, block_n),)](
            x, norm, weight, bias, out if residual is None else residual, out, m, n, eps, k, k_pad, block_n, *flags,
            num_warps=warps, **options,
        )  # fmt: skip
        return out
    rows, outputs, inputs, warps, stages = tile or _skinny_tile(m, n, k, gated)
    precision = "ieee" if x.dtype == torch.float32 else "tf32"
    _skinny_kernel[(triton.cdiv(n, outputs), triton.cdiv(m, rows))](
        x, norm, weight, bias, out if residual is None else residual, out, m, n, eps, k, rows, outputs, inputs, *flags,
        precision, num_warps=warps, num_stages=stages, **options,
    )  # fmt: skip
    return out
