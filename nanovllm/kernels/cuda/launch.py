"""Loads compiled CUDA kernels into torch's context and launches them, in about a microsecond.

Talks to the driver's C interface by ctypes: `cuda.bindings` keeps tensor maps in Python objects,
which are aligned to 16 bytes where the driver wants 64
(https://github.com/NVIDIA/cuda-python/pull/1692). Knows nothing of what the kernels compute.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
from collections.abc import Sequence
from typing import Any

import torch

from nanovllm.kernels.cuda import build

CAPABILITY = (9, 0)  # what the kernels are written for: Hopper, sm_90a

# Of cuda.h, which keeps these numbers and layouts for all versions.
OUT_OF_MEMORY = 2
MAX_DYNAMIC_SHARED = 8  # of a function
CLUSTER_DIMENSION, PROGRAMMATIC_SERIALIZATION = 4, 6  # of a launch
TILE_TYPES = {torch.float16: 6, torch.bfloat16: 9}
NO_INTERLEAVE, SWIZZLE_128B, PROMOTE_256B, FILL_ZEROS = 0, 3, 3, 0
CONFIG = struct.Struct("7I4xQQI4x")  # CUlaunchConfig: grid, block, shared, stream, attributes
ATTRIBUTE = struct.Struct("I4x3I52x")  # CUlaunchAttribute: which, its value
MAP_BYTES, MAP_ALIGNMENT = 128, 128

INT, POINTER = ctypes.c_int, ctypes.c_void_p
_SIGNATURES: dict[str, list[Any]] = {
    "cuInit": [INT],
    "cuDeviceGet": [POINTER, INT],
    "cuDevicePrimaryCtxRetain": [POINTER, INT],
    "cuCtxPushCurrent_v2": [POINTER],
    "cuCtxPopCurrent_v2": [POINTER],
    "cuModuleLoadData": [POINTER, ctypes.c_char_p],
    "cuModuleGetFunction": [POINTER, POINTER, ctypes.c_char_p],
    "cuFuncSetAttribute": [POINTER, INT, INT],
    "cuLaunchKernelEx": [POINTER] * 4,
    "cuTensorMapEncodeTiled": [POINTER, INT, INT, *[POINTER] * 5, *[INT] * 4],
    "cuGetErrorString": [INT, POINTER],
}
# Of a parameter's letter: its struct format and alignment.
_FORMATS = {
    "p": ("Q", 8), "l": ("q", 8), "i": ("i", 4), "f": ("f", 4),
    "t": (f"{MAP_BYTES}s", MAP_ALIGNMENT),
}  # fmt: skip


@functools.cache
def available(device: torch.device) -> str | None:
    """Why CUDA C++ kernels cannot run on the device, in words; None if they can."""
    if device.type != "cuda" or torch.version.cuda is None:
        return f"the device is {device}, not an NVIDIA GPU"
    try:
        capability = torch.cuda.get_device_capability(device)
        _driver()
    except Exception as error:  # torch and the loader have many
        return f"the CUDA driver cannot be used: {error}"
    if capability != CAPABILITY:
        found, wanted = (".".join(map(str, pair)) for pair in (capability, CAPABILITY))
        return f"the GPU has compute capability {found}; these kernels are written for {wanted}"
    return build.unavailable()


@functools.lru_cache(maxsize=4096)
def tensor_map(
    pointer: int,
    dims: tuple[int, ...],
    strides_bytes: tuple[int, ...],
    box: tuple[int, ...],
    dtype: torch.dtype,
) -> bytes:
    """The 128 bytes of a CUtensorMap: tiles of a bf16 or fp16 tensor of 2 to 4 dimensions.

    All innermost dimension first, as CUDA has it. `strides_bytes` begins with that of dims[1] (the
    innermost stride is the element), so it has one entry less; each a multiple of 16, as the
    pointer is. box[0] is at most 64 elements (128 bytes, the swizzle's span), the others at most
    256. In shared memory the tile is swizzled by 128 bytes, so its start must be 1024-byte aligned:
    the 16-byte unit j of row r lies at r * 128 + ((j ^ (r & 7)) * 16) if box[0] is 64. Outside of
    the tensor are zeros. Raises RuntimeError if the driver refuses the shape.
    """
    rank = len(dims)
    assert 2 <= rank <= 4, "tiles have 2 to 4 dimensions"
    assert len(box) == rank == len(strides_bytes) + 1, "one entry a dimension, one stride less"
    memory, start = _aligned(MAP_BYTES)
    _call(
        "cuTensorMapEncodeTiled", start, TILE_TYPES[dtype], rank, pointer,
        (ctypes.c_uint64 * rank)(*dims), (ctypes.c_uint64 * rank)(*strides_bytes),
        (ctypes.c_uint32 * rank)(*box), (ctypes.c_uint32 * rank)(*[1] * rank),
        NO_INTERLEAVE, SWIZZLE_128B, PROMOTE_256B, FILL_ZEROS,
    )  # fmt: skip
    offset = start - ctypes.addressof(memory)
    return memory.raw[offset : offset + MAP_BYTES]


class Kernel:
    """One kernel of a compiled variant, loaded on one device for the life of the process.

    `params` has a letter for each parameter: "p" pointer (an address), "l" int64, "i" int32,
    "f" float, "t" tensor map (the bytes of `tensor_map`; `const __grid_constant__ TensorMap`).
    `shared` is the most dynamic shared memory, in bytes, that any launch will ask for.
    """

    def __init__(
        self, cubin: bytes, name: str, params: str, device: torch.device, *, shared: int = 0
    ) -> None:
        self._function = _load_function(cubin, name, device, shared)
        self._values, offsets = _layout(params)
        self._memory, self._start = _aligned(self._values.size)
        self._offset = self._start - ctypes.addressof(self._memory)
        # Where the driver finds each value; it has copied them when a launch returns.
        self._addresses = (POINTER * (len(params) or 1))(*[self._start + at for at in offsets])
        self._config = ctypes.create_string_buffer(CONFIG.size)
        self._arguments = (
            ctypes.addressof(self._config), self._function, ctypes.addressof(self._addresses), None
        )  # fmt: skip
        self._lock = threading.Lock()  # of the memory above
        self._enqueue = _driver().cuLaunchKernelEx

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

        The calling thread must have used the device through torch before. `shared` is the dynamic
        shared memory in bytes. With `pdl` the kernel may start before the one ahead of it has
        ended, and must execute griddepcontrol.wait before it reads what that one wrote.
        Raises RuntimeError, or torch.OutOfMemoryError, naming the driver's reason.
        """
        _, attributes, count = _attributes(cluster, pdl)
        with self._lock:
            self._values.pack_into(self._memory, self._offset, *args)
            CONFIG.pack_into(self._config, 0, *grid, block, 1, 1, shared, stream, attributes, count)
            status = self._enqueue(*self._arguments)
        if status != 0:
            _fail("cuLaunchKernelEx", status)


@functools.cache
def _driver() -> ctypes.CDLL:
    library = ctypes.CDLL("libcuda.so.1")
    for name, arguments in _SIGNATURES.items():
        getattr(library, name).argtypes = arguments
    return library


def _call(function: str, *arguments: Any) -> None:
    status = getattr(_driver(), function)(*arguments)
    if status != 0:
        _fail(function, status)


def _fail(function: str, status: int) -> None:
    text = ctypes.c_char_p()
    _driver().cuGetErrorString(status, ctypes.byref(text))
    error = torch.OutOfMemoryError if status == OUT_OF_MEMORY else RuntimeError
    reason = text.value.decode() if text.value else "unknown"
    raise error(f"{function} failed: {reason} (CUDA error {status})")


def _load_function(cubin: bytes, name: str, device: torch.device, shared: int) -> int:
    """The function's handle, with the module loaded into the context that torch uses as well."""
    index = torch.cuda.current_device() if device.index is None else device.index
    context, module, function, number = POINTER(), POINTER(), POINTER(), INT()
    _call("cuInit", 0)
    _call("cuDeviceGet", ctypes.byref(number), index)
    _call("cuDevicePrimaryCtxRetain", ctypes.byref(context), number)
    _call("cuCtxPushCurrent_v2", context)
    try:
        _call("cuModuleLoadData", ctypes.byref(module), cubin)
        _call("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
        _call("cuFuncSetAttribute", function, MAX_DYNAMIC_SHARED, shared)
    finally:
        _call("cuCtxPopCurrent_v2", ctypes.byref(POINTER()))
    assert function.value is not None
    return function.value


def _layout(params: str) -> tuple[struct.Struct, list[int]]:
    """How the values lie in memory, and the offset of each."""
    layout, end, offsets = "=", 0, []
    for letter in params:
        code, alignment = _FORMATS[letter]
        offsets.append(-(-end // alignment) * alignment)
        layout += f"{offsets[-1] - end}x{code}"
        end = offsets[-1] + struct.calcsize(f"={code}")
    return struct.Struct(layout), offsets


def _aligned(size: int) -> tuple[ctypes.Array[ctypes.c_char], int]:
    """Memory, and the first address in it with `size` bytes from a map's alignment on."""
    memory = ctypes.create_string_buffer(size + MAP_ALIGNMENT)
    return memory, -(-ctypes.addressof(memory) // MAP_ALIGNMENT) * MAP_ALIGNMENT


@functools.cache
def _attributes(cluster: tuple[int, int, int], pdl: bool) -> tuple[Any, int, int]:
    """The launch attributes: the memory that holds them, its address, and how many they are."""
    packed = []
    if cluster != (1, 1, 1):
        packed.append(ATTRIBUTE.pack(CLUSTER_DIMENSION, *cluster))
    if pdl:
        packed.append(ATTRIBUTE.pack(PROGRAMMATIC_SERIALIZATION, 1, 0, 0))
    memory = ctypes.create_string_buffer(b"".join(packed), max(1, len(packed) * ATTRIBUTE.size))
    return memory, ctypes.addressof(memory), len(packed)
