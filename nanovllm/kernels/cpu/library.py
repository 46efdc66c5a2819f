"""The C interface of the compiled kernels: its functions and their arguments. Knows no tensors
but the number of torch's threads."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch

from nanovllm.kernels.cpu.build import BuildError, build_library

POINTER, LONG, INT, FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
NO_MEMORY = -(2**63)  # what attention returns where memory ran out
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "start": (None, [INT]),
    "pack": (POINTER, [POINTER, LONG, LONG, INT]),
    "free": (None, [POINTER]),
    "want_huge_pages": (None, [POINTER, LONG]),
    "linear": (INT, [POINTER, POINTER, LONG, LONG, POINTER, POINTER]),
    "embedding": (LONG, [POINTER, POINTER, LONG, POINTER]),
    "rms_norm": (None, [INT, POINTER, LONG, POINTER, FLOAT, LONG, LONG, POINTER]),
    "add_rms_norm": (None, [INT, *[POINTER] * 3, FLOAT, LONG, LONG, POINTER]),
    "rope": (
        LONG,
        [
            *[INT, POINTER, LONG, LONG, POINTER, POINTER, LONG, LONG, POINTER],
            *[FLOAT, POINTER, LONG, POINTER, LONG, LONG],
        ],
    ),
    "silu_mul": (None, [INT, POINTER, LONG, LONG, POINTER]),
    "store_kv": (LONG, [*[POINTER] * 3, LONG, POINTER, LONG]),
    "attention": (LONG, [*[POINTER, POINTER], *[POINTER, LONG] * 3, LONG, FLOAT, LONG, POINTER]),
    "forward": (INT, [POINTER] * 5),
}


@functools.cache
def library() -> ctypes.CDLL | str:
    """The loaded library, compiled if need be, or the reason in words why there is none."""
    try:
        loaded = ctypes.CDLL(str(build_library()))
    except (BuildError, OSError) as error:
        return str(error)
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(loaded, f"nanovllm_{name}")
        function.restype, function.argtypes = result, arguments
    loaded.nanovllm_start(torch.get_num_threads())
    return loaded
