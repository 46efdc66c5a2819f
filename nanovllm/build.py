"""The composition root: puts an engine together from concrete classes.

`platforms.py` chooses what computes; here the model is loaded, and the KV cache and a step's limits
are sized to what is left.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from nanovllm.config import EngineConfig
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.core import EngineCore
from nanovllm.engine.scheduler import Scheduler
from nanovllm.errors import OutOfMemoryError
from nanovllm.executor.inline import InlineExecutor
from nanovllm.grammar.compiler import GrammarCompiler
from nanovllm.kernels import cpu_ops
from nanovllm.model_files import ModelFiles, find_model
from nanovllm.models import registry
from nanovllm.models.config import DecoderConfig
from nanovllm.models.decoder import Decoder
from nanovllm.platforms import Choice, Platform, choose_platform
from nanovllm.runner.cpu_forward import CpuForward
from nanovllm.runner.loader import fill_dummy_weights, load_weights
from nanovllm.runner.memory import (
    check_context,
    check_weights_fit,
    fit_cache,
    free_memory,
)
from nanovllm.runner.model_runner import ModelRunner, by_operators
from nanovllm.runner.sampler import BadWords
from nanovllm.text.chat import ChatTemplate
from nanovllm.text.tokenizer import Tokenizer
from nanovllm.trace.events import Tracer
from nanovllm.trace.startup import StartUp, line_of

logger = logging.getLogger("nanovllm")

DEFAULT_BATCHED_TOKENS = {"cpu": 512, "cuda": 8192}
ONE_STEP_AHEAD = 2  # plans in flight: one runs, one waits for it


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What building an engine found out. notes: one line for each limit that had to give way."""

    model: str
    device: str
    dtype: str
    kv_cache_dtype: str
    choices: dict[str, Choice]
    num_blocks: int
    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    vocab_size: int
    load_seconds: float
    startup: dict[str, float]  # seconds of each part, from the start of the process
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Limits:
    """What fits. notes: one line for each limit that had to give way."""

    num_blocks: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
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
    start = StartUp()
    started = time.monotonic()
    files = find_model(config.model)
    decoder = registry.read_config(files.config)
    check_context(config, decoder)
    eos_token_ids = files.eos_token_ids()
    if unusable := files.unusable_eos_token_ids():
        logger.warning(
            "eos_token_id %s of the model's files is beyond its vocabulary of %d tokens: no text "
            "ends by it",
            *(", ".join(map(str, unusable)), decoder.vocab_size),
        )
    tokenizer = None if config.skip_tokenizer_init else files.tokenizer()
    start.lap("tokenizer")
    platform = choose_platform(config, decoder, files.config)
    ready = _start_compiling(config, decoder, platform)
    start.lap("device")
    model = _load(config, decoder, platform, files.directory)
    start.lap("weights")
    limits = _fit(config, decoder, platform)
    for note in limits.notes:
        logger.warning(note)
    model.finish_loading(platform.device, limits.max_model_len)
    ready()
    start.lap("kernels")
    compiler = None
    if tokenizer is not None:
        compiler = GrammarCompiler(tokenizer, decoder.vocab_size, eos_token_ids)
    options: dict[str, Any] = {
        "stop_ids": eos_token_ids,
        "bad_words": BadWords(tokenizer.spellings if tokenizer else None),
        "constraints": compiler,
    }
    runner = _runner(config, model, platform, limits, options)
    core = EngineCore(
        Scheduler(
            BlockManager(limits.num_blocks, platform.block_size, config.enable_prefix_caching),
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            max_model_len=limits.max_model_len,
            eos_token_ids=frozenset(eos_token_ids),
            tracer=tracer,
        ),
        InlineExecutor(runner, limits.num_blocks),
        vocab_size=decoder.vocab_size,
        depth=ONE_STEP_AHEAD if config.async_scheduling else 1,
        seed=config.seed,
        clock=time.monotonic,
        check_structure=compiler,
    )
    start.lap("KV cache")
    logger.info(line_of(start.seconds))
    info = EngineInfo(
        model=config.model,
        device=str(platform.device),
        dtype=str(platform.dtype).removeprefix("torch."),
        kv_cache_dtype=str(platform.cache_dtype).removeprefix("torch."),
        choices=platform.choices,
        block_size=platform.block_size,
        vocab_size=decoder.vocab_size,
        load_seconds=time.monotonic() - started,
        startup=start.seconds,
        **asdict(limits),
    )
    template = files.chat_template(tokenizer) if tokenizer else ChatTemplate(None, {})
    return Engine(core, tokenizer, template, files, info)


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
    config: EngineConfig, decoder: DecoderConfig, platform: Platform
) -> Callable[[], None]:
    """Starts what can run while the weights are read; the result waits for it."""
    if not platform.uses_triton:
        return lambda: None
    from nanovllm.runner.gpu_warmup import KernelWarmUp  # needs triton

    return KernelWarmUp(
        decoder,
        dtype=platform.dtype,
        cache_dtype=platform.cache_dtype,
        device=platform.device,
        block_size=platform.block_size,
        max_model_len=config.max_model_len or decoder.max_position,
        batch_invariant=config.batch_invariant,
    ).wait


def _fit(config: EngineConfig, decoder: DecoderConfig, platform: Platform) -> _Limits:
    """The KV cache that memory has room for, and the steps that make sense with it."""
    cache = fit_cache(
        config,
        decoder,
        block_size=platform.block_size,
        dtype=platform.cache_dtype,
        free_bytes=free_memory(platform.device, config.gpu_memory_utilization),
        on_cpu=platform.device.type == "cpu",
    )
    slow = platform.choices["ops"].reason
    notes = [f"plain torch operators, slower: {slow}"] if slow else []
    notes += cache.notes
    num_tokens = config.max_num_batched_tokens or DEFAULT_BATCHED_TOKENS[platform.device.type]
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
    return _Limits(cache.num_blocks, cache.max_model_len, num_seqs, num_tokens, tuple(notes))


def _runner(
    config: EngineConfig,
    model: Decoder,
    platform: Platform,
    limits: _Limits,
    options: dict[str, Any],
) -> ModelRunner:
    options |= {
        "device": platform.device,
        "dtype": platform.cache_dtype,
        "num_blocks": limits.num_blocks,
        "block_size": platform.block_size,
        "max_num_seqs": limits.max_num_seqs,
        "max_model_len": limits.max_model_len,
    }
    try:
        if not platform.uses_triton:
            scope = cpu_ops.one_torch_thread if platform.uses_cpu_kernels else nullcontext
            forward = CpuForward if CpuForward.fits(model) else by_operators
            return ModelRunner(model, step_scope=scope, make_forward=forward, **options)
        from nanovllm.runner.gpu_runner import GpuModelRunner  # needs triton

        return GpuModelRunner(
            model,
            use_graphs=not config.enforce_eager,
            max_tokens=limits.max_num_batched_tokens,
            batch_invariant=config.batch_invariant,
            **options,
        )
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(
            f"a KV cache of {limits.num_blocks} blocks and {limits.max_num_seqs} sequences does "
            f"not fit on {platform.device} after all: {str(error).splitlines()[0]}; a lower "
            "gpu_memory_utilization or max_num_seqs would help"
        ) from None
