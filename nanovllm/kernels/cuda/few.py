"""Matrix products with few rows (`few.cu`): which variant a shape takes, and its launch.

Shape legend: M rows, K input features, N output features (of one of gate and up, if gated).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from nanovllm.kernels.cuda.build import compile_cubin, read_source
from nanovllm.kernels.cuda.launch import Kernel

MAX_ROWS = 8
MAX_GROUPS = 8  # of 8 weight rows in one unit of work: sums in registers
LEAST_K_STEP = 896  # shorter copies do not keep up with the memory
MAX_K_STEP = 1024
HALF_SHARED = 113 * 1024  # two blocks a multiprocessor: the next kernel's weights arrive meanwhile


@dataclass(frozen=True, slots=True)
class Tile:
    """groups of 8 weight rows in a unit, features of K in a stage, warps that share K, stages."""

    groups: int
    k_step: int
    warps: int
    stages: int
    lead: int  # stages left to fetch when the next kernel may start


def suits(n: int, k: int) -> bool:
    """Whether this multiplies 2 to 8 rows with a weight [N, K] faster than all else."""
    found = _split_k(k)
    return n % 8 == 0 and found is not None and found[0] >= LEAST_K_STEP


def _split_k(k: int) -> tuple[int, int] | None:
    """(features of a stage, warps), the most of both that divide K."""
    for warps in (8, 7, 6, 5, 4, 3, 2):
        for k_step in range(MAX_K_STEP // (32 * warps) * 32 * warps, 0, -32 * warps):
            if k % k_step == 0 and k_step >= 256:
                return k_step, warps
    return None


def _groups(n: int, gated: bool, processors: int) -> int:
    """The unit that keeps all multiprocessors busy to the end, the largest of equals."""
    ways = 2 if gated else 1

    def idle(groups: int) -> float:
        units = -(-n // (8 * groups // ways))
        return -(-units // processors) * processors / units

    return min(range(ways, MAX_GROUPS + 1, ways), key=lambda g: (round(idle(g), 1), -g))


def best_tile(n: int, k: int, gated: bool, processors: int) -> Tile:
    """As measured best on an H200; for any K that `_split_k` can split."""
    found = _split_k(k)
    assert found is not None, "K must be divided by 32 and by a number of warps"
    k_step, warps = found
    groups = _groups(n, gated, processors)
    units = -(-n // (8 * groups // (2 if gated else 1)))
    rounds = -(-units // processors)
    stages = (HALF_SHARED - _sums_bytes(groups, warps)) // _stage_bytes(k_step)
    most = rounds * groups * (k // k_step)
    lead = 3 if most <= 2 * stages else most  # a long kernel lets the next one start at once
    return Tile(groups, k_step, warps, max(2, min(stages, most)), lead)


def _stage_bytes(k_step: int) -> int:
    return 8 * (k_step * 2 + 64) + 16  # and its two barriers


def _sums_bytes(groups: int, warps: int) -> int:
    return warps * (groups * 8 + 1) * MAX_ROWS * 4 + 256


@cache
def _variant(
    n: int, k: int, tile: Tile, flags: tuple[bool, bool, bool, bool], device: torch.device,
    processors: int,
) -> tuple[Kernel, int]:  # fmt: skip
    """The kernel, and its shared memory in bytes."""
    norm, bias, gated, residual = flags
    defines = {
        "BLOCKS": processors, "N": n, "K": k, "K_STEP": tile.k_step, "GROUPS": tile.groups,
        "WARPS": tile.warps, "STAGES": tile.stages, "LEAD": tile.lead,
        "NORM": int(norm), "BIAS": int(bias), "GATED": int(gated), "RESIDUAL": int(residual),
    }  # fmt: skip
    # More than is needed, so that a multiprocessor holds one block of two kernels each, not two
    # of the same.
    shared = tile.stages * _stage_bytes(tile.k_step) + _sums_bytes(tile.groups, tile.warps)
    shared = max(shared, HALF_SHARED)
    cubin = compile_cubin(read_source("few.cu"), "few.cu", defines=defines)
    return Kernel(cubin, "few", "ppppppif", device, shared=shared), shared


@dataclass(frozen=True, slots=True)
class Shape:
    """A product to be met: features out and in, and what surrounds it."""

    n: int
    k: int
    norm: bool = False
    bias: bool = False
    gated: bool = False
    residual: bool = False


def prepare(shape: Shape, device: torch.device) -> None:
    """Compiles and loads what `product` will use."""
    processors = processors_of(device)
    flags = shape.norm, shape.bias, shape.gated, shape.residual
    tile = best_tile(shape.n, shape.k, shape.gated, processors)
    _variant(shape.n, shape.k, tile, flags, device, processors)


@cache
def processors_of(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def product(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    bias: Tensor | None = None,
    gated: bool = False,
    residual: Tensor | None = None,
    pdl: bool = True,
    tile: Tile | None = None,
) -> Tensor:
    """x [M, K], M <= MAX_ROWS -> out [M, N], which may be `residual` itself.

    bfloat16, contiguous and 16-byte aligned.
    weight is [N, K], or if gated [2 N, K]: rows of the gate, then of up. norm [K] is the weight
    of an RMSNorm of x. bias [N] is not for gated products.
    """
    m, k = x.shape
    n = len(weight) // 2 if gated else len(weight)
    assert m <= MAX_ROWS, "too many rows"
    assert weight.shape[1] == k, "features of x and weight differ"
    assert out.shape == (m, n), "out has another shape"
    check(x, weight, out, norm, bias, residual)
    processors = processors_of(x.device)
    tile = tile or best_tile(n, k, gated, processors)
    flags = norm is not None, bias is not None, gated, residual is not None
    kernel, shared = _variant(n, k, tile, flags, x.device, processors)
    kernel.launch(
        (processors, 1, 1),
        (tile.warps + 1) * 32,
        [
            x.data_ptr(), weight.data_ptr(), pointer(norm), pointer(bias), pointer(residual),
            out.data_ptr(), m, eps,
        ],
        stream=torch.cuda.current_stream(x.device).cuda_stream,
        shared=shared,
        pdl=pdl,
    )  # fmt: skip
    return out


def check(*tensors: Tensor | None) -> None:
    """That the kernels here can read and write them."""
    for tensor in tensors:
        if tensor is not None:
            assert tensor.dtype == torch.bfloat16, "these kernels multiply bfloat16"
            assert tensor.is_contiguous(), "rows must follow one another"
            assert tensor.data_ptr() % 16 == 0, "rows must be aligned to 16 bytes"


def pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
