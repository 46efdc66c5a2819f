"""Matrix products with tens of rows (`many.cu`): variants, tensor maps, launch.

Shape legend: M rows, K input features, N output features (of one of gate and up, if gated).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache, partial

import torch
from torch import Tensor

from nanovllm.kernels.cuda.build import compile_cubin, read_source
from nanovllm.kernels.cuda.few import HALF_SHARED, Shape, check, pointer, processors_of
from nanovllm.kernels.cuda.launch import Kernel, tensor_map

MAX_ROWS = 256
MAX_HEAD_ROWS = 64  # beyond, cuBLAS is faster for weights of a vocabulary's length
TILE = 64  # weight rows of a block
K_STEP = 64
SHARED_LIMIT = 227 * 1024
PARAMETERS = "ttiiipiffppppp"  # of the kernel, as `Kernel` names them
AT_ONCE = 1 << 20  # a lead: the next kernel may start at once


@dataclass(frozen=True, slots=True)
class Tile:
    """split: blocks that share K. groups: warpgroups that share the rows of x.

    lead: stages left to fetch when the next kernel may start; -1: when the one before has ended.
    """

    split: int
    groups: int = 1
    lead: int = AT_ONCE
    stages: int = 0  # of the ring; 0: as many as fit


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a residual [M, K] ready for a product with the norm in between.

    scaled: residual * norm weight [M, K]. squares: sums of squares of parts of each row
    [parts, M], float32; the product divides row m by the root of their mean over K.
    """

    scaled: Tensor
    squares: Tensor


def fits(n: int, k: int) -> bool:
    """Whether `product` takes a weight [N, K]."""
    return n % 8 == 0 and k % 8 == 0


def max_rows(hidden_size: int) -> int:
    """Rows up to which this beats cuBLAS, as measured on an H200 at four hidden sizes.

    From 129 rows on measured in whole workloads alone, not in the chain of a layer.
    """
    return 160 if hidden_size <= 1024 else 96 if hidden_size <= 2048 else 32


def batch_of(m: int) -> int:
    """Rows of x that the instruction takes: few variants, little waste."""
    step = 16 if m <= 64 else 32
    return -(-m // step) * step


def best_tile(m: int, n: int, k: int, gated: bool, processors: int) -> Tile:
    """As measured best on an H200, in the chain of a layer.

    Up to 32 rows as many blocks as multiprocessors. With more rows fewer parts of K, for their sums
    have to meet; beyond 64 rows one block has a multiprocessor to itself, with a ring that keeps
    more of x on its way.
    """
    tiles, split = -(-n * (2 if gated else 1) // TILE), 1
    while split < 8 and tiles * split * 2 <= processors:
        parts = split * 2
        if k < parts * 128 or (m > 32 and tiles * parts > 64 and k < parts * 1024):
            break
        split = parts
    if m <= 32:
        return Tile(split)
    groups = 2 if gated or m <= 64 else 1
    stages = min(16, SHARED_LIMIT // _stage(batch_of(m)) - 1) if m > 64 else 0
    return Tile(split, groups, 0, stages)


def _stage(batch: int) -> int:
    """Bytes of one step of K of both operands."""
    return (TILE + batch) * K_STEP * 2


def _stages(batch: int, tile: Tile) -> int:
    if tile.stages:
        return tile.stages
    pair = max(_sums(batch), 3 * _stage(batch)) + 3072 <= HALF_SHARED
    return max(2, min(10, ((HALF_SHARED if pair else SHARED_LIMIT) - 3072) // _stage(batch)))


def _sums(batch: int) -> int:
    """Bytes of the sums, which take the ring's place."""
    return batch * (TILE + 4) * 4


@cache
def _variant(
    batch: int, tile: Tile, flags: tuple[bool, bool, bool, bool], device: torch.device
) -> tuple[Kernel, int]:  # fmt: skip
    """The kernel, and its shared memory in bytes."""
    stages = _stages(batch, tile)
    ring = max(stages * _stage(batch), _sums(batch))
    shared = -(-(ring + batch * 4 + 16 * stages) // 1024) * 1024
    return Kernel(_compile(batch, tile, flags), "many", PARAMETERS, device, shared=shared), shared


def _compile(batch: int, tile: Tile, flags: tuple[bool, bool, bool, bool]) -> bytes:
    scale, bias, gated, residual = flags
    defines = {
        "BATCH": batch, "BATCH_GROUPS": tile.groups, "SPLIT": tile.split,
        "STAGES": _stages(batch, tile), "LEAD": tile.lead, "SCALE": int(scale),
        "BIAS": int(bias), "GATED": int(gated), "RESIDUAL": int(residual),
    }  # fmt: skip
    multiply = _multiply(batch // tile.groups)
    source = read_source("many.cu").replace("\nWGMMA\n", f"\n{multiply}\n")
    return compile_cubin(source, "many.cu", defines=defines)


def compile_for(
    shape: Shape, most_rows: int, device: torch.device
) -> Iterator[Callable[[], object]]:
    """What compiles the variants for up to so many rows, the fewest rows first."""
    flags = shape.norm, shape.bias, shape.gated, shape.residual
    for batch in sorted({batch_of(m) for m in range(1, most_rows + 1)}):
        tile = best_tile(batch, shape.n, shape.k, shape.gated, processors_of(device))
        yield partial(_compile, batch, tile, flags)


def _multiply(columns: int) -> str:
    """The wgmma instruction for so many rows of x: its text has a name for every register."""
    count = columns // 2
    registers = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+f"(sum[{i}])' for i in range(count))
    return (
        f"__device__ __forceinline__ void multiply(float (&sum)[{count}], u64 a, u64 b, int add)"
        " {\n"
        f'  asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{count + 2}, 0;\\n"\n'
        f'      "wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.bf16.bf16"\n'
        f'      " {{{registers}}}, %{count}, %{count + 1}, p, 1, 1, 0, 0;\\n}}"\n'
        f'      : {outputs} : "l"(a), "l"(b), "r"(add) : "memory");\n}}'
    )


@cache
def _weight_map(pointer: int, n: int, k: int, gated: bool) -> bytes:
    row = k * 2
    if not gated:
        return tensor_map(pointer, (k, n), (row,), (K_STEP, TILE), torch.bfloat16)
    # Eight rows of the gate, then the same eight of up: dims K, row of eight, gate or up, eight.
    dims, strides = (k, 8, 2, n // 8), (row, n * row, 8 * row)
    return tensor_map(pointer, dims, strides, (K_STEP, 8, 2, TILE // 16), torch.bfloat16)


@lru_cache(maxsize=4096)
def _x_map(pointer: int, m: int, k: int, batch: int) -> bytes:
    return tensor_map(pointer, (k, m), (k * 2,), (K_STEP, batch), torch.bfloat16)


def product(
    x: Tensor | Rows,
    weight: Tensor,
    out: Tensor,
    *,
    eps: float = 0.0,
    bias: Tensor | None = None,
    gated: bool = False,
    norm: Tensor | None = None,
    after: Rows | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """x [M, K], M <= MAX_ROWS -> out [M, N]; all bfloat16, contiguous, 16-byte aligned.

    With `Rows` the product is that of their RMSNorm. weight is [N, K], or if gated [2 N, K]:
    SiLU(gate) * up. With `after`, the product is added to out, and out * norm [N] and its squares
    are written to `after`, for the norm that follows. Launched as a programmatic dependent.
    """
    rows = x if isinstance(x, Rows) else None
    source = x.scaled if isinstance(x, Rows) else x
    m, k = source.shape
    n = len(weight) // 2 if gated else len(weight)
    assert m <= MAX_ROWS, "too many rows"
    assert fits(n, k), "features must be divisible by 8"
    assert weight.shape[1] == k, "features of x and weight differ"
    assert out.shape == (m, n), "out has another shape"
    check(source, weight, out, bias, norm, after.scaled if after else None)
    tile = tile or best_tile(m, n, k, gated, processors_of(out.device))
    batch = batch_of(m)
    flags = rows is not None, bias is not None, gated, after is not None
    kernel, shared = _variant(batch, tile, flags, out.device)
    squares = rows.squares if rows else None
    kernel.launch(
        (tile.split, -(-n * (2 if gated else 1) // TILE), 1),
        128 * tile.groups + 64,
        [
            _weight_map(weight.data_ptr(), n, k, gated),
            _x_map(source.data_ptr(), m, k, batch),
            m, n, -(-k // K_STEP), pointer(squares), 0 if squares is None else len(squares),
            1 / k, eps, out.data_ptr(), pointer(bias), pointer(norm),
            pointer(after.scaled if after else None), pointer(after.squares if after else None),
        ],
        stream=torch.cuda.current_stream(out.device).cuda_stream,
        shared=shared,
        cluster=(tile.split, 1, 1),
        pdl=True,
    )  # fmt: skip
    return out


def add(
    residual: Tensor,
    x: Tensor,
    weight: Tensor,
    norm: Tensor,
    *,
    bias: Tensor | None = None,
    tile: Tile | None = None,
) -> Rows:
    """residual [M, N] += x [M, K] @ weight.T (+ bias); what a product with the norm [N] wants."""
    m, size = residual.shape
    parts = residual.new_empty((-(-size // TILE), m), dtype=torch.float32)
    after = Rows(torch.empty_like(residual), parts)
    product(x, weight, residual, bias=bias, norm=norm, after=after, tile=tile)
    return after
