"""Chooses where and how a model computes, and says why in one line each.

Names the concrete operators and attention backends; knows no engine and loads nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nanovllm.attention.base import AttentionBackend, AttentionSpec
from nanovllm.attention.cpu import CpuAttention
from nanovllm.attention.select import select_backend
from nanovllm.attention.triton import TritonAttention
from nanovllm.config import EngineConfig
from nanovllm.errors import ConfigError
from nanovllm.kernels import cpu_ops
from nanovllm.kernels.cuda import build, launch
from nanovllm.layers.ops import Ops, TorchOps
from nanovllm.models.config import DecoderConfig

DEFAULT_BLOCK_SIZE = {"cpu": 32, "cuda": 64}


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen, and why not something faster ("" if it is the fastest)."""

    name: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Platform:
    """Where and how a model computes."""

    device: torch.device
    dtype: torch.dtype
    cache_dtype: torch.dtype
    ops: Ops
    attention: AttentionBackend
    block_size: int
    choices: dict[str, Choice]

    @property
    def uses_triton(self) -> bool:
        return isinstance(self.attention, TritonAttention)

    @property
    def uses_cpu_kernels(self) -> bool:
        return isinstance(self.ops, cpu_ops.CpuOps)


def choose_device(name: str) -> torch.device:
    """Raises ConfigError if cuda was asked for and is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        seen = ", ".join(f"cuda:{index}" for index in range(count)) or "no GPU"
        raise ConfigError(f"device {name!r} is not there: torch {torch.__version__} sees {seen}")
    return device


def choose_dtype(name: str, device: torch.device, model_config: dict[str, object]) -> torch.dtype:
    """ "auto" is the model's own, but float32 on a CPU without bfloat16 arithmetic."""
    if name != "auto":
        return getattr(torch, name)
    own = str(model_config.get("dtype") or model_config.get("torch_dtype") or "bfloat16")
    if own not in ("float32", "float16", "bfloat16"):
        own = "bfloat16"
    if device.type == "cpu" and own != "float32":
        own = "bfloat16" if cpu_has_bfloat16() else "float32"
    return getattr(torch, own)


def cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware."""
    return bool(torch.cpu._is_avx512_bf16_supported())


def choose_platform(
    config: EngineConfig, decoder: DecoderConfig, model_config: dict[str, object]
) -> Platform:
    """Raises ConfigError if a named attention backend cannot run here, with its reason."""
    device = choose_device(config.device)
    block_size = config.block_size or DEFAULT_BLOCK_SIZE[device.type]
    dtype = choose_dtype(config.dtype, device, model_config)
    ops, ops_choice = choose_ops(device)
    spec = AttentionSpec(
        decoder.num_heads,
        decoder.num_kv_heads,
        decoder.head_dim,
        block_size,
        dtype,
        device,
        decoder.sliding_windows,
    )
    attention, reasons = select_backend(spec, config.attention_backend)
    choices = {"ops": ops_choice, "attention": Choice(attention.name, "; ".join(reasons))}
    if device.type == "cuda":
        choices["graphs"] = choose_graphs(config, attention)
        choices["cuda c++"] = choose_cuda_kernels(device)
    choices["invariant"] = choose_invariance(config, ops, attention)
    cache_dtype = dtype
    if config.kv_cache_dtype == "fp8":
        if not isinstance(attention, TritonAttention):
            raise ConfigError(
                "kv_cache_dtype='fp8' needs the triton attention backend, "
                f"this is {attention.name}: {'; '.join(reasons) or 'it was asked for'}"
            )
        cache_dtype = torch.float8_e4m3fn
    return Platform(device, dtype, cache_dtype, ops, attention, block_size, choices)


def choose_graphs(config: EngineConfig, attention: AttentionBackend) -> Choice:
    """Whether steps are captured as CUDA graphs."""
    if not isinstance(attention, TritonAttention):
        return Choice("off", f"the {attention.name} attention backend is not captured")
    return Choice("off", "enforce_eager=True") if config.enforce_eager else Choice("on")


def choose_cuda_kernels(device: torch.device) -> Choice:
    """Whether kernels in CUDA C++ can run on a GPU; everything works without them."""
    reason = launch.available(device)
    if reason:
        return Choice("no", f"{reason}; Triton and cuBLAS take their place")
    return Choice(f"yes ({build.ARCH})")


def choose_invariance(config: EngineConfig, ops: Ops, attention: AttentionBackend) -> Choice:
    """Whether a request's bits are independent of its batch; ConfigError if asked for in vain."""
    if isinstance(ops, cpu_ops.CpuOps) and isinstance(attention, CpuAttention):
        return Choice("on", "the C++ kernels always are")
    if isinstance(attention, TritonAttention):
        return Choice("on" if config.batch_invariant else "off")
    if config.batch_invariant:
        raise ConfigError(
            "batch_invariant=True needs the C++ kernels on a CPU or Triton on a GPU: nothing else "
            f"promises it, and this is the {attention.name} attention backend"
        )
    return Choice("off", "torch's products depend on the number of rows")


def choose_ops(device: torch.device) -> tuple[Ops, Choice]:
    """The fastest operators that run on device."""
    if device.type != "cpu":
        return TorchOps(), Choice("torch")
    ops = cpu_ops.load()
    if isinstance(ops, str):
        return TorchOps(), Choice("torch", f"no C++ kernels: {ops}")
    return ops, Choice("c++")
