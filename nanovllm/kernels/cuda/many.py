"""Matrix products with up to some hundreds of rows (`many.cu`): variants, tensor maps, launch.

Shape legend: M rows, K input features, N output features (of one of gate and up, if gated).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, lru_cache

import torch
from torch import Tensor

from nanovllm.kernels.cuda.build import SOURCE_DIR, compile_cubin
from nanovllm.kernels.cuda.launch import Kernel, tensor_map

MAX_ROWS = 256
K_STEP = 64
SHARED_LIMIT = 227 * 1024
HALF_SHARED = 113 * 1024  # two blocks a multiprocessor


@dataclass(frozen=True, slots=True)
class Tile:
    """warpgroups of 64 weight rows each, blocks that share K, stages of the ring."""

    warpgroups: int
    split: int
    stages: int
    batch_groups: int = 1  # as many times more warpgroups: they share the rows of x
    lead: int = -1  # stages left to fetch when the next kernel may start
    padded: bool = False  # one block of each of two kernels a multiprocessor


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a residual [M, K] ready for a product with the norm in between.

    scaled: residual * norm weight [M, K]. squares: sums of squares of parts of each row
    [parts, M], float32; the product divides row m by the root of their mean over K.
    """

    scaled: Tensor
    squares: Tensor


def new_rows(m: int, size: int, like: Tensor, warpgroups: int) -> Rows:
    """Room for what a product with `after` writes."""
    parts = -(-size // (64 * warpgroups))
    return Rows(like.new_empty((m, size)), like.new_empty((parts, m), dtype=torch.float32))


def batch_of(m: int) -> int:
    """Rows of x that the instruction takes: few variants, little waste."""
    step = 16 if m <= 64 else 32 if m <= 128 else 64
    return -(-m // step) * step


def best_tile(m: int, n: int, k: int, gated: bool, processors: int) -> Tile:
    """As measured best on an H200: about as many blocks as multiprocessors."""
    rows = n * (2 if gated else 1)
    tiles = -(-rows // 64)
    if tiles >= 2 * processors:
        tile = Tile(2, 1, 0)
    else:
        split, most = 1, 8 if m <= 32 else 4
        while split < most and tiles * split * 2 <= processors and k >= split * 4 * K_STEP:
            split *= 2
        tile = Tile(1, split, 0, 2 if m > 64 else 1)
    return replace(tile, stages=stages_of(batch_of(m), tile))


def stages_of(batch: int, tile: Tile) -> int:
    stage = (64 * tile.warpgroups + batch) * K_STEP * 2
    sums = batch * (64 * tile.warpgroups + 4) * 4
    room = HALF_SHARED if max(sums, 3 * stage) + 3072 <= HALF_SHARED else SHARED_LIMIT
    return max(2, min(10, (room - 3072) // stage))


@cache
def _variant(
    batch: int, tile: Tile, flags: tuple[bool, bool, bool, bool], dtype: torch.dtype,
    device: torch.device,
) -> tuple[Kernel, int]:  # fmt: skip
    scale, bias, gated, residual = flags
    defines = {
        "WARPGROUPS": tile.warpgroups, "BATCH": batch, "BATCH_GROUPS": tile.batch_groups, "SPLIT": tile.split,
        "STAGES": tile.stages, "SCALE": int(scale), "BIAS": int(bias), "GATED": int(gated),
        "RESIDUAL": int(residual), "LEAD": tile.lead, "HALF": int(dtype == torch.float16),
    }  # fmt: skip
    ring = tile.stages * (64 * tile.warpgroups + batch) * K_STEP * 2
    sums = batch * (64 * tile.warpgroups + 4) * 4
    shared = -(-max(ring, sums) // 1024) * 1024 + batch * 4 + 16 * tile.stages
    shared = -(-shared // 1024) * 1024
    if tile.padded:
        shared = max(shared, HALF_SHARED)
    source = (
        (SOURCE_DIR / "many.cu")
        .read_text()
        .replace("\nWGMMA\n", "\n" + _multiply(batch // tile.batch_groups, dtype) + "\n")
    )
    cubin = compile_cubin(source, "many.cu", defines=defines)
    return Kernel(cubin, "many", "ttiiipiffppppp", device, shared=shared), shared


def _multiply(batch: int, dtype: torch.dtype) -> str:
    """The wgmma instruction for `batch` rows: its text has a name for every register."""
    count, kind = batch // 2, "f16" if dtype == torch.float16 else "bf16"
    registers = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+f"(sum[{i}])' for i in range(count))
    return (
        f"__device__ __forceinline__ void multiply(float (&sum)[{count}], u64 a, u64 b, int add)"
        " {\n"
        f'  asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{count + 2}, 0;\\n"\n'
        f'      "wgmma.mma_async.sync.aligned.m64n{batch}k16.f32.{kind}.{kind}"\n'
        f'      " {{{registers}}}, %{count}, %{count + 1}, p, 1, 1, 0, 0;\\n}}"\n'
        f'      : {outputs} : "l"(a), "l"(b), "r"(add) : "memory");\n}}'
    )


@cache
def _weight_map(pointer: int, n: int, k: int, warpgroups: int, gated: bool, dtype: torch.dtype):
    row = k * 2
    if not gated:
        return tensor_map(pointer, (k, n), (row,), (K_STEP, 64 * warpgroups), dtype)
    # Eight rows of the gate, then the same eight of up: dims K, row of eight, gate or up, eight.
    dims, strides = (k, 8, 2, n // 8), (row, n * row, 8 * row)
    return tensor_map(pointer, dims, strides, (K_STEP, 8, 2, 4 * warpgroups), dtype)


@lru_cache(maxsize=4096)
def _x_map(pointer: int, m: int, k: int, batch: int, dtype: torch.dtype):
    return tensor_map(pointer, (k, m), (k * 2,), (K_STEP, batch), dtype)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


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
    pdl: bool = True,
    tile: Tile | None = None,
) -> Tensor:
    """x [M, K], M <= MAX_ROWS -> out [M, N]; all contiguous.

    With `Rows` the product is that of their RMSNorm. weight is [N, K], or if gated [2 N, K]:
    SiLU(gate) * up. With `after`, the product is added to out, and out * norm [N] and its squares
    are written to `after`, for the norm that follows.
    """
    rows = x if isinstance(x, Rows) else None
    source = x.scaled if isinstance(x, Rows) else x
    m, k = source.shape
    n = len(weight) // 2 if gated else len(weight)
    assert all(t.is_contiguous() for t in (source, weight, out)), "rows must follow one another"
    tile = tile or best_tile(m, n, k, gated, _processors(out.device))
    batch = batch_of(m)
    flags = rows is not None, bias is not None, gated, after is not None
    kernel, shared = _variant(batch, tile, flags, out.dtype, out.device)
    features = 64 * tile.warpgroups // (2 if gated else 1)
    squares = rows.squares if rows else None
    blocks = -(-n // features)
    if tile.padded:
        blocks = max(blocks, -(-_processors(out.device) // tile.split))
    kernel.launch(
        (tile.split, blocks, 1),
        128 * tile.warpgroups * tile.batch_groups + 64,
        [
            _weight_map(weight.data_ptr(), n, k, tile.warpgroups, gated, out.dtype),
            _x_map(source.data_ptr(), m, k, batch, out.dtype),
            m, n, k // K_STEP, _pointer(squares), len(squares) if squares is not None else 0,
            1 / k, eps, out.data_ptr(), _pointer(bias), _pointer(norm),
            _pointer(after.scaled if after else None), _pointer(after.squares if after else None),
        ],
        stream=torch.cuda.current_stream(out.device).cuda_stream,
        shared=shared,
        cluster=(tile.split, 1, 1),
        pdl=pdl,
    )  # fmt: skip
    return out


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
