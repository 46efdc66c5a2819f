"""Matrix products with few rows (`few.cu`): which variant a shape takes, and its launch.

Shape legend: M rows, K input features, N output features (of one of gate and up, if gated).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from nanovllm.kernels.cuda.build import SOURCE_DIR, compile_cubin
from nanovllm.kernels.cuda.launch import Kernel

MAX_ROWS = 16
MAX_GROUPS = 8  # of 8 weight rows in one unit of work: sums in registers
MAX_K_STEP = 1024
SHARED = 113 * 1024  # two blocks a multiprocessor: the next kernel's weights arrive meanwhile


@dataclass(frozen=True, slots=True)
class Tile:
    """groups of 8 weight rows in a unit, features of K in a stage, warps that share K, stages."""

    groups: int
    k_step: int
    warps: int
    stages: int
    lead: int = -1  # stages left to fetch when the next kernel may start
    padded: bool = False  # one block of each of two kernels a multiprocessor


def fits(weight: Tensor, gated: bool = False) -> bool:
    """Whether `product` takes this weight [N, K] ([2 N, K] if gated)."""
    n = len(weight) // (2 if gated else 1)
    return (
        weight.is_contiguous()
        and weight.element_size() == 2
        and n % 8 == 0
        and _split_k(weight.shape[1]) is not None
    )


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
    found = _split_k(k)
    assert found is not None, "K must be divided by 32 and by a number of warps"
    k_step, warps = found
    groups = _groups(n, gated, processors)
    units = -(-n // (8 * groups // (2 if gated else 1)))
    rounds = -(-units // processors)
    stages = (SHARED - _sums_bytes(groups, warps, MAX_ROWS)) // _stage_bytes(k_step)
    return Tile(groups, k_step, warps, max(2, min(stages, rounds * groups * (k // k_step))))


def _stage_bytes(k_step: int) -> int:
    return 8 * (k_step * 2 + 64) + 16  # and its two barriers


def _sums_bytes(groups: int, warps: int, rows: int) -> int:
    return warps * (groups * 8 + 1) * rows * 4 + 256


@cache
def _variant(
    n: int, k: int, rows: int, tile: Tile, flags: tuple[bool, bool, bool, bool],
    dtype: torch.dtype, device: torch.device, processors: int,
) -> tuple[Kernel, int, int]:  # fmt: skip
    """The kernel, its blocks, and its shared memory in bytes."""
    norm, bias, gated, residual = flags
    units = -(-n // (8 * tile.groups // (2 if gated else 1)))
    blocks = processors if tile.padded else min(units, processors)
    defines = {
        "BLOCKS": blocks, "N": n, "K": k, "K_STEP": tile.k_step, "GROUPS": tile.groups, "WARPS": tile.warps,
        "STAGES": tile.stages, "ROWS": rows, "NORM": int(norm), "BIAS": int(bias),
        "GATED": int(gated), "RESIDUAL": int(residual), "LEAD": tile.lead,
        "HALF": int(dtype == torch.float16),
    }  # fmt: skip
    shared = tile.stages * _stage_bytes(tile.k_step)
    shared += _sums_bytes(tile.groups, tile.warps, rows)
    if tile.padded:
        shared = max(shared, SHARED)
    cubin = compile_cubin((SOURCE_DIR / "few.cu").read_text(), "few.cu", defines=defines)
    return Kernel(cubin, "few", "ppppppif", device, shared=shared), blocks, shared


@cache
def _processors(device: torch.device) -> int:
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
    """x [M, K], M <= MAX_ROWS -> out [M, N], which may be `residual` itself; all contiguous.

    weight is [N, K], or if gated [2 N, K]: rows of the gate, then of up. norm [K] is the weight
    of an RMSNorm of x. bias [N] is not for gated products.
    """
    m, k = x.shape
    n = len(weight) // 2 if gated else len(weight)
    assert all(t.is_contiguous() for t in (x, weight, out)), "rows must follow one another"
    processors = _processors(x.device)
    tile = tile or best_tile(n, k, gated, processors)
    flags = norm is not None, bias is not None, gated, residual is not None
    kernel, blocks, shared = _variant(
        n, k, 8 if m <= 8 else 16, tile, flags, x.dtype, x.device, processors
    )
    kernel.launch(
        (blocks, 1, 1),
        (tile.warps + 1) * 32,
        [
            x.data_ptr(), weight.data_ptr(), _pointer(norm), _pointer(bias), _pointer(residual),
            out.data_ptr(), m, eps,
        ],
        stream=torch.cuda.current_stream(x.device).cuda_stream,
        shared=shared,
        pdl=pdl,
    )  # fmt: skip
    return out


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
