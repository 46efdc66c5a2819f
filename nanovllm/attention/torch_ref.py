"""Paged attention in plain torch: the executable specification, and the fallback everywhere.

Rows that compute one token are attended together, whatever their lengths; each longer row by
itself. Softmax is in float32. Slots outside a sequence's context are never part of the result,
even if they hold NaN.

Shape legend: T tokens, S sequences, H query heads, G KV heads, R = H / G, D head dim, L context.
"""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from nanovllm.attention.base import AttentionBatch, AttentionSpec

# Bounds the memory of a gathered group: this many KV slots at a time.
MAX_GATHERED_SLOTS = 1 << 16


class TorchAttention:
    """Any device, dtype, head size, block size and window."""

    name: ClassVar[str] = "torch"

    @classmethod
    def unsupported(cls, spec: AttentionSpec) -> str | None:
        return None

    def plan(self, batch: AttentionBatch) -> None:
        """Splits rows into groups that share one gather: (rows, query starts, query length)."""
        starts = batch.cu_q_lens.tolist()
        lens = [end - start for start, end in pairwise(starts)]
        single = [row for row, n in enumerate(lens) if n == 1]
        group = max(1, MAX_GATHERED_SLOTS // max(1, batch.max_context_len))
        groups = [
            ([*single[i : i + group]], [starts[row] for row in single[i : i + group]], 1)
            for i in range(0, len(single), group)
        ]
        groups += [([row], [starts[row]], n) for row, n in enumerate(lens) if n > 1]
        device = batch.context_lens.device
        batch.plan = [
            (torch.tensor(rows, device=device), torch.tensor(begins, device=device), n)
            for rows, begins, n in groups
        ]

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv_cache: Tensor,
        batch: AttentionBatch,
        scale: float,
        window: int | None,
    ) -> Tensor:
        store_kv(k, v, kv_cache, batch.slot_mapping)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for rows, begins, n in batch.plan:
            queries = (begins[:, None] + torch.arange(n, device=q.device)).view(-1)
            context_lens = batch.context_lens[rows].long()
            blocks = -(-int(context_lens.max()) // kv_cache.shape[3])
            keys, values = _gather(kv_cache, batch.block_tables[rows, :blocks].long(), context_lens)
            picked = q[queries].view(len(rows), n, *q.shape[1:])
            out[queries] = _attend(picked, keys, values, context_lens, scale, window).flatten(0, 1)
        return out


def store_kv(k: Tensor, v: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    """Writes k and v [T, G, D] into kv_cache [B, 2, G, P, D] at slots [T]."""
    block = slot_mapping // kv_cache.shape[3]
    offset = slot_mapping % kv_cache.shape[3]
    kv_cache[block, 0, :, offset] = k.to(kv_cache.dtype)
    kv_cache[block, 1, :, offset] = v.to(kv_cache.dtype)


def _gather(kv_cache: Tensor, tables: Tensor, context_lens: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks [S, N] -> keys and values [S, G, N P, D], zero past each context."""
    num_blocks, _, heads, slots, dim = kv_cache.shape
    inside = torch.arange(tables.shape[1] * slots, device=tables.device) < context_lens[:, None]
    needed = inside.view(*tables.shape, slots)[:, :, 0]
    tables = torch.where(needed, tables, 0).clamp(0, num_blocks - 1)
    picked = kv_cache[tables].permute(2, 0, 3, 1, 4, 5)  # [2, S, G, N, P, D]
    picked = picked.reshape(2, len(tables), heads, -1, dim)
    keys, values = torch.where(inside[None, :, None, :, None], picked, 0)
    return keys, values


def _attend(
    q: Tensor, keys: Tensor, values: Tensor, context_lens: Tensor, scale: float, window: int | None
) -> Tensor:
    """q [S, n, H, D], keys and values [S, G, L, D] -> [S, n, H, D]"""
    num_seqs, n, num_heads, dim = q.shape
    groups = keys.shape[1]
    q = q.view(num_seqs, n, groups, num_heads // groups, dim).permute(0, 2, 1, 3, 4)
    q = q.reshape(num_seqs, groups, -1, dim)  # [S, G, n R, D]
    scores = (q @ keys.transpose(-1, -2)).float() * scale
    visible = _visible(n, keys.shape[2], context_lens, window)  # [S, n, L]
    visible = visible.repeat_interleave(num_heads // groups, dim=1)[:, None]
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1).to(values.dtype)
    out = (weights @ values).view(num_seqs, groups, n, -1, dim)
    return out.permute(0, 2, 1, 3, 4).reshape(num_seqs, n, num_heads, dim)


def _visible(n: int, num_keys: int, context_lens: Tensor, window: int | None) -> Tensor:
    """Which keys each of the last n positions sees: its own and earlier ones, within the window."""
    device = context_lens.device
    positions = context_lens[:, None] - n + torch.arange(n, device=device)  # [S, n]
    distance = positions[:, :, None] - torch.arange(num_keys, device=device)
    visible = distance >= 0
    return visible if window is None else visible & (distance < window)
