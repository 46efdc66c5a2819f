"""Attention of rows of one query: how a step is cut into programs, and what it needs.

Nothing but shapes is decided here: the kernel reads lengths and tables on the device.

Shape legend: T tokens, S sequences, H query heads, G KV heads, D head dim.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from nanovllm.kernels.gpu.decode_kernel import MIN_SPLIT, decode_kernel
from nanovllm.kernels.gpu.paged import LOG2_E, is_narrow, precision


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


def _decode_tile(
    dim_pad: int, itemsize: int, programs: int, splits: int, *, narrow: bool
) -> tuple[int, int, int]:
    """(keys a tile, warps, stages): measured best at D = 128; others by their bytes."""
    if narrow and dim_pad == 128 and (splits >= 8 or programs > 2 * TARGET_PROGRAMS):
        return 32, 1, 6
    if narrow:
        return max(16, min(64, 8192 // dim_pad)), 2, 6
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
    narrow = is_narrow(q, kv_cache)
    programs = groups * len(context_lens) * splits
    keys, warps, stages = tile or _decode_tile(
        dim_pad, kv_cache.element_size(), programs, splits, narrow=narrow
    )
    ratio_pow2 = triton.next_power_of_2(ratio)
    assert q.stride(1) == out.stride(1) == dim, "heads of a token must follow one another"
    assert splits == 1 or splits * len(context_lens) <= MAX_SPLIT_PROGRAMS
    f = new or FusedInputs(q, q, None, q, 0.0)
    options = {"launch_pdl": True} if pdl else {}
    decode_kernel[(groups, len(context_lens), splits)](
        q, f.k, f.v, f.q_norm, f.k_norm, f.cos_sin, kv_cache, out,
        workspace.partial, workspace.stats, workspace.counter,
        cu_q_lens, context_lens, block_tables,
        q.stride(0), f.k.stride(0), out.stride(0), block_tables.stride(0),
        scale * LOG2_E, f.eps, window or 0,
        groups, ratio, ratio_pow2, max(8 if narrow else 16, ratio_pow2),
        dim, dim_pad, slots, keys, splits, window is not None, new is not None,
        f.q_norm is not None, pdl, precision(q), narrow, q.is_cuda,
        num_warps=warps, num_stages=stages, **options,
    )  # fmt: skip
    return out
