"""Facts about the machine and the software on it, for reports. Knows no engine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import asdict, dataclass
from typing import Any

import torch

import nanovllm
from nanovllm.bench.host import cpu_name, cpuinfo, system, usable_cores

PACKAGES = (
    *("torch", "triton", "cuda-bindings", "numpy"),
    *("tokenizers", "safetensors", "transformers"),
)
# Instruction sets that the kernels make use of, in the spelling of /proc/cpuinfo.
INSTRUCTION_SETS = (
    *("sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni"),
    *("avx512_bf16", "avx512_fp16", "avx_vnni", "amx_tile", "amx_bf16", "amx_int8"),
    *("asimd", "asimddp", "sve", "bf16", "i8mm"),
)
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Hardware:
    """memory in bytes; threads is what torch uses; gpus are "name, bytes"."""

    cpu: str
    num_cores: int
    num_threads: int
    instruction_sets: tuple[str, ...]
    memory: int
    gpus: tuple[str, ...]


def hardware() -> Hardware:
    facts = cpuinfo()
    flags = set((facts.get("flags") or facts.get("Features") or "").split())
    return Hardware(
        cpu=cpu_name(facts),
        num_cores=usable_cores(),
        num_threads=torch.get_num_threads(),
        instruction_sets=tuple(name for name in INSTRUCTION_SETS if name in flags),
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        gpus=tuple(_gpu(index) for index in range(torch.cuda.device_count())),
    )


def versions() -> dict[str, str]:
    """Of nanovllm, Python, the system, and the packages that matter and are installed."""
    found = {
        "nanovllm": nanovllm.__version__,
        "python": platform.python_version(),
        "system": system(),
    }
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def machine() -> dict[str, Any]:
    """Both, as they go into a JSON report."""
    return {"hardware": asdict(hardware()), "versions": versions()}


def _gpu(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    major, minor = properties.major, properties.minor
    return f"{properties.name}, {properties.total_memory / GIB:.0f} GiB, sm_{major}{minor}"
