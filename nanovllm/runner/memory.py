"""How much memory there is, and what fits into it: KV blocks and context length."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from nanovllm.config import EngineConfig
from nanovllm.errors import OutOfMemoryError
from nanovllm.models.config import DecoderConfig

DEFAULT_CPU_KV_BYTES = 4 << 30
# Beside weights and KV cache: activations, logits and the libraries' workspaces.
CUDA_RESERVE_BYTES = 1 << 30
CPU_RESERVE_BYTES = 256 << 20
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class CacheSize:
    """Result of fitting: notes hold one line for each limit that had to give way."""

    num_blocks: int
    max_model_len: int
    notes: tuple[str, ...] = ()


def block_bytes(config: DecoderConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block: keys and values of every layer."""
    per_slot = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    return per_slot * block_size * dtype.itemsize


def fit_cache(
    engine: EngineConfig,
    model: DecoderConfig,
    *,
    block_size: int,
    dtype: torch.dtype,
    free_bytes: int,
) -> CacheSize:
    """Blocks within the budget, and the longest context that they hold.

    free_bytes is what is left after the weights. Raises OutOfMemoryError if not even one block
    fits, or fewer than an asked-for context needs.
    """
    size = block_bytes(model, block_size, dtype)
    wanted_len = engine.max_model_len or model.max_position
    useful = engine.max_num_seqs * -(-wanted_len // block_size)
    if engine.num_kv_blocks is not None:
        num_blocks = engine.num_kv_blocks
    elif engine.kv_cache_memory_bytes is not None:
        num_blocks = min(useful, engine.kv_cache_memory_bytes // size)
    else:
        num_blocks = min(useful, free_bytes // size)
    if num_blocks < 1:
        raise OutOfMemoryError(
            f"no room for a KV cache: one block of {block_size} slots needs {size / MIB:.1f} MiB, "
            f"{max(0, free_bytes) / MIB:.0f} MiB are free; a smaller model, dtype='bfloat16', or "
            "a higher gpu_memory_utilization would help"
        )
    fits = num_blocks * block_size
    if wanted_len <= fits:
        return CacheSize(num_blocks, wanted_len)
    note = (
        f"max_model_len is {fits} instead of {wanted_len}: the KV cache holds {num_blocks} "
        f"blocks of {block_size} slots ({num_blocks * size / MIB:.0f} MiB)"
    )
    return CacheSize(num_blocks, fits, (note,))


def free_memory(device: torch.device, share: float) -> int:
    """Bytes that weights and KV cache may still take on device."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return int(min(free - CUDA_RESERVE_BYTES, total * share - (total - free)))
    available = int(available_host_memory() * share) - CPU_RESERVE_BYTES
    return min(DEFAULT_CPU_KV_BYTES, available)


def available_host_memory() -> int:
    """Bytes that this process could still take: the system's word, and its control group's."""
    limits = [_system_available()]
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            limits.append(int(limit) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass  # no control group (v2) here
    return max(0, min(limits))


def _system_available() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
