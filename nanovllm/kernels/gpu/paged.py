"""The paged cache as attention kernels address it: where a key lies, and storing new ones.

The cache of one layer is [B, 2, G, P, D], contiguous. Knows tensors alone.

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

LOG2_E = math.log2(math.e)


@triton.jit
def tile_offsets(
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


@triton.jit
def as_float16(q, scale):
    """(q [rows, D] in float16, what scores are then to be multiplied with [rows, 1]).

    Each row is divided by its largest value, so that none becomes infinite.
    """
    q = q.to(tl.float32)
    size = tl.max(tl.abs(q), 1)[:, None]
    size = tl.where(size > 0, size, 1.0)
    return (q / size).to(tl.float16), size * scale


def store_kv(k: Tensor, v: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    """Writes k and v [T, G, D] into kv_cache [B, 2, G, P, D] at slots [T] int64."""
    _, _, groups, slots, dim = kv_cache.shape
    assert k.stride(1) == v.stride(1) == dim, "heads of a token must follow one another"
    _store_kernel[(len(k),)](
        k, v, kv_cache, slot_mapping, k.stride(0), v.stride(0), groups,
        triton.next_power_of_2(groups), dim, triton.next_power_of_2(dim), slots, num_warps=2,
    )  # fmt: skip


def precision(x: Tensor) -> str:
    """float32 products stay float32; 16-bit inputs do not care."""
    return "ieee" if x.dtype == torch.float32 else "tf32"


def is_narrow(q: Tensor, kv_cache: Tensor) -> bool:
    """Whether to compute in float16: it holds all 8-bit floats, and they become it fastest."""
    return kv_cache.element_size() == 1 and q.element_size() == 2
