"""How much memory there is, and what fits into it: KV blocks and context length."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from nanovllm.config import EngineConfig
from nanovllm.errors import ConfigError, OutOfMemoryError
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


def check_context(engine: EngineConfig, model: DecoderConfig) -> None:
    """Raises ConfigError if a context was asked for that the model was not made for."""
    if engine.max_model_len is not None and engine.max_model_len > model.max_position:
        raise ConfigError(
            f"max_model_len is {engine.max_model_len}, but the model was made for "
            f"{model.max_position} positions (max_position_embeddings in config.json)"
        )


def fit_cache(
    engine: EngineConfig,
    model: DecoderConfig,
    *,
    block_size: int,
    dtype: torch.dtype,
    free_bytes: int,
    on_cpu: bool,
) -> CacheSize:
    """Blocks within the budget, and the longest context that they hold.

    free_bytes is what is left after the weights; on a CPU at most DEFAULT_CPU_KV_BYTES are taken
    unless more were asked for. Raises OutOfMemoryError if not even one block fits, ConfigError if
    fewer bytes were asked for than one takes.
    """
    size = block_bytes(model, block_size, dtype)
    wanted_len = engine.max_model_len or model.max_position
    useful = engine.max_num_seqs * -(-wanted_len // block_size)
    asked = _blocks_asked_for(engine, size, useful, on_cpu)
    if asked < 1:
        raise ConfigError(
            f"kv_cache_memory_bytes={engine.kv_cache_memory_bytes} holds no KV cache: one block of "
            f"{block_size} slots needs {size} bytes"
        )
    num_blocks = min(asked, free_bytes // size)
    if num_blocks < 1:
        raise OutOfMemoryError(
            f"no room for a KV cache: one block of {block_size} slots needs {size / MIB:.1f} MiB, "
            f"{max(0, free_bytes) / MIB:.0f} MiB are free; a smaller model, dtype='bfloat16', or "
            "a higher gpu_memory_utilization would help"
        )
    notes = []
    explicit = engine.num_kv_blocks is not None or engine.kv_cache_memory_bytes is not None
    if explicit and num_blocks < asked:
        notes.append(
            f"the KV cache has {num_blocks} blocks instead of {asked}: "
            f"{free_bytes / MIB:.0f} MiB are free, a block takes {size / MIB:.2f}"
        )
    fits = num_blocks * block_size
    if wanted_len > fits:
        notes.append(
            f"max_model_len is {fits} instead of {wanted_len}: the KV cache holds {num_blocks} "
            f"blocks of {block_size} slots ({num_blocks * size / MIB:.0f} MiB)"
        )
    return CacheSize(num_blocks, min(fits, wanted_len), tuple(notes))


def _blocks_asked_for(engine: EngineConfig, size: int, useful: int, on_cpu: bool) -> int:
    if engine.num_kv_blocks is not None:
        return engine.num_kv_blocks
    if engine.kv_cache_memory_bytes is not None:
        return min(useful, engine.kv_cache_memory_bytes // size)
    return min(useful, DEFAULT_CPU_KV_BYTES // size) if on_cpu else useful


def check_weights_fit(num_bytes: int, device: torch.device, share: float) -> None:
    """Raises OutOfMemoryError before anything is loaded if the weights cannot fit."""
    free = free_memory(device, share)
    if num_bytes > free:
        raise OutOfMemoryError(
            f"the weights need {num_bytes / MIB:.0f} MiB, {(num_bytes - max(0, free)) / MIB:.0f} "
            f"more than the {max(0, free) / MIB:.0f} MiB that are free on {device}; a smaller "
            "model, a 16-bit dtype, or a higher gpu_memory_utilization would help"
        )


def free_memory(device: torch.device, share: float) -> int:
    """Bytes that weights and KV cache may still take on device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what torch keeps of tensors that are gone, a closed engine's say
        free, total = torch.cuda.mem_get_info(device)
        return int(min(free - CUDA_RESERVE_BYTES, total * share - (total - free)))
    return int(available_host_memory() * share) - CPU_RESERVE_BYTES


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
