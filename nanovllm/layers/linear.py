"""A matrix product with weights, behind the seam where quantized methods plug in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from nanovllm.layers.ops import Ops


class LinearMethod(Protocol):
    """How the weights of a linear layer are stored and multiplied."""

    def params(self, weight: Tensor, bias: Tensor | None) -> Any:
        """Turns the checkpoint's [N, K] weight into the stored form."""

    def apply(self, x: Tensor, params: Any) -> Tensor:
        """[T, K] -> [T, N]"""


class FullPrecision:
    """Weights in the model's dtype, in the layout that the operator set likes best."""

    def __init__(self, ops: Ops) -> None:
        self._ops = ops

    def params(self, weight: Tensor, bias: Tensor | None) -> tuple[Any, Tensor | None]:
        return self._ops.pack(weight), bias

    def apply(self, x: Tensor, params: tuple[Any, Tensor | None]) -> Tensor:
        return self._ops.linear(x, *params)


@dataclass(slots=True)
class Linear:
    """A linear layer: [T, K] -> [T, N]."""

    method: LinearMethod
    params: Any

    def __call__(self, x: Tensor) -> Tensor:
        return self.method.apply(x, self.params)
