"""The attention seam: what a batch looks like to a backend, and how a backend is chosen.

A backend reads and writes the paged KV cache of one layer. It knows this module and tensors;
it knows nothing of sequences, the scheduler, or models.

Shape legend: T tokens in the batch, S sequences, H query heads, G KV heads, D head dim,
B blocks in the cache, P slots a block, N columns of the block table.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionSpec:
    """What a model asks of a backend; fixed for the life of a runner.

    sliding_windows holds one entry a layer: None for full attention, else the number of
    positions (the query's own included) that a query sees.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype
    device: torch.device
    sliding_windows: tuple[int | None, ...] = ()


@dataclass
class AttentionBatch:
    """One step's tokens, packed without padding: sequence s owns rows cu_q_lens[s]:cu_q_lens[s+1].

    The last query of sequence s stands at position context_lens[s] - 1; its keys are the
    context_lens[s] slots that block_tables[s] names, the new tokens' own slots included.
    Entries of block_tables past the context are undefined and must not be read.
    """

    cu_q_lens: Tensor  # [S+1] int32
    context_lens: Tensor  # [S] int32
    block_tables: Tensor  # [S, N] int32, rows may be strided
    slot_mapping: Tensor  # [T] int64: block id * P + offset of each new token
    positions: Tensor  # [T] int64
    max_q_len: int
    max_context_len: int
    min_q_len: int = 1  # a bound: rows may all be longer
    plan: Any = field(default=None)  # what the backend's `plan` left for its `forward`

    @property
    def num_seqs(self) -> int:
        return self.context_lens.shape[0]


class AttentionBackend(Protocol):
    """Paged causal attention with grouped query heads."""

    name: ClassVar[str]

    @classmethod
    def unsupported(cls, spec: AttentionSpec) -> str | None:
        """The reason in words why this backend cannot serve `spec` here, or None if it can."""

    def plan(self, batch: AttentionBatch) -> None:
        """Host work once a step, before any layer; may fill `batch.plan`."""

    def forward(
        self,
        q: Tensor,  # [T, H, D]
        k: Tensor,  # [T, G, D]
        v: Tensor,  # [T, G, D]
        kv_cache: Tensor,  # [B, 2, G, P, D]: keys at [:, 0], values at [:, 1]; the order of P, D
        # is the backend's own
        batch: AttentionBatch,
        scale: float,
        window: int | None,
    ) -> Tensor:  # [T, H, D]
        """Stores k and v into their slots, then attends each query to its context."""
