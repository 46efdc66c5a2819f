"""Matrix products whose every row is added up in one fixed order, however many rows there are.

cuBLAS picks a kernel by the number of rows, so a row's last bits depend on its neighbours. Here an
output element is always the same chain of matrix instructions over K: the tile grows with M, but
each instruction keeps its shape in M and K, and a row never meets another. In 16 bits every tile
has at least 64 rows, so that all of them use the same instruction (wgmma on Hopper).

Shape legend: M rows, K input features, N output features.
"""

# mypy: disable-error-code="no-untyped-def, attr-defined, misc"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

FEW_ROWS = 64
GROUP = 8  # tiles of M that follow one another over the same weights, for the L2 cache


@triton.jit(do_not_specialize=["M"])
def _linear_kernel(
    x_ptr, w_ptr, bias_ptr, residual_ptr, out_ptr, M, N, x_stride,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of M times tiles of N)."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    group = tl.program_id(0) // (GROUP * tiles_n)
    inside = tl.program_id(0) % (GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    m = (group * GROUP + inside % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (inside // height) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_rows = x_ptr + m.to(tl.int64)[:, None] * x_stride
    w_rows = w_ptr + n.to(tl.int64)[:, None] * K
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        x_mask = (m < M)[:, None]
        w_mask = (n < N)[:, None]
        if K % BLOCK_K:
            x_mask = x_mask & (start + k < K)[None, :]
            w_mask = w_mask & (start + k < K)[None, :]
        x = tl.load(x_rows + (start + k)[None, :], mask=x_mask, other=0.0)
        w = tl.load(w_rows + (start + k)[None, :], mask=w_mask, other=0.0)
        acc = tl.dot(x, w.T, acc, input_precision=PRECISION)
    mask = (m < M)[:, None] & (n < N)[None, :]
    if BIAS:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    spot = m.to(tl.int64)[:, None] * N + n[None, :]
    if RESIDUAL:
        acc += tl.load(residual_ptr + spot, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + spot, acc.to(out_ptr.dtype.element_ty), mask=mask)


def _tile(m: int, n: int, dtype: torch.dtype) -> tuple[int, int, int, int, int]:
    """(rows, columns, K a turn, warps, stages); few rows: narrow tiles, to keep the device full."""
    if dtype == torch.float32:
        return 32, 32, 32, 4, 2
    if m <= FEW_ROWS:
        return 64, 16 if n <= 2048 else 32, 128, 4, 4
    if m <= 2 * FEW_ROWS or n * m <= 1 << 20:
        return 64, 64, 64, 4, 4
    return 128, 128, 64, 8, 4


def linear(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    tile: tuple[int, int, int, int, int] | None = None,
) -> Tensor:
    """x [M, K] @ weight [N, K].T (+ bias [N]) (+ residual [M, N]) -> out [M, N].

    `out` may be `residual` itself; rounded once, at the end.
    """
    m, k = x.shape
    n = len(weight)
    if out is None:
        out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    assert x.stride(1) == 1, "features of a row must follow one another"
    assert weight.is_contiguous(), "weights must be contiguous"
    assert out.is_contiguous(), "results must be contiguous"
    block_m, block_n, block_k, warps, stages = tile or _tile(m, n, x.dtype)
    _linear_kernel[(triton.cdiv(m, block_m) * triton.cdiv(n, block_n),)](
        x, weight, bias, out if residual is None else residual, out, m, n, x.stride(0),
        k, block_m, block_n, block_k, GROUP, bias is not None, residual is not None,
        "ieee" if x.dtype == torch.float32 else "tf32", num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out
