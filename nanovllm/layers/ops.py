"""The operators that a decoder is made of, and their plain torch implementation.

An operator set belongs to one device. `TorchOps` runs anywhere and is the executable
specification of every other set (C++ on CPU, Triton on a GPU): same arguments, same result up to
rounding. Reductions are in float32 whatever the dtype.

Shape legend: T tokens, K input features, N output features, H heads, D head dim.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Ops(Protocol):
    """Weights of `linear` and `embedding` are in the form that `pack` returned."""

    def pack(self, weight: Tensor) -> Any:
        """[N, K] into the form that `linear` and `embedding` read; may keep no reference."""

    def linear(self, x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
        """[T, K] -> [T, N]"""

    def embedding(self, weight: Any, ids: Tensor) -> Tensor:
        """Rows of the weight: [T] -> [T, K]"""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Root mean square norm over the last dimension (Zhang and Sennrich 2019)."""

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """residual += x in place, then the norm of residual."""

    def rope(self, q: Tensor, k: Tensor, cos_sin: Tensor, positions: Tensor) -> None:
        """Rotates q and k [T, H, D] in place; cos_sin [max_pos, D] float32 holds cos | sin."""

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
        """`rms_norm` of every head with weights [D], then `rope`, in place."""

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up: [T, 2 N] -> [T, N]"""


class TorchOps:
    """Any device, any dtype."""

    def pack(self, weight: Tensor) -> Tensor:
        return weight.contiguous()

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, weight, bias)

    def embedding(self, weight: Tensor, ids: Tensor) -> Tensor:
        return F.embedding(ids, weight)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return weight * (wide * scale).to(x.dtype)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        residual += x
        return self.rms_norm(residual, weight, eps)

    def rope(self, q: Tensor, k: Tensor, cos_sin: Tensor, positions: Tensor) -> None:
        cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)  # [T, 1, D/2]
        for x in (q, k):
            first, second = x.float().chunk(2, dim=-1)
            x.copy_(torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1))

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
        q.copy_(self.rms_norm(q, q_weight, eps))
        k.copy_(self.rms_norm(k, k_weight, eps))
        self.rope(q, k, cos_sin, positions)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up
