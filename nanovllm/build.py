"""The composition root: the only place that names concrete classes and puts an engine together.

Chooses device, dtype, operators and attention backend, says why in one line each, loads the
model, and sizes the KV cache to what is left.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanovllm.attention.base import AttentionBackend, AttentionSpec
from nanovllm.attention.cpu import CpuAttention
from nanovllm.attention.select import select_backend
from nanovllm.attention.triton import TritonAttention
from nanovllm.config import EngineConfig
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.core import EngineCore
from nanovllm.engine.scheduler import Scheduler
from nanovllm.errors import ConfigError, OutOfMemoryError
from nanovllm.executor.inline import InlineExecutor
from nanovllm.grammar.compiler import GrammarCompiler
from nanovllm.kernels import cpu_ops
from nanovllm.layers.ops import Ops, TorchOps
from nanovllm.model_files import ModelFiles, find_model
from nanovllm.models import registry
from nanovllm.models.config import DecoderConfig
from nanovllm.models.decoder import Decoder
from nanovllm.runner.loader import fill_dummy_weights, load_weights
from nanovllm.runner.memory import (
    CacheSize,
    check_context,
    check_weights_fit,
    fit_cache,
    free_memory,
)
from nanovllm.runner.model_runner import ModelRunner
from nanovllm.runner.sampler import BadWords
from nanovllm.text.chat import ChatTemplate
from nanovllm.text.tokenizer import Tokenizer
from nanovllm.trace.events import Tracer

logger = logging.getLogger("nanovllm")

DEFAULT_BLOCK_SIZE = {"cpu": 32, "cuda": 64}
DEFAULT_BATCHED_TOKENS = {"cpu": 512, "cuda": 8192}
ONE_STEP_AHEAD = 2  # plans in flight: one runs, one waits for it


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
    choices: dict[str, Choice]


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What building an engine found out. notes: one line for each limit that had to give way."""

    model: str
    device: str
    dtype: str
    choices: dict[str, Choice]
    num_blocks: int
    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    vocab_size: int
    load_seconds: float
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Engine:
    """The parts that the public API works with; tokenizer is None if it was skipped."""

    core: EngineCore
    tokenizer: Tokenizer | None
    chat_template: ChatTemplate
    files: ModelFiles
    info: EngineInfo


def build_engine(config: EngineConfig, tracer: Tracer | None = None) -> Engine:
    """Raises ConfigError, ModelLoadError or OutOfMemoryError; nothing is left behind then."""
    started = time.monotonic()
    files = find_model(config.model)
    decoder = registry.read_config(files.config)
    check_context(config, decoder)
    tokenizer = None if config.skip_tokenizer_init else files.tokenizer()
    block_size = config.block_size or DEFAULT_BLOCK_SIZE[choose_device(config.device).type]
    platform = choose_platform(config, decoder, block_size, files.config)
    ready = _start_compiling(config, decoder, platform, block_size)
    model = _load(config, decoder, platform, files.directory)
    cache = fit_cache(
        config,
        decoder,
        block_size=block_size,
        dtype=platform.cache_dtype,
        free_bytes=free_memory(platform.device, config.gpu_memory_utilization),
        on_cpu=platform.device.type == "cpu",
    )
    num_seqs, num_tokens, notes = _step_limits(config, cache, platform.device)
    if platform.choices["ops"].reason:
        notes = (f"plain torch operators, slower: {platform.choices['ops'].reason}", *notes)
    for note in notes:
        logger.warning(note)
    model.finish_loading(platform.device, cache.max_model_len)
    ready()
    compiler = None
    if tokenizer is not None:
        compiler = GrammarCompiler(tokenizer, decoder.vocab_size, files.eos_token_ids())
    try:
        runner = _runner(
            config, model, platform, cache, block_size, num_seqs, num_tokens, files, tokenizer,
            compiler,
        )  # fmt: skip
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(
            f"a KV cache of {cache.num_blocks} blocks and {num_seqs} sequences does not fit on "
            f"{platform.device} after all: {str(error).splitlines()[0]}; a lower "
            "gpu_memory_utilization or max_num_seqs would help"
        ) from None
    core = EngineCore(
        Scheduler(
            BlockManager(cache.num_blocks, block_size, config.enable_prefix_caching),
            max_num_seqs=num_seqs,
            max_num_batched_tokens=num_tokens,
            max_model_len=cache.max_model_len,
            eos_token_ids=frozenset(files.eos_token_ids()),
            tracer=tracer,
        ),
        InlineExecutor(runner, cache.num_blocks),
        vocab_size=decoder.vocab_size,
        depth=ONE_STEP_AHEAD if config.async_scheduling else 1,
        seed=config.seed,
        clock=time.monotonic,
        check_structure=compiler,
    )
    info = EngineInfo(
        model=config.model,
        device=str(platform.device),
        dtype=str(platform.dtype).removeprefix("torch."),
        choices=platform.choices,
        num_blocks=cache.num_blocks,
        block_size=block_size,
        max_model_len=cache.max_model_len,
        max_num_seqs=num_seqs,
        max_num_batched_tokens=num_tokens,
        vocab_size=decoder.vocab_size,
        load_seconds=time.monotonic() - started,
        notes=notes,
    )
    template = files.chat_template(tokenizer) if tokenizer else ChatTemplate(None, {})
    return Engine(core, tokenizer, template, files, info)


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
    config: EngineConfig, decoder: DecoderConfig, block_size: int, model_config: dict[str, object]
) -> Platform:
    """Raises ConfigError if a named attention backend cannot run here, with its reason."""
    device = choose_device(config.device)
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
    choices["invariant"] = choose_invariance(config, ops, attention)
    cache_dtype = dtype
    if config.kv_cache_dtype == "fp8":
        if not isinstance(attention, TritonAttention):
            raise ConfigError(
                "kv_cache_dtype='fp8' needs the triton attention backend, "
                f"this is {attention.name}: {'; '.join(reasons) or 'it was asked for'}"
            )
        cache_dtype = torch.float8_e4m3fn
    return Platform(device, dtype, cache_dtype, ops, attention, choices)


def choose_graphs(config: EngineConfig, attention: AttentionBackend) -> Choice:
    """Whether steps are captured as CUDA graphs."""
    if not isinstance(attention, TritonAttention):
        return Choice("off", f"the {attention.name} attention backend is not captured")
    return Choice("off", "enforce_eager=True") if config.enforce_eager else Choice("on")


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


def _load(
    config: EngineConfig, decoder: DecoderConfig, platform: Platform, directory: Path
) -> Decoder:
    model = Decoder(decoder, platform.ops, platform.attention)
    num_bytes = sum(math.prod(p.shape) for p in model.parameters()) * platform.dtype.itemsize
    check_weights_fit(num_bytes, platform.device, config.gpu_memory_utilization)
    try:
        if config.load_format == "dummy":
            fill_dummy_weights(model, platform.dtype, platform.device, config.seed)
        else:
            load_weights(model, directory, platform.dtype, platform.device)
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(
            f"the weights do not fit on {platform.device}: {str(error).splitlines()[0]}; "
            "a smaller model, dtype='bfloat16' or a larger device would help"
        ) from None
    return model


def _start_compiling(
    config: EngineConfig, decoder: DecoderConfig, platform: Platform, block_size: int
) -> Callable[[], None]:
    """Starts what can run while the weights are read; the result waits for it."""
    if not isinstance(platform.attention, TritonAttention):
        return lambda: None
    from nanovllm.runner.gpu_warmup import KernelWarmUp  # needs triton

    return KernelWarmUp(
        decoder,
        dtype=platform.dtype,
        cache_dtype=platform.cache_dtype,
        device=platform.device,
        block_size=block_size,
        max_model_len=config.max_model_len or decoder.max_position,
    ).wait


def _step_limits(
    config: EngineConfig, cache: CacheSize, device: torch.device
) -> tuple[int, int, tuple[str, ...]]:
    """(sequences, tokens) of a step at most, and the notes of everything fitted down."""
    notes = list(cache.notes)
    num_tokens = config.max_num_batched_tokens or DEFAULT_BATCHED_TOKENS[device.type]
    num_seqs = min(config.max_num_seqs, cache.num_blocks)
    if num_seqs < config.max_num_seqs:
        notes.append(
            f"max_num_seqs is {num_seqs} instead of {config.max_num_seqs}: "
            f"there are {cache.num_blocks} KV blocks and a sequence needs one"
        )
    if num_seqs > num_tokens:
        notes.append(
            f"max_num_seqs is {num_tokens} instead of {num_seqs}: a step computes at most "
            f"max_num_batched_tokens={num_tokens} tokens, one a sequence"
        )
        num_seqs = num_tokens
    return num_seqs, num_tokens, tuple(notes)


def _runner(
    config: EngineConfig,
    model: Decoder,
    platform: Platform,
    cache: CacheSize,
    block_size: int,
    max_num_seqs: int,
    max_num_tokens: int,
    files: ModelFiles,
    tokenizer: Tokenizer | None,
    compiler: GrammarCompiler | None,
) -> ModelRunner:
    options: dict[str, Any] = {
        "device": platform.device,
        "dtype": platform.cache_dtype,
        "num_blocks": cache.num_blocks,
        "block_size": block_size,
        "max_num_seqs": max_num_seqs,
        "max_model_len": cache.max_model_len,
        "stop_ids": files.eos_token_ids(),
        "bad_words": BadWords(tokenizer.spellings if tokenizer else None),
        "constraints": compiler,
    }
    if isinstance(platform.attention, TritonAttention):
        from nanovllm.runner.gpu_runner import GpuModelRunner  # needs triton

        graphs = not config.enforce_eager
        return GpuModelRunner(
            model,
            use_graphs=graphs,
            max_tokens=max_num_tokens,
            batch_invariant=config.batch_invariant,
            **options,
        )
    scope = cpu_ops.one_torch_thread if isinstance(platform.ops, cpu_ops.CpuOps) else nullcontext
    return ModelRunner(model, step_scope=scope, **options)
