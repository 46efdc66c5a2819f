"""Compiles CUDA C++ sources with NVRTC, once per machine.

NVRTC comes with torch, so neither nvcc nor a toolkit is needed, nor a GPU. Knows nothing of
tensors or of what the sources compute. A source sees the .cuh files beside this module and nothing
else. Where the cache cannot be written, each process compiles for itself.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanovllm.kernels import cache
from nanovllm.kernels.cache import BuildError

logger = logging.getLogger("nanovllm")

SOURCE_DIR = Path(__file__).parent
ARCH = "sm_90a"
FLAGS = ("-std=c++17", "-default-device")
_locks: dict[str, threading.Lock] = {}  # by file: threads share the work on a variant


def compile_cubin(
    source: str, name: str, arch: str = ARCH, defines: Mapping[str, int | str] | None = None
) -> bytes:
    """Machine code of `source`, the text of a .cu file called `name`.

    Its kernels are `extern "C" __global__`. `defines` are the macros that make the variant.
    Raises BuildError with the first error if it does not compile. Threads may compile variants in
    parallel.
    """
    macros = [f"-D{macro}={value}" for macro, value in sorted((defines or {}).items())]
    options = [f"--gpu-architecture={arch}", *FLAGS, *macros]
    headers = {path.name: path.read_text() for path in sorted(SOURCE_DIR.glob("*.cuh"))}
    file = f"cuda-{_fingerprint(source, name, headers, options)}.cubin"
    with _locks.setdefault(file, threading.Lock()):
        cubin = _load(file)
        if cubin is None:
            logger.info("compiling %s %s", name, " ".join(macros))
            cubin = _compile(source, name, headers, options)
            _store(file, cubin)
    return cubin


def read_source(name: str) -> str:
    """The text of a source beside this module."""
    return (SOURCE_DIR / name).read_text()


@functools.cache
def unavailable() -> str | None:
    """Why nothing can be compiled here, in words; None if it can."""
    try:
        _version()
    except Exception as error:  # the loader of NVRTC has errors of its own
        return f"NVRTC cannot be used: {str(error).strip() or repr(error)}".splitlines()[0]
    return None


def _fingerprint(source: str, name: str, headers: Mapping[str, str], options: list[str]) -> str:
    facts = (source, name, sorted(headers.items()), options, _version())
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:20]


def _load(file: str) -> bytes | None:
    path = cache.find(file)
    try:
        return path.read_bytes() if path else None
    except OSError:
        return None


def _store(file: str, cubin: bytes) -> None:
    """Keeps the code for other processes, if the disk allows."""
    directory = cache.writable_directory()
    if directory is None:
        return
    try:
        with cache.scratch(directory) as scratch:
            made = scratch / file
            made.write_bytes(cubin)
            cache.publish(made, directory / file)
    except OSError as error:
        logger.info("%s is not kept: %s", file, error)


@functools.cache
def _nvrtc() -> Any:
    return importlib.import_module("cuda.bindings.nvrtc")  # not on every machine


def _version() -> tuple[int, int]:
    major, minor = _call("nvrtcVersion")
    return major, minor


def _call(function: str, *arguments: Any) -> list[Any]:
    """The values of an NVRTC call. Raises BuildError naming the call."""
    code, *values = getattr(_nvrtc(), function)(*arguments)
    if int(code) != 0:
        _, text = _nvrtc().nvrtcGetErrorString(code)
        raise BuildError(f"{function} failed: {text.decode()}")
    return values


def _compile(source: str, name: str, headers: Mapping[str, str], options: list[str]) -> bytes:
    texts = [text.encode() for text in headers.values()]
    names = [header.encode() for header in headers]
    program = _call("nvrtcCreateProgram", source.encode(), name.encode(), len(names), texts, names)[
        0
    ]
    try:
        flags = [option.encode() for option in options]
        try:
            _call("nvrtcCompileProgram", program, len(flags), flags)
        except BuildError as error:
            raise BuildError(_first_error(_log(program)) or str(error)) from None
        logger.debug("%s: %s", name, _log(program))  # warnings, of ptxas too
        cubin = bytearray(_call("nvrtcGetCUBINSize", program)[0])
        _call("nvrtcGetCUBIN", program, cubin)
    finally:
        _nvrtc().nvrtcDestroyProgram(program)
    return bytes(cubin)


def _log(program: Any) -> str:
    log = bytearray(_call("nvrtcGetProgramLogSize", program)[0])
    _call("nvrtcGetProgramLog", program, log)
    return log.decode(errors="replace").strip("\0\n ")


def _first_error(log: str) -> str:
    lines = log.splitlines()
    return next((line for line in lines if "error" in line), lines[0] if lines else "")
