"""Engine options: one frozen record, closed to unknown names.

What is found out at run time (the number of KV blocks, the context that fits) is a result of
building the engine and lives there, not here.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from nanovllm.errors import ConfigError
from nanovllm.records import Record, real, whole

CHOICES = {
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "device": ("auto", "cpu", "cuda"),
    "load_format": ("auto", "dummy"),
    "kv_cache_dtype": ("auto", "fp8"),
}
FLAGS = (
    "enable_prefix_caching",
    "enforce_eager",
    "batch_invariant",
    "async_scheduling",
    "skip_tokenizer_init",
)
COUNTS = (
    "max_num_seqs",
    "tensor_parallel_size",
    "max_model_len",
    "max_num_batched_tokens",
    "block_size",
    "kv_cache_memory_bytes",
    "num_kv_blocks",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig(Record):
    """Options of one engine.

    model            a directory in Hugging Face format, a hub name, or "demo"
    dtype            of weights and KV cache; "auto": the model's own on a GPU; on a CPU bfloat16
                     for 16-bit models if it has such arithmetic, else float32
    device           "auto": cuda if there is one, else cpu; "cuda:1" names one of several
    max_model_len    context in tokens; default: the model's own, fitted down to memory
    max_num_seqs     sequences that run at once
    max_num_batched_tokens   tokens computed in one step; longer prompts go in chunks
    block_size       KV slots a block; default: what measured best on the device
    gpu_memory_utilization   share of the device's memory for weights and KV cache; also on CPU,
                     where the KV cache is at most 4 GiB unless kv_cache_memory_bytes says more
    kv_cache_memory_bytes    exact budget of the KV cache instead
    num_kv_blocks    exact number of blocks instead (tests, simulations)
    kv_cache_dtype   "auto": dtype; "fp8": 8-bit floats (e4m3), twice the tokens in the same
                     memory and faster steps, at some loss of precision (GPU only)
    enable_prefix_caching    reuse the KV blocks of equal prefixes
    enforce_eager    never capture CUDA graphs
    batch_invariant  the same bits for a request whatever is computed with it, cached or chunked;
                     slower on a GPU, always so with the C++ kernels on a CPU
    async_scheduling plan step N+1 while step N runs
    attention_backend  "auto" or the name of one
    load_format      "auto", or "dummy" for random weights in the model's shapes (benchmarks)
    skip_tokenizer_init  prompts and outputs are token ids only
    seed             of requests that bring none, and of dummy weights
    """

    _unknown = (ConfigError, "engine option")

    model: str = "demo"
    dtype: str = "auto"
    device: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    block_size: int | None = None
    gpu_memory_utilization: float = 0.9
    kv_cache_memory_bytes: int | None = None
    num_kv_blocks: int | None = None
    kv_cache_dtype: str = "auto"
    enable_prefix_caching: bool = True
    enforce_eager: bool = False
    batch_invariant: bool = False
    async_scheduling: bool = True
    attention_backend: str = "auto"
    load_format: str = "auto"
    skip_tokenizer_init: bool = False
    tensor_parallel_size: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.model, (str, os.PathLike)) or not str(self.model):
            raise ConfigError(f"model must be a directory or a hub name, got {self.model!r}")
        share = real(self.gpu_memory_utilization)
        if share is None or not 0 < share <= 1:
            raise ConfigError(
                f"gpu_memory_utilization must be in (0, 1], got {self.gpu_memory_utilization!r}"
            )
        seed = whole(self.seed)
        if seed is None:
            raise ConfigError(f"seed must be an integer, got {self.seed!r}")
        self._set(model=str(self.model), gpu_memory_utilization=share, seed=seed)
        self._check_choices()
        self._check_counts()

    def _check_choices(self) -> None:
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value not in allowed and not (name == "device" and _is_cuda_index(value)):
                raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        for name in FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, got {getattr(self, name)!r}")

    def _check_counts(self) -> None:
        for name in COUNTS:
            value = getattr(self, name)
            if value is None and name != "max_num_seqs":  # which has no default of its own
                continue
            count = whole(value)
            if count is None or count < 1:
                raise ConfigError(f"{name} must be an integer of at least 1, got {value!r}")
            self._set(**{name: count})
        if self.block_size is not None and (self.block_size % 8 or self.block_size > 256):
            raise ConfigError(
                f"block_size must be a multiple of 8 up to 256, got {self.block_size}"
            )
        if self.tensor_parallel_size != 1:
            raise ConfigError(
                f"tensor_parallel_size={self.tensor_parallel_size} is not available: "
                "this version runs a model on one device"
            )


def _is_cuda_index(value: object) -> bool:
    return isinstance(value, str) and value.startswith("cuda:") and value[5:].isdigit()
