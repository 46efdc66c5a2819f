"""Compiles CUDA C++ sources with NVRTC, once per machine. (Interface; the body follows.)"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

SOURCE_DIR = Path(__file__).parent


class BuildError(Exception):
    """A source cannot be compiled here; the message says why."""


def compile_cubin(
    source: str, name: str, arch: str = "sm_90a", defines: Mapping[str, int | str] | None = None
) -> bytes:
    """Machine code of `source`, the text of a .cu file called `name`.

    It may include the .cuh files beside this module, and nothing else; its kernels are
    `extern "C" __global__`. `defines` are the macros that make the variant.
    """
    raise NotImplementedError
