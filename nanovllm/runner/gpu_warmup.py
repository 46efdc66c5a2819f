"""Compiles the kernels of the first steps in parallel, while the weights are still being read.

Each job launches one Triton kernel on a few made-up rows, or loads one in CUDA C++, in the variant
that the model will use. What was compiled is kept on disk: all but the first start find it there.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import zip_longest
from threading import Thread

import torch
from torch import Tensor

from nanovllm.kernels import cache
from nanovllm.kernels.cuda import few, many
from nanovllm.kernels.gpu import attention, linear, prepare, rowwise, sampling
from nanovllm.models.config import DecoderConfig
from nanovllm.runner.product_choice import ProductChoice, products_of

NUM_THREADS = 8
NUM_LATER_THREADS = 3  # beside the engine's own work
ROWS = 64  # of made-up weights: divisible by 16, as real ones are


class _Later:
    """Compiles in the background; a process that ends waits for the kernel in hand alone."""

    def __init__(self, jobs: list[Callable[[], object]]) -> None:
        self._jobs, self._stopped = iter(jobs), False
        self._threads = [Thread(target=self._run, daemon=True) for _ in range(NUM_LATER_THREADS)]
        atexit.register(self._stop)  # the compiler must not be at work while it is unloaded
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        for job in self._jobs:
            if self._stopped:
                return
            with suppress(Exception):  # raised again, and told, where the kernel is needed
                job()

    def _stop(self) -> None:
        self._stopped = True
        for thread in self._threads:
            thread.join()


class KernelWarmUp:
    """Starts at once; `wait` raises what a job raised."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        dtype: torch.dtype,
        cache_dtype: torch.dtype,
        device: torch.device,
        block_size: int,
        max_model_len: int,
        batch_invariant: bool,
    ) -> None:
        # With its number, as tensors have it: loaded kernels are kept by device.
        index = torch.cuda.current_device() if device.index is None else device.index
        self._c, self._dtype, self._device = config, dtype, torch.device("cuda", index)
        self._cache_dtype = cache_dtype
        self._block_size, self._max_model_len = block_size, max_model_len
        # The products of `batch_invariant` are compiled when they are first met.
        own = ProductChoice.of(config, dtype, self._device)
        self._choice = ProductChoice() if batch_invariant else own
        self._pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="nanovllm-compile")
        self._pdl = torch.cuda.get_device_capability(self._device) >= (9, 0)
        self._jobs: list[Future[None]] = [self._pool.submit(self._run, job) for job in self._all()]

    def wait(self) -> None:
        for job in self._jobs:
            job.result()
        self._pool.shutdown()
        torch.cuda.synchronize(self._device)
        _Later(self._later())

    def _run(self, job: Callable[[], None]) -> None:
        with torch.inference_mode(), torch.cuda.device(self._device):
            job()

    def _all(self) -> Iterator[Callable[[], None]]:
        """The slowest to compile come first."""
        yield self._decode
        yield self._choose
        for shape in products_of(self._c):
            if self._choice.few(1) is linear.linear:
                yield partial(self._linear, shape)
            if self._choice.max_few:
                yield partial(few.prepare, shape, self._device)
        yield self._rope
        yield self._rowwise
        yield self._prepare

    def _later(self) -> list[Callable[[], object]]:
        """What larger steps will use; who needs one before it is ready waits for it alone."""
        if cache.writable_directory() is None:  # nothing would be kept
            return []
        *products, head = products_of(self._c)
        most, device = self._choice.max_some, self._device
        jobs = [list(many.compile_for(shape, most, device)) for shape in products]
        jobs.append(list(many.compile_for(head, min(most, many.MAX_HEAD_ROWS), device)))
        return [job for step in zip_longest(*jobs) for job in step if job is not None]

    def _new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.zeros(shape, dtype=dtype or self._dtype, device=self._device)

    def _linear(self, shape: few.Shape) -> None:
        out = self._new(1, ROWS)
        linear.linear(
            self._new(1, shape.k),
            self._new(2 * ROWS if shape.gated else ROWS, shape.k),
            out,
            norm=self._new(shape.k) if shape.norm else None,
            eps=1e-6,
            bias=self._new(ROWS) if shape.bias else None,
            gated=shape.gated,
            residual=out if shape.residual else None,
            pdl=self._pdl,
        )

    def _cache(self) -> Tensor:
        c = self._c
        shape = (1, 2, c.num_kv_heads, self._block_size, c.head_dim)
        return torch.zeros(shape, dtype=self._cache_dtype, device=self._device)

    def _heads(self, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
        c = self._c
        qkv = self._new(num_rows, c.num_heads + 2 * c.num_kv_heads, c.head_dim)
        q, k, v = qkv.split((c.num_heads, c.num_kv_heads, c.num_kv_heads), 1)
        return q, k, v

    def _norms(self) -> tuple[Tensor, Tensor] | None:
        size = self._c.head_dim
        return (self._new(size), self._new(size)) if self._c.qk_norm else None

    def _decode(self) -> None:
        """With context 0 the kernel returns at once: compiling is what counts."""
        c = self._c
        q, k, v = self._heads(1)
        angles = self._new(1, c.head_dim, dtype=torch.float32)
        new = attention.FusedInputs(k, v, self._norms(), angles, c.rms_norm_eps)
        splits = attention.num_splits(1, c.num_kv_heads, self._max_model_len)
        workspace = attention.DecodeWorkspace(c.num_heads, c.head_dim, self._device)
        ints = self._new(2, dtype=torch.int32)
        attention.decode(
            q, self._cache(), ints, ints[:1], ints.view(1, 2), 1.0, c.sliding_windows[0],
            workspace, splits, torch.empty_like(q), new=new, pdl=self._pdl,
        )  # fmt: skip

    def _rope(self) -> None:
        q, k, v = self._heads(2)
        longs = self._new(2, dtype=torch.int64)
        angles = self._new(1, self._c.head_dim, dtype=torch.float32)
        rowwise.rope_store(
            q, k, v, self._norms(), self._c.rms_norm_eps, angles, longs, self._cache(), longs
        )

    def _rowwise(self) -> None:
        c = self._c
        rowwise.rms_norm(self._new(2, c.hidden_size), self._new(c.hidden_size), 1e-6)
        rowwise.silu_mul(self._new(2, 2 * c.intermediate_size))

    def _choose(self) -> None:
        """As many tiles as the vocabulary has, over the same line of logits."""
        c = self._c
        ints = self._new(16, dtype=torch.int32)
        floats, longs = ints.view(torch.float32), self._new(2, dtype=torch.int64)
        params = sampling.RowParams(floats, longs, ints, ints, floats, floats)
        workspace = sampling.Workspace(1, c.vocab_size, self._device)
        sampling.choose(
            self._new(1, c.vocab_size), params, workspace, longs[:1], longs[:1],
            restricted=False, scatter=(self._new(1, self._max_model_len, dtype=torch.int32), ints),
        )  # fmt: skip

    def _prepare(self) -> None:
        ints, longs = self._new(16, dtype=torch.int32), self._new(2, dtype=torch.int64)
        tokens = self._new(1, self._max_model_len, dtype=torch.int32)
        prepare.gather_tokens(tokens, ints[:2], longs, longs - 1, longs)
        prepare.prepare(
            tokens, ints[:1], ints[:1], ints[:1], ints, longs, ints.view(1, -1), self._block_size
        )
