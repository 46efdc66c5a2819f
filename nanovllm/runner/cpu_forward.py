"""A decoder's forward pass on a CPU in one call of the C++ library.

The same operators in the same order as `Decoder.forward`, which is its specification: the same
bits. What it saves is Python between the operators and the quarrel over Python's lock.

Shape legend: T tokens, H query heads, G KV heads, D head dim.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from nanovllm.attention.base import AttentionBatch
from nanovllm.attention.cpu import CpuAttention
from nanovllm.kernels.cpu.library import FLOAT, LONG, POINTER
from nanovllm.kernels.cpu.views import DTYPES, CacheView
from nanovllm.kernels.cpu_ops import CpuOps
from nanovllm.layers.linear import FullPrecision, Linear
from nanovllm.models.decoder import Block, Decoder

# By the codes of kernels/cpu/forward.cpp.
WRONG = {
    1: "a token id outside the vocabulary",
    2: "a position outside the context",
    3: "a new token's slot outside the KV cache",
    4: "a block outside the KV cache",
}
NO_MEMORY = 5


class _Linear(ctypes.Structure):
    _fields_ = (("weight", POINTER), ("bias", POINTER))

    def __init__(self, linear: Linear) -> None:
        weight, bias = linear.params
        super().__init__(weight.handle, _address(bias))


class _Layer(ctypes.Structure):
    _fields_ = (
        ("input_norm", POINTER),
        ("qkv", _Linear),
        ("q_norm", POINTER),
        ("k_norm", POINTER),
        ("o", _Linear),
        ("post_norm", POINTER),
        ("gate_up", _Linear),
        ("down", _Linear),
        ("cache", CacheView),
        ("window", LONG),
    )

    def __init__(self, block: Block, cache: CacheView, window: int | None) -> None:
        normed = block.q_norm is not None and block.k_norm is not None
        super().__init__(
            *(_address(block.input_norm), _Linear(block.qkv)),
            *((_address(block.q_norm), _address(block.k_norm)) if normed else (None, None)),
            *(_Linear(block.o), _address(block.post_norm)),
            *(_Linear(block.gate_up), _Linear(block.down), cache, window or 0),
        )


class _Model(ctypes.Structure):
    _fields_ = (
        ("embed", POINTER),
        ("layers", POINTER),
        ("final_norm", POINTER),
        ("cos_sin", POINTER),
        ("num_layers", LONG),
        ("dtype", LONG),
        ("hidden", LONG),
        ("num_heads", LONG),
        ("num_kv_heads", LONG),
        ("head_dim", LONG),
        ("intermediate", LONG),
        ("max_positions", LONG),
        ("eps", FLOAT),
        ("scale", FLOAT),
    )


class CpuForward:
    """One loaded decoder with its KV cache [layers, blocks, 2, G, slots, D].

    Keeps addresses: the model and the cache must live as long, and stay where they are.
    """

    @staticmethod
    def fits(model: Decoder) -> bool:
        """Whether a loaded model is made of what the library knows."""
        return (
            isinstance(model.ops, CpuOps)
            and isinstance(model.attention, CpuAttention)
            and isinstance(model.linear, FullPrecision)
        )

    def __init__(self, model: Decoder, kv_cache: Tensor) -> None:
        assert isinstance(model.ops, CpuOps)
        assert isinstance(model.attention, CpuAttention)
        c = model.config
        self._call = model.ops.forward
        self._attention = model.attention
        self._hidden, self._dtype = c.hidden_size, kv_cache.dtype
        self._kept = model, kv_cache
        views = [model.attention.view(kv_cache[index]) for index in range(c.num_layers)]
        self._layers = (_Layer * c.num_layers)(*map(_Layer, model.blocks, views, c.sliding_windows))
        self._model = _Model(
            *(model.embed.handle, ctypes.addressof(self._layers)),
            *(_address(model.final_norm), _address(model.cos_sin)),
            *(c.num_layers, DTYPES[kv_cache.dtype], c.hidden_size, c.num_heads, c.num_kv_heads),
            *(c.head_dim, c.intermediate_size, model.cos_sin.shape[0]),
            *(c.rms_norm_eps, c.head_dim**-0.5),
        )

    def __call__(self, token_ids: Tensor, batch: AttentionBatch) -> Tensor:
        """[T] token ids -> [T, hidden] after the final norm; the KV cache is read and written."""
        self._attention.plan(batch)
        out = torch.empty(len(token_ids), self._hidden, dtype=self._dtype)
        wrong = self._call(
            *(ctypes.addressof(self._model), ctypes.addressof(batch.plan)),
            *(token_ids.data_ptr(), batch.positions.data_ptr(), out.data_ptr()),
        )
        if wrong == NO_MEMORY:
            raise MemoryError(f"no memory for a step of {len(token_ids)} tokens")
        if wrong:
            raise ValueError(f"a step of {len(token_ids)} tokens names {WRONG[wrong]}")
        return out


def _address(tensor: Tensor | None) -> int | None:
    if tensor is None:
        return None
    assert tensor.is_contiguous(), f"a parameter {list(tensor.shape)} is not contiguous"
    return tensor.data_ptr()
