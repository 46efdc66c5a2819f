"""Compiles the C++ sources beside this file into a shared library, once per machine.

Knows compilers; knows nothing of tensors or of what the sources compute.
The library's name is a hash of the sources, the flags, the compiler and the processor's
instruction set, so a stale or foreign library is never loaded.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import subprocess
from pathlib import Path

from nanovllm.kernels import cache
from nanovllm.kernels.cache import BuildError

logger = logging.getLogger("nanovllm")

SOURCE_DIR = Path(__file__).parent
COMPILERS = ("g++", "c++", "clang++")
FLAGS = ("-std=gnu++17", "-O3", "-fPIC", "-pthread", "-ffp-contract=off", "-w")
NATIVE_FLAGS = ("-march=native", "-mcpu=native", None)  # the first that the compiler takes


def build_library() -> Path:
    """Path of the compiled library, compiling it if no cached one fits this machine.

    Raises BuildError when there is no compiler or it fails.
    """
    compiler = find_compiler()
    name = f"cpu-{_fingerprint(compiler)}.so"
    cached = cache.find(name)
    if cached is not None:
        return cached
    directory = cache.writable_directory()
    if directory is None:
        raise BuildError(
            "no directory to compile the CPU kernels into: neither the cache directory "
            "nor the temporary directory is writable by this user alone"
        )
    return _compile(compiler, directory / name)


def find_compiler() -> str:
    for name in COMPILERS:
        path = shutil.which(name)
        if path is not None:
            return os.path.realpath(path)
    raise BuildError(f"no C++ compiler found (looked for {', '.join(COMPILERS)})")


def _sources() -> list[Path]:
    return sorted(path for path in SOURCE_DIR.iterdir() if path.suffix in (".cpp", ".h"))


def _fingerprint(compiler: str) -> str:
    digest = hashlib.sha256()
    for path in _sources():
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    binary = os.stat(compiler)
    facts = (FLAGS, NATIVE_FLAGS, compiler, binary.st_size, binary.st_mtime_ns, _instruction_set())
    digest.update(repr(facts).encode())
    return digest.hexdigest()[:20]


def _instruction_set() -> str:
    """The processor's features as the kernel lists them, else its name."""
    try:
        with open("/proc/cpuinfo") as info:
            for line in info:
                if line.startswith(("flags", "Features")):
                    return line
    except OSError:
        pass
    return f"{platform.machine()} {platform.processor()}"


def _compile(compiler: str, library: Path) -> Path:
    """Compiles each source in a process of its own, links, and renames into place."""
    logger.warning("compiling the CPU kernels, once on this machine: some seconds")
    with cache.scratch(library.parent) as scratch:
        native = _native_flag(compiler)
        command = [compiler, *FLAGS, *([native] if native else [])]
        objects, jobs = [], []
        for source in _sources():
            if source.suffix == ".cpp":
                objects.append(str(scratch / f"{source.stem}.o"))
                jobs.append(_start([*command, "-c", str(source), "-o", objects[-1]]))
        _finish(jobs)
        output = scratch / "library.so"
        _finish([_start([*command, "-shared", *objects, "-o", str(output)])])
        cache.publish(output, library)
    return library


def _native_flag(compiler: str) -> str | None:
    for flag in NATIVE_FLAGS:
        if flag is None:
            break
        probe = [compiler, flag, "-x", "c++", "-fsyntax-only", os.devnull]
        if subprocess.run(probe, capture_output=True, check=False).returncode == 0:
            return flag
    return None


def _start(command: list[str]) -> subprocess.Popen[str]:
    try:
        return subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
    except OSError as error:
        raise BuildError(f"{command[0]} does not start: {error}") from error


def _finish(jobs: list[subprocess.Popen[str]]) -> None:
    """Waits for all jobs, then raises BuildError for the first that failed."""
    errors = [job.communicate()[1].strip().splitlines() for job in jobs]
    for job, lines in zip(jobs, errors, strict=True):
        if job.returncode != 0:
            first = next((line for line in lines if "error" in line), lines[0] if lines else "")
            raise BuildError(f"the C++ compiler failed (exit {job.returncode}): {first}")
