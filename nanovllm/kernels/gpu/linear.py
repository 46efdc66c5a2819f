"""Matrix products with few rows, fused with the norm before and the residual or SiLU after.

At few rows a product is a read of its weights: a program holds whole weight rows in registers
and goes over the rows of x. Weights do not depend on the kernel before, so with programmatic
dependent launch their reads start before it ends. Beyond `max_rows` cuBLAS is faster.

RMSNorm is applied as (x * weight) @ W.T scaled by 1 / rms(x): the norm needs no pass of its own.

Shape legend: M rows, K input features, N output features (of one of gate and up, if GATED).
"""

# mypy: disable-error-code="no-untyped-def, attr-defined, misc"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda as tl_cuda


def max_rows(hidden_size: int) -> int:
    """Rows up to which this beats cuBLAS, as measured on an H200 at hidden sizes 1024 and 4096."""
    return 4 if hidden_size <= 2048 else 1


def _tile(k: int, gated: bool) -> tuple[int, int]:
    """(weight rows a program, warps): 128 weights in each thread's registers measured best."""
    elements, warps = (16384, 4) if k <= 3072 else (32768, 8)
    return max(1, elements // triton.next_power_of_2(k) // (2 if gated else 1)), warps


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
def _linear_kernel(
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
    w = tl.load(w_ptrs, mask=w_mask, other=0.0, eviction_policy="evict_first")
    if GATED:
        up = tl.load(w_ptrs + N * K, mask=w_mask, other=0.0, eviction_policy="evict_first")
    if NORM:
        norm = tl.load(norm_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    if BIAS:
        bias = tl.load(bias_ptr + n, mask=n_mask, other=0.0).to(tl.float32)
    if PDL:
        tl_cuda.gdc_wait()
        tl_cuda.gdc_launch_dependents()
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    for m in range(M):
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
        _finish(
            y, gate, residual_ptr + m * N + n, out_ptr + m * N + n, n_mask, dtype, GATED, RESIDUAL
        )


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
    tile: tuple[int, int] | None = None,
) -> Tensor:
    """x [M, K] contiguous, M small -> out [M, N], which may be `residual` itself.

    weight is [N, K], or if gated [2 N, K]: rows of the gate, then of up. norm [K] is the weight
    of an RMSNorm of x. bias [N] is not for gated products.
    """
    m, k = x.shape
    n = len(weight) // 2 if gated else len(weight)
    assert all(t.is_contiguous() for t in (x, weight, out)), "rows must follow one another"
    assert bias is None or not gated, "gated products take no bias"
    k_pad = triton.next_power_of_2(k)
    block_n, warps = tile or _tile(k, gated)
    options = {"launch_pdl": True} if pdl else {}
    _linear_kernel[(triton.cdiv(n, block_n),)](
        x, norm, weight, bias, out if residual is None else residual, out, m, n, eps,
        k, k_pad, block_n, norm is not None, bias is not None, gated, residual is not None, pdl,
        num_warps=warps, **options,
    )  # fmt: skip
    return out
