"""Attention on a CUDA device through our Triton kernels.

Nothing is decided from the values of lengths: launches depend on shapes and on max_q_len and
max_context_len alone, so a batch of single tokens can be captured in a CUDA graph.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any, ClassVar

import torch
from torch import Tensor

from nanovllm.attention.base import AttentionBatch, AttentionSpec

MAX_HEAD_DIM = 256


class TritonAttention:
    """bfloat16, float16, float32; head sizes up to 256; any block size and window."""

    name: ClassVar[str] = "triton"

    def __init__(self) -> None:
        self._kernels: Any = importlib.import_module("nanovllm.kernels.gpu.attention")
        self._workspace: Any = None

    @classmethod
    def unsupported(cls, spec: AttentionSpec) -> str | None:
        if spec.device.type != "cuda":
            return f"needs a CUDA device, this is {spec.device.type}"
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        if torch.cuda.get_device_capability(spec.device) < (8, 0):
            return "needs compute capability 8.0"
        if spec.head_dim > MAX_HEAD_DIM or spec.head_dim % 2:
            return f"head size {spec.head_dim} is odd or over {MAX_HEAD_DIM}"
        return None

    def plan(self, batch: AttentionBatch) -> None:
        """Nothing: the kernels read every length on the device."""

    def workspace(self, num_heads: int, head_dim: int, device: torch.device) -> Any:
        """Shared by all layers: their launches follow one another on one stream."""
        if self._workspace is None:
            self._workspace = self._kernels.DecodeWorkspace(num_heads, head_dim, device)
        return self._workspace

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
        self._kernels.store_kv(k, v, kv_cache, batch.slot_mapping)
        return self.attend(q, kv_cache, batch, scale, window)

    def attend(
        self,
        q: Tensor,
        kv_cache: Tensor,
        batch: AttentionBatch,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """As `forward`, with the step's keys and values already in the cache."""
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)  # q may be a strided view
        common = (kv_cache, batch.cu_q_lens, batch.context_lens, batch.block_tables, scale, window)
        if batch.max_q_len > 1:
            self._kernels.prefill(q, *common, out, skip_single=True)
            if batch.min_q_len > 1:
                return out
        splits = self._kernels.num_splits(batch.num_seqs, kv_cache.shape[2], batch.max_context_len)
        workspace = self.workspace(q.shape[1], q.shape[2], q.device)
        return self._kernels.decode(q, *common, workspace, splits, out)
