"""Loads compiled CUDA kernels and launches them. (Interface; the bodies follow.)"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def available(device: torch.device) -> str | None:
    """Why CUDA C++ kernels cannot run on the device, in words; None if they can."""
    raise NotImplementedError


def tensor_map(
    pointer: int,
    dims: tuple[int, ...],
    strides_bytes: tuple[int, ...],
    box: tuple[int, ...],
    dtype: torch.dtype,
) -> bytes:
    """The 128 bytes of a CUtensorMap: tiles of a bf16 or fp16 tensor of 2 to 4 dimensions.

    All innermost dimension first, as CUDA has it. `strides_bytes` begins with that of dims[1] (the
    innermost stride is the element), so it has one entry less; each a multiple of 16. box[0] is
    at most 64 elements (128 bytes, the swizzle's span), the others at most 256. In shared memory
    the tile is swizzled by 128 bytes, so its start must be 1024-byte aligned: the 16-byte unit j
    of row r lies at r * 128 + ((j ^ (r & 7)) * 16). Outside of the tensor are zeros.
    """
    raise NotImplementedError


class Kernel:
    """One kernel of a compiled variant, loaded on one device.

    `params` has a letter for each parameter: "p" pointer (an address), "l" int64, "i" int32,
    "f" float, "t" tensor map (the bytes of `tensor_map`; `const __grid_constant__ CUtensorMap`).
    `shared` is the most dynamic shared memory, in bytes, that any launch will ask for.
    """

    def __init__(
        self, cubin: bytes, name: str, params: str, device: torch.device, *, shared: int = 0
    ) -> None:
        raise NotImplementedError

    def launch(
        self,
        grid: tuple[int, int, int],
        block: int,
        args: Sequence[int | float | bytes],
        *,
        stream: int,
        shared: int = 0,
        cluster: tuple[int, int, int] = (1, 1, 1),
        pdl: bool = False,
    ) -> None:
        """Enqueues the kernel on `stream` (torch.cuda.current_stream().cuda_stream).

        `shared` is its dynamic shared memory in bytes. With `pdl` it may start before the kernel
        ahead of it has ended, and must execute griddepcontrol.wait before it reads its results.
        """
        raise NotImplementedError
