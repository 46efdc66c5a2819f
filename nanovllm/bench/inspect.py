"""What an engine would use on this machine, found without loading a model's weights."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nanovllm.bench.machine import machine
from nanovllm.config import EngineConfig
from nanovllm.kernels import cache
from nanovllm.model_files import find_model
from nanovllm.models import registry
from nanovllm.platforms import choose_platform
from nanovllm.runner.memory import available_host_memory, free_memory


@dataclass(frozen=True, slots=True)
class Inspection:
    """machine is hardware and versions; memory in bytes; choices as in EngineInfo."""

    machine: dict[str, Any]
    model: str
    architecture: str
    device: str
    dtype: str
    choices: dict[str, dict[str, str]]
    memory: dict[str, int]
    directories: dict[str, str]


def inspect(config: EngineConfig) -> Inspection:
    """Raises ConfigError or ModelLoadError as building the engine would."""
    files = find_model(config.model)
    decoder = registry.read_config(files.config)
    platform = choose_platform(config, decoder, files.config)
    share = config.gpu_memory_utilization
    return Inspection(
        machine=machine(),
        model=str(files.directory),
        architecture=files.config["architectures"][0],
        device=str(platform.device),
        dtype=str(platform.dtype).removeprefix("torch."),
        choices={part: asdict(choice) for part, choice in platform.choices.items()},
        memory={
            "host_available": available_host_memory(),
            "weights_and_kv_cache_at_most": free_memory(platform.device, share),
        },
        directories={
            "compiled kernels": str(cache.directory_in_use() or "no directory is writable"),
            "hub models": _hub(),
        },
    )


def _hub() -> str:
    home = os.environ.get("HF_HOME") or Path(os.path.expanduser("~"), ".cache", "huggingface")
    return os.environ.get("HF_HUB_CACHE") or str(Path(home) / "hub")
