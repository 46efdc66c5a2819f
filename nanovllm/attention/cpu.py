"""Attention on a CPU through the compiled kernels. Knows the seam and the operators, no models."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from nanovllm.attention.base import AttentionBatch, AttentionSpec
from nanovllm.kernels import cpu_ops
from nanovllm.kernels.cpu_ops import BatchView, CacheView


class CpuAttention:
    """AttentionBackend whose results depend, bit for bit, on each query's own context alone."""

    name: ClassVar[str] = "cpu"

    @classmethod
    def unsupported(cls, spec: AttentionSpec) -> str | None:
        if spec.device.type != "cpu":
            return f"the CPU kernels cannot serve a {spec.device.type} device"
        if spec.dtype not in cpu_ops.DTYPES:
            return f"the CPU kernels know float32, bfloat16 and float16, not {spec.dtype}"
        for what, value in (("head_dim", spec.head_dim), ("block_size", spec.block_size)):
            if value % 8 or not 8 <= value <= cpu_ops.MAX_DIM:
                return (
                    f"the CPU kernels need a {what} that is a multiple of 8 up to 256, not {value}"
                )
        ops = cpu_ops.load()
        return f"the CPU kernels are not available: {ops}" if isinstance(ops, str) else None

    def __init__(self) -> None:
        ops = cpu_ops.load()
        if isinstance(ops, str):
            raise RuntimeError(ops)
        self._ops = ops
        self._caches: dict[tuple[object, ...], CacheView] = {}

    def plan(self, batch: AttentionBatch) -> None:
        """Checks the batch and notes its addresses, once for all layers."""
        tables, slots = batch.block_tables, batch.slot_mapping
        batch.plan = BatchView(batch.cu_q_lens, batch.context_lens, tables, slots)

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
        """Stores k and v [T, G, D] into their slots, then attends q [T, H, D] -> [T, H, D]."""
        return self._ops.attend(q, k, v, self.view(kv_cache), batch.plan, scale, window)

    def view(self, kv_cache: Tensor) -> CacheView:
        """The checked view of one layer's cache: numbers only, the same for the same key."""
        key = (kv_cache.data_ptr(), kv_cache.shape, kv_cache.stride(), kv_cache.dtype)
        view = self._caches.get(key)
        if view is None:
            view = self._caches[key] = self._ops.view(kv_cache)
        return view
