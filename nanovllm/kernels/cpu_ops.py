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
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nanovllm.kernels.cpu.build import BuildError, build_library

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MAX_DIM = 256  # of a head, and of the slots of a block
_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "start": (None, [_INT]),
    "pack": (_POINTER, [_POINTER, _LONG, _LONG, _INT]),
    "free": (None, [_POINTER]),
    "want_huge_pages": (None, [_POINTER, _LONG]),
    "linear": (None, [_POINTER, _POINTER, _LONG, _LONG, _POINTER, _POINTER]),
    "embedding": (_LONG, [_POINTER, _POINTER, _LONG, _POINTER]),
    "rms_norm": (None, [_INT, _POINTER, _LONG, _POINTER, _FLOAT, _LONG, _LONG, _POINTER]),
    "add_rms_norm": (None, [_INT, *[_POINTER] * 3, _FLOAT, _LONG, _LONG, _POINTER]),
    "rope": (
        _LONG,
        [
            *[_INT, _POINTER, _LONG, _LONG, _POINTER, _POINTER, _LONG, _LONG, _POINTER],
            *[_FLOAT, _POINTER, _LONG, _POINTER, _LONG, _LONG],
        ],
    ),
    "silu_mul": (None, [_INT, _POINTER, _LONG, _LONG, _POINTER]),
    "store_kv": (_LONG, [*[_POINTER] * 3, _LONG, _POINTER, _LONG]),
    "attention": (_LONG, [*[_POINTER] * 3, _LONG, _LONG, _FLOAT, _LONG, _POINTER]),
}


def load(num_threads: int | None = None) -> CpuOps | str:
    """The operators, or the reason in words why there are none here.

    Compiles at the first use on a machine (seconds), later loads what was compiled. The first
    call of a process settles the number of threads, by default torch.get_num_threads(); a later
    call changes it for the whole process only if it names one. Results do not depend on it.
    """
    library = _library()
    if isinstance(library, str):
        return library
    if num_threads is not None:
        library.nanovllm_start(num_threads)
    return CpuOps(library)


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


@functools.cache
def _library() -> ctypes.CDLL | str:
    try:
        library = ctypes.CDLL(str(build_library()))
    except (BuildError, OSError) as error:
        return str(error)
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, f"nanovllm_{name}")
        function.restype, function.argtypes = result, arguments
    library.nanovllm_start(torch.get_num_threads())
    return library


class PackedWeight:
    """A copy of a weight [N, K] in the order in which the kernels read it."""

    def __init__(self, library: ctypes.CDLL, weight: Tensor) -> None:
        if weight.dim() != 2 or weight.dtype not in DTYPES:
            raise ValueError(
                f"pack: a [N, K] weight of float32, bfloat16 or float16 is needed, "
                f"got {list(weight.shape)} {weight.dtype}"
            )
        weight = weight.contiguous()
        self.n, self.k = weight.shape
        self.dtype = weight.dtype
        self._free = library.nanovllm_free
        self.handle = library.nanovllm_pack(weight.data_ptr(), self.n, self.k, DTYPES[weight.dtype])
        if not self.handle:
            raise MemoryError(f"pack: no memory for a weight of {weight.numel()} elements")

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self._free(self.handle)


class CacheView(ctypes.Structure):
    """What the kernels know of kv_cache [B, 2, G, P, D]; valid while that tensor lives.

    Inside a block keys and values lie as the kernels like them (attention.h): P and D in another
    order.
    """

    _fields_ = (
        ("data", _POINTER),
        ("dtype", _LONG),
        ("num_blocks", _LONG),
        ("block_row", _LONG),
        ("num_heads", _LONG),
        ("block_size", _LONG),
        ("dim", _LONG),
    )

    def __init__(self, kv_cache: Tensor) -> None:
        num_blocks, two, num_heads, block_size, dim = kv_cache.shape
        inner = (num_heads * block_size * dim, block_size * dim, dim, 1)
        if two != 2 or dim % 8 or block_size % 8 or max(dim, block_size) > MAX_DIM:
            raise ValueError(
                f"the KV cache is {list(kv_cache.shape)}; it must be [B, 2, G, P, D] with P and D "
                f"multiples of 8 and at most {MAX_DIM}"
            )
        if kv_cache.stride()[1:] != inner:
            raise ValueError(f"a KV block must be contiguous: {_describe(kv_cache)}")
        dtype = _dtype("KV cache", kv_cache)
        row = kv_cache.stride(0)
        super().__init__(kv_cache.data_ptr(), dtype, num_blocks, row, num_heads, block_size, dim)
        self.torch_dtype = kv_cache.dtype
        self.num_bytes = row * num_blocks * kv_cache.itemsize


class BatchView(ctypes.Structure):
    """What the kernels know of a step's batch; valid while its tensors live unmoved."""

    _fields_ = (
        ("cu_q_lens", _POINTER),
        ("context_lens", _POINTER),
        ("block_tables", _POINTER),
        ("table_row", _LONG),
        ("num_seqs", _LONG),
        ("slots", _POINTER),
        ("num_tokens", _LONG),
    )

    def __init__(
        self,
        cu_q_lens: Tensor,
        context_lens: Tensor,
        block_tables: Tensor,
        slot_mapping: Tensor | None = None,
    ) -> None:
        num_seqs = context_lens.shape[0]
        _check("context_lens", context_lens, (num_seqs,), torch.int32)
        _check("cu_q_lens", cu_q_lens, (num_seqs + 1,), torch.int32)
        if block_tables.dtype is not torch.int32 or block_tables.stride(-1) != 1:
            raise ValueError(f"block_tables is {_describe(block_tables)}, not rows of int32")
        super().__init__(
            cu_q_lens.data_ptr(),
            context_lens.data_ptr(),
            block_tables.data_ptr(),
            block_tables.stride(0),
            num_seqs,
        )
        if slot_mapping is not None:
            self.set_slots(slot_mapping)

    def set_slots(self, slot_mapping: Tensor) -> None:
        _check("slot_mapping", slot_mapping, (slot_mapping.shape[0],), torch.int64)
        self.slots, self.num_tokens = slot_mapping.data_ptr(), slot_mapping.shape[0]


class CpuOps:
    """The operators. Wrong dtypes, shapes or strides raise ValueError with the numbers."""

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

    def pack(self, weight: Tensor) -> PackedWeight:
        """[N, K] of float32, bfloat16 or float16 -> a packed copy of the same precision."""
        return PackedWeight(self._library, weight)

    def linear(self, x: Tensor, w: PackedWeight, bias: Tensor | None = None) -> Tensor:
        """x [..., K] @ w.T + bias [N] -> [..., N] in the dtype of x, which is that of w."""
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        m, k = rows.shape
        if k != w.k or x.dtype is not w.dtype or rows.stride(1) != 1:
            raise ValueError(f"linear: x is {_describe(x)}, the weight [{w.n}, {w.k}] {w.dtype}")
        out = torch.empty(m, w.n, dtype=x.dtype)
        if bias is None:
            self._linear(w.handle, rows.data_ptr(), rows.stride(0), m, None, out.data_ptr())
        else:
            _check("linear: bias", bias, (w.n,), x.dtype)
            bias_ptr = bias.data_ptr()
            self._linear(w.handle, rows.data_ptr(), rows.stride(0), m, bias_ptr, out.data_ptr())
        return out if x.dim() == 2 else out.view(*x.shape[:-1], w.n)

    def embedding(self, w: PackedWeight, ids: Tensor) -> Tensor:
        """Rows of a packed weight [N, K]: ids [T] int64 -> [T, K]."""
        _check("embedding: ids", ids, (ids.numel(),), torch.int64)
        out = torch.empty((ids.numel(), w.k), dtype=w.dtype)
        bad = self._embedding(w.handle, ids.data_ptr(), ids.numel(), out.data_ptr())
        if bad >= 0:
            raise ValueError(f"embedding: id {int(ids[bad])} is outside [0, {w.n})")
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """[..., n] -> the same shape: x / sqrt(mean(x^2) + eps) * weight."""
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        m, n = rows.shape
        dtype = _dtype("rms_norm", x)
        _check("rms_norm: weight", weight, (n,), x.dtype)
        if rows.stride(1) != 1:
            raise ValueError(f"rms_norm: the last dimension must be contiguous: {_describe(x)}")
        out = torch.empty_like(rows)
        self._rms_norm(
            dtype, rows.data_ptr(), rows.stride(0), weight.data_ptr(), eps, m, n, out.data_ptr()
        )
        return out if x.dim() == 2 else out.view(x.shape)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """residual += x in place (rounded to its dtype); returns rms_norm(residual)."""
        n = x.shape[-1]
        dtype = _dtype("add_rms_norm", x)
        _check("add_rms_norm: x", x, x.shape, x.dtype)
        _check("add_rms_norm: residual", residual, x.shape, x.dtype)
        _check("add_rms_norm: weight", weight, (n,), x.dtype)
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
            _check("qk_norm_rope: weight", weight, (q.shape[-1],), q.dtype)
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
        num_tokens, num_heads, dim = _check_heads("rope: q", q, q.dtype)
        _, num_kv_heads, _ = _check_heads("rope: k", k, q.dtype, num_tokens, dim)
        _check("rope: cos_sin", cos_sin, (cos_sin.shape[0], dim), torch.float32)
        _check("rope: positions", positions, (num_tokens,), torch.int64)
        bad = self._rope(
            *(_dtype("rope", q), q.data_ptr(), q.stride(0), num_heads, q_norm),
            *(k.data_ptr(), k.stride(0), num_kv_heads, k_norm),
            *(eps, cos_sin.data_ptr(), cos_sin.shape[0], positions.data_ptr(), num_tokens, dim),
        )
        if bad >= 0:
            limit = cos_sin.shape[0]
            raise ValueError(f"rope: position {int(positions[bad])} is outside [0, {limit})")

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """[T, 2I] -> silu(gate) * up [T, I], where gate is the first half of a row."""
        _check("silu_mul: gate_up", gate_up, (gate_up.shape[0], gate_up.shape[-1]), gate_up.dtype)
        rows, width = gate_up.shape
        out = torch.empty(rows, width // 2, dtype=gate_up.dtype)
        dtype = _dtype("silu_mul", gate_up)
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
        self.store(k, v, CacheView(kv_cache), batch)

    def store(self, k: Tensor, v: Tensor, cache: CacheView, batch: BatchView) -> None:
        """store_kv with arguments that were checked before."""
        dtype, heads, dim = cache.torch_dtype, cache.num_heads, cache.dim
        _check_heads("store_kv: k", k, dtype, batch.num_tokens, dim, heads)
        _check_heads("store_kv: v", v, dtype, batch.num_tokens, dim, heads)
        bad = self._store_kv(
            *(ctypes.addressof(cache), ctypes.addressof(batch)),
            *(k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0)),
        )
        if bad >= 0:
            slot = ctypes.cast(batch.slots, ctypes.POINTER(ctypes.c_int64))[bad]
            limit = cache.num_blocks * cache.block_size
            raise ValueError(f"store_kv: slot {slot} is outside [0, {limit})")

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
        return self.attend(q, CacheView(kv_cache), batch, scale, window)

    def attend(
        self, q: Tensor, cache: CacheView, batch: BatchView, scale: float, window: int | None
    ) -> Tensor:
        """attention with arguments that were checked before."""
        _, num_heads, _ = _check_heads("attention: q", q, cache.torch_dtype, None, cache.dim)
        if num_heads % cache.num_heads or (window is not None and window < 1):
            raise ValueError(
                f"attention: {num_heads} query heads over {cache.num_heads} KV heads, "
                f"window {window}"
            )
        out = torch.empty_like(q)  # dense: only the distance between tokens may be wider in q
        bad = self._attention(
            *(ctypes.addressof(cache), ctypes.addressof(batch)),
            *(q.data_ptr(), q.stride(0), num_heads, scale, window or 0, out.data_ptr()),
        )
        if bad >= 0:
            raise ValueError(
                f"attention: sequence {bad} names a block outside [0, {cache.num_blocks})"
            )
        return out


def _describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype} with strides {list(tensor.stride())}"


def _dtype(where: str, tensor: Tensor) -> int:
    code = DTYPES.get(tensor.dtype)
    if code is None:
        raise ValueError(f"{where}: float32, bfloat16 or float16 is needed, got {tensor.dtype}")
    return code


def _check(what: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor.dtype is not dtype or tensor.shape != shape or not tensor.is_contiguous():
        raise ValueError(f"{what} is {_describe(tensor)}, not contiguous {list(shape)} {dtype}")


def _check_heads(
    what: str,
    tensor: Tensor,
    dtype: torch.dtype,
    num_tokens: int | None = None,
    dim: int | None = None,
    num_heads: int | None = None,
) -> tuple[int, int, int]:
    """Checks [T, heads, D] whose last two dimensions are contiguous, and returns its shape."""
    if tensor.dim() == 3 and tensor.dtype is dtype:
        t, h, d = tensor.shape
        expected = (num_tokens in (None, t), dim in (None, d), num_heads in (None, h))
        if all(expected) and tensor.stride()[1:] == (d, 1):
            return t, h, d
    raise ValueError(
        f"{what} is {_describe(tensor)}, not [{num_tokens or 'T'}, {num_heads or 'heads'}, "
        f"{dim or 'D'}] {dtype} with its last two dimensions contiguous"
    )
