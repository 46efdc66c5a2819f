"""The CPU kernels as functions of tensors: loading, checks, and the calls into C++.

Knows tensors and the C interface of the library; knows nothing of models or of the engine.
Every result is a function of its own row alone: its bits do not depend on the other rows, on how
a prompt was cut into steps, or on the number of threads. All sums are float32; results are
rounded once, to nearest even, when they are stored.

Shape legend: T tokens, M rows, N outputs, K inputs, S sequences, H query heads, G KV heads,
D head dim, B blocks, P slots a block.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

import torch
from torch import Tensor

from nanovllm.kernels.cpu.library import NO_MEMORY, library
from nanovllm.kernels.cpu.views import (
    DTYPES,
    MAX_DIM,
    BatchView,
    CacheView,
    PackedWeight,
    check,
    check_heads,
    describe,
    dtype_code,
)

__all__ = ["DTYPES", "MAX_DIM", "BatchView", "CacheView", "CpuOps", "PackedWeight", "load"]


def load(num_threads: int | None = None) -> CpuOps | str:
    """The operators, or the reason in words why there are none here.

    Compiles at the first use on a machine (seconds), later loads what was compiled. The first
    call of a process settles the number of threads, by default torch.get_num_threads(); a later
    call changes it for the whole process only if it names one. Results do not depend on it.
    """
    loaded = library()
    if isinstance(loaded, str):
        return loaded
    if num_threads is not None:
        loaded.nanovllm_start(num_threads)
    return CpuOps(loaded)


@contextlib.contextmanager
def one_torch_thread() -> Iterator[None]:
    """Torch's own operators run on the caller's thread alone inside.

    After a parallel operator torch's threads spin for some milliseconds in wait of the next one,
    on the processors that the kernels' threads need. So a step runs inside this.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


class CpuOps:
    """The operators. Wrong dtypes, shapes or strides raise ValueError with the numbers, too little
    memory to work in raises MemoryError."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._linear = library.nanovllm_linear
        self._embedding = library.nanovllm_embedding
        self._rms_norm = library.nanovllm_rms_norm
        self._add_rms_norm = library.nanovllm_add_rms_norm
        self._rope = library.nanovllm_rope
        self._silu_mul = library.nanovllm_silu_mul
        self._store_kv = library.nanovllm_store_kv
        self._attention = library.nanovllm_attention
        self.forward = library.nanovllm_forward  # addresses in, see runner/cpu_forward.py

    def pack(self, weight: Tensor) -> PackedWeight:
        """[N, K] of float32, bfloat16 or float16 -> a packed copy of the same precision."""
        return PackedWeight(self._library, weight)

    def linear(self, x: Tensor, w: PackedWeight, bias: Tensor | None = None) -> Tensor:
        """x [..., K] @ w.T + bias [N] -> [..., N] in the dtype of x, which is that of w."""
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        m, k = rows.shape
        if k != w.k or x.dtype is not w.dtype or rows.stride(1) != 1:
            raise ValueError(f"linear: x is {describe(x)}, the weight [{w.n}, {w.k}] {w.dtype}")
        out = torch.empty(m, w.n, dtype=x.dtype)
        bias_ptr = None
        if bias is not None:
            check("linear: bias", bias, (w.n,), x.dtype)
            bias_ptr = bias.data_ptr()
        if self._linear(w.handle, rows.data_ptr(), rows.stride(0), m, bias_ptr, out.data_ptr()):
            raise MemoryError(f"linear: no memory to work on {m} rows of {k}")
        return out if x.dim() == 2 else out.view(*x.shape[:-1], w.n)

    def embedding(self, w: PackedWeight, ids: Tensor) -> Tensor:
        """Rows of a packed weight [N, K]: ids [T] int64 -> [T, K]."""
        check("embedding: ids", ids, (ids.numel(),), torch.int64)
        out = torch.empty((ids.numel(), w.k), dtype=w.dtype)
        bad = self._embedding(w.handle, ids.data_ptr(), ids.numel(), out.data_ptr())
        if bad >= 0:
            raise ValueError(f"embedding: id {int(ids[bad])} is outside [0, {w.n})")
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """[..., n] -> the same shape: x / sqrt(mean(x^2) + eps) * weight."""
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        m, n = rows.shape
        dtype = dtype_code("rms_norm", x)
        check("rms_norm: weight", weight, (n,), x.dtype)
        if rows.stride(1) != 1:
            raise ValueError(f"rms_norm: the last dimension must be contiguous: {describe(x)}")
        out = torch.empty_like(rows)
        self._rms_norm(
            dtype, rows.data_ptr(), rows.stride(0), weight.data_ptr(), eps, m, n, out.data_ptr()
        )
        return out if x.dim() == 2 else out.view(x.shape)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """residual += x in place (rounded to its dtype); returns rms_norm(residual)."""
        n = x.shape[-1]
        dtype = dtype_code("add_rms_norm", x)
        check("add_rms_norm: x", x, x.shape, x.dtype)
        check("add_rms_norm: residual", residual, x.shape, x.dtype)
        check("add_rms_norm: weight", weight, (n,), x.dtype)
        out = torch.empty_like(x)
        x_ptr, residual_ptr, weight_ptr = x.data_ptr(), residual.data_ptr(), weight.data_ptr()
        rows = x.numel() // n
        self._add_rms_norm(dtype, x_ptr, residual_ptr, weight_ptr, eps, rows, n, out.data_ptr())
        return out

    def rope(self, q: Tensor, k: Tensor, cos_sin: Tensor, positions: Tensor) -> None:
        """Rotates q [T, H, D] and k [T, G, D] in place by their positions [T] int64.

        cos_sin is [max_position, D] float32: the cosines of D/2 angles, then the sines. The pairs
        are (i, i + D/2). q and k may be rows of a wider tensor.
        """
        self._rotate(q, k, None, None, 0.0, cos_sin, positions)

    def qk_norm_rope(
        self,
        q: Tensor,
        k: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        eps: float,
        cos_sin: Tensor,
        positions: Tensor,
    ) -> None:
        """RMS norm of every head of q and k with weights [D], then rope, in place, one pass."""
        for weight in (q_weight, k_weight):
            check("qk_norm_rope: weight", weight, (q.shape[-1],), q.dtype)
        self._rotate(q, k, q_weight.data_ptr(), k_weight.data_ptr(), eps, cos_sin, positions)

    def _rotate(
        self,
        q: Tensor,
        k: Tensor,
        q_norm: int | None,
        k_norm: int | None,
        eps: float,
        cos_sin: Tensor,
        positions: Tensor,
    ) -> None:
        num_tokens, num_heads, dim = check_heads("rope: q", q, q.dtype)
        _, num_kv_heads, _ = check_heads("rope: k", k, q.dtype, num_tokens, dim)
        check("rope: cos_sin", cos_sin, (cos_sin.shape[0], dim), torch.float32)
        check("rope: positions", positions, (num_tokens,), torch.int64)
        bad = self._rope(
            *(dtype_code("rope", q), q.data_ptr(), q.stride(0), num_heads, q_norm),
            *(k.data_ptr(), k.stride(0), num_kv_heads, k_norm),
            *(eps, cos_sin.data_ptr(), cos_sin.shape[0], positions.data_ptr(), num_tokens, dim),
        )
        if bad >= 0:
            limit = cos_sin.shape[0]
            raise ValueError(f"rope: position {int(positions[bad])} is outside [0, {limit})")

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """[T, 2I] -> silu(gate) * up [T, I], where gate is the first half of a row."""
        check("silu_mul: gate_up", gate_up, (gate_up.shape[0], gate_up.shape[-1]), gate_up.dtype)
        rows, width = gate_up.shape
        out = torch.empty(rows, width // 2, dtype=gate_up.dtype)
        dtype = dtype_code("silu_mul", gate_up)
        self._silu_mul(dtype, gate_up.data_ptr(), rows, width // 2, out.data_ptr())
        return out

    def view(self, kv_cache: Tensor) -> CacheView:
        """The view of a cache [B, 2, G, P, D] yet to be written, on huge pages if there are any."""
        view = CacheView(kv_cache)
        self._library.nanovllm_want_huge_pages(view.data, view.num_bytes)
        return view

    def store_kv(self, k: Tensor, v: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        """Writes k and v [T, G, D] into the slots [T] int64 (block * P + offset) of
        kv_cache [B, 2, G, P, D], in the order of dimensions that `attention` reads."""
        batch = BatchView.__new__(BatchView)
        batch.set_slots(slot_mapping)
        cache = CacheView(kv_cache)
        bad = self._store_kv(
            *(ctypes.addressof(cache), ctypes.addressof(batch)), *_new_tokens(k, v, cache, batch)
        )
        if bad >= 0:
            raise ValueError(f"store_kv: {cache.describe_slot(int(slot_mapping[bad]))}")

    def attention(
        self,
        q: Tensor,
        kv_cache: Tensor,
        block_tables: Tensor,
        cu_q_lens: Tensor,
        context_lens: Tensor,
        scale: float,
        window: int | None = None,
    ) -> Tensor:
        """Causal attention of q [T, H, D] over the slots that block_tables names -> [T, H, D].

        The other arguments are as in AttentionBatch; window counts the positions a query sees,
        its own included. Slots outside a context are never used, whatever they hold.
        """
        batch = BatchView(cu_q_lens, context_lens, block_tables)
        return self.attend(q, None, None, CacheView(kv_cache), batch, scale, window)

    def attend(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        cache: CacheView,
        batch: BatchView,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """attention, with a cache and a batch that were checked before; first stores k and v
        [T, G, D] into the batch's slots if they are given."""
        _, num_heads, _ = check_heads("attention: q", q, cache.torch_dtype, None, cache.dim)
        if num_heads % cache.num_heads or (window is not None and window < 1):
            raise ValueError(
                f"attention: {num_heads} query heads over {cache.num_heads} KV heads, "
                f"window {window}"
            )
        new = (None, 0, None, 0) if k is None or v is None else _new_tokens(k, v, cache, batch)
        out = torch.empty_like(q)  # dense: only the distance between tokens may be wider in q
        bad = self._attention(
            *(ctypes.addressof(cache), ctypes.addressof(batch), q.data_ptr(), q.stride(0), *new),
            *(num_heads, scale, window or 0, out.data_ptr()),
        )
        if bad >= 0:
            raise ValueError(
                f"attention: sequence {bad} names a block outside [0, {cache.num_blocks})"
            )
        if bad == NO_MEMORY:
            raise MemoryError(f"attention: no memory to work on {q.shape[0]} tokens")
        if bad < -1:
            raise ValueError(f"attention: {cache.describe_slot(batch.slot(-2 - bad))}")
        return out


def _new_tokens(
    k: Tensor, v: Tensor, cache: CacheView, batch: BatchView
) -> tuple[int, int, int, int]:
    """k and v [T, G, D] of a batch's tokens as addresses and distances between tokens."""
    dtype, heads, dim = cache.torch_dtype, cache.num_heads, cache.dim
    check_heads("new keys", k, dtype, batch.num_tokens, dim, heads)
    check_heads("new values", v, dtype, batch.num_tokens, dim, heads)
    return k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0)
