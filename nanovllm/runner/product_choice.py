"""Which kernels multiply how many rows with a model's weights, as measured on an H200."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nanovllm.kernels.cuda import few, many
from nanovllm.kernels.cuda.few import Shape
from nanovllm.kernels.cuda.launch import available
from nanovllm.kernels.gpu import linear
from nanovllm.models.config import DecoderConfig

SMALL = 2048  # hidden size up to which `few` is the fastest


def products_of(c: DecoderConfig) -> list[Shape]:
    """The products of a block, in their order, and that of the LM head."""
    heads = c.num_heads * c.head_dim
    return [
        Shape(heads + 2 * c.num_kv_heads * c.head_dim, c.hidden_size, norm=True, bias=c.qkv_bias),
        Shape(c.hidden_size, heads, bias=c.o_bias, residual=True),
        Shape(c.intermediate_size, c.hidden_size, norm=True, gated=True),
        Shape(c.hidden_size, c.intermediate_size, bias=c.mlp_bias, residual=True),
        Shape(c.vocab_size, c.hidden_size, norm=True),
    ]


@dataclass(frozen=True, slots=True)
class ProductChoice:
    """The most rows of each way; beyond all of them cuBLAS is the fastest."""

    max_triton: int = 0  # kernels.gpu.linear, with rows in registers
    max_few: int = 0  # kernels.cuda.few, rows on the tensor cores
    max_some: int = 0  # kernels.cuda.many

    @classmethod
    def of(cls, config: DecoderConfig, dtype: torch.dtype, device: torch.device) -> ProductChoice:
        """Fewer ways where CUDA C++ cannot run, or a bias stands before an activation.

        CUDA C++ is for bfloat16: norm weights times activations may be too large for float16.
        """
        hidden, shapes = config.hidden_size, products_of(config)
        if config.mlp_bias:
            return cls()
        cuda = dtype == torch.bfloat16 and available(device) is None
        small = cuda and hidden <= SMALL and all(few.suits(s.n, s.k) for s in shapes)
        fits = cuda and all(many.fits(s.n, s.k) for s in shapes)
        if not (small or fits):
            return cls(linear.max_rows(hidden))
        return cls(
            max_triton=0 if small else 1,
            max_few=few.MAX_ROWS if small else 0,
            max_some=many.max_rows(hidden) if fits else 0,
        )

    def few(self, rows: int) -> Callable[..., Tensor] | None:
        """The product of few rows, with norm, residual and activation; None if there is none."""
        if rows <= self.max_triton:
            return linear.linear
        return few.product if rows <= self.max_few else None

    def some(self, rows: int) -> bool:
        """Whether kernels.cuda.many takes that many."""
        return max(self.max_triton, self.max_few) < rows <= self.max_some
