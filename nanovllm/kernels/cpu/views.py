"""Tensors as the C++ side sees them: checked once, then numbers and addresses.

Shape legend: T tokens, N outputs, K inputs, S sequences, G KV heads, D head dim, B blocks,
P slots a block.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from nanovllm.kernels.cpu.library import LONG, POINTER

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MAX_DIM = 256  # of a head, and of the slots of a block


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
        ("data", POINTER),
        ("dtype", LONG),
        ("num_blocks", LONG),
        ("block_row", LONG),
        ("num_heads", LONG),
        ("block_size", LONG),
        ("dim", LONG),
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
            raise ValueError(f"a KV block must be contiguous: {describe(kv_cache)}")
        dtype = dtype_code("KV cache", kv_cache)
        row = kv_cache.stride(0)
        super().__init__(kv_cache.data_ptr(), dtype, num_blocks, row, num_heads, block_size, dim)
        self.torch_dtype = kv_cache.dtype
        self.num_bytes = row * num_blocks * kv_cache.itemsize

    def describe_slot(self, slot: int) -> str:
        return f"slot {slot} is outside [0, {self.num_blocks * self.block_size})"


class BatchView(ctypes.Structure):
    """What the kernels know of a step's batch; valid while its tensors live unmoved."""

    _fields_ = (
        ("cu_q_lens", POINTER),
        ("context_lens", POINTER),
        ("block_tables", POINTER),
        ("table_row", LONG),
        ("num_seqs", LONG),
        ("slots", POINTER),
        ("num_tokens", LONG),
    )

    def __init__(
        self,
        cu_q_lens: Tensor,
        context_lens: Tensor,
        block_tables: Tensor,
        slot_mapping: Tensor | None = None,
    ) -> None:
        num_seqs = context_lens.shape[0]
        check("context_lens", context_lens, (num_seqs,), torch.int32)
        check("cu_q_lens", cu_q_lens, (num_seqs + 1,), torch.int32)
        if block_tables.dtype is not torch.int32 or block_tables.stride(-1) != 1:
            raise ValueError(f"block_tables is {describe(block_tables)}, not rows of int32")
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
        check("slot_mapping", slot_mapping, (slot_mapping.shape[0],), torch.int64)
        self.slots, self.num_tokens = slot_mapping.data_ptr(), slot_mapping.shape[0]

    def slot(self, index: int) -> int:
        return ctypes.cast(self.slots, ctypes.POINTER(ctypes.c_int64))[index]


def describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype} with strides {list(tensor.stride())}"


def dtype_code(where: str, tensor: Tensor) -> int:
    code = DTYPES.get(tensor.dtype)
    if code is None:
        raise ValueError(f"{where}: float32, bfloat16 or float16 is needed, got {tensor.dtype}")
    return code


def check(what: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor.dtype is not dtype or tensor.shape != shape or not tensor.is_contiguous():
        raise ValueError(f"{what} is {describe(tensor)}, not contiguous {list(shape)} {dtype}")


def check_heads(
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
        f"{what} is {describe(tensor)}, not [{num_tokens or 'T'}, {num_heads or 'heads'}, "
        f"{dim or 'D'}] {dtype} with its last two dimensions contiguous"
    )
