"""What the machine could do at best: measured ceilings, and the least time that a case needs.

The method is the roofline model (Williams, Waterman and Patterson 2009): a phase takes at least
the larger of its bytes over the read bandwidth and its operations over the matmul rate.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from nanovllm.bench.workloads import Case
from nanovllm.models.config import DecoderConfig

READ_BYTES = {"cpu": 256 << 20, "cuda": 4 << 30}  # beyond the caches
MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}


@dataclass(frozen=True, slots=True)
class Ceilings:
    """bytes/s of reading memory, operations/s of matrix products in the model's dtype."""

    read: float
    matmul: float


@dataclass(frozen=True, slots=True)
class Work:
    """What a case cannot do without. decode_steps follow one another."""

    prefill_bytes: int
    prefill_ops: int
    decode_bytes: int
    decode_ops: int

    def seconds(self, ceilings: Ceilings) -> float:
        prefill = max(self.prefill_bytes / ceilings.read, self.prefill_ops / ceilings.matmul)
        return prefill + max(self.decode_bytes / ceilings.read, self.decode_ops / ceilings.matmul)


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """A few seconds; the best of several runs."""
    return Ceilings(_read_rate(device), _matmul_rate(device, dtype))


def _read_rate(device: torch.device) -> float:
    """The faster of a sum and a matrix-vector product over memory that no cache holds."""
    num_bytes = READ_BYTES[device.type]
    data = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    rows = data.view(-1, 8192)
    vector = torch.ones(8192, dtype=torch.float32, device=device)
    return num_bytes / min(_best(data.sum, device), _best(lambda: torch.mv(rows, vector), device))


def _matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    n = MATMUL_SIZE[device.type]
    x = torch.randn(n, n, device=device).to(dtype)
    weight = torch.randn(n, n, device=device).to(dtype)
    return 2 * n**3 / _best(lambda: F.linear(x, weight), device)


def _best(work: Callable[[], object], device: torch.device, repeats: int = 8) -> float:
    """Seconds of the fastest run after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return min(times[1:])


def layer_parameters(model: DecoderConfig) -> int:
    """Weights that every token is multiplied with, the output projection excepted."""
    q_and_o = 2 * model.num_heads * model.head_dim
    k_and_v = 2 * model.num_kv_heads * model.head_dim
    per_layer = model.hidden_size * (q_and_o + k_and_v + 3 * model.intermediate_size)
    return model.num_layers * per_layer


def work_of(
    case: Case,
    model: DecoderConfig,
    max_num_seqs: int,
    *,
    weight_bytes: int,
    cache_bytes: int,
    prefix_caching: bool = True,
) -> Work:
    """Bytes and operations of a case with continuous batching and a prefix cache, perfect or none.

    weight_bytes and cache_bytes are those of one number, in the weights and in the KV cache.
    Weights are read once per decode step and once for the prompts; keys and values once for each
    token that is generated. Windows of sliding attention are ignored.
    """
    layers, head = layer_parameters(model), model.hidden_size * model.vocab_size
    kv_bytes = 2 * model.num_layers * model.num_kv_heads * model.head_dim * cache_bytes
    attention_ops = 4 * model.num_layers * model.num_heads * model.head_dim  # a token of context
    prefix, sharers = case.shared_prefix if prefix_caching else 0, len(case.requests) - 1
    num_prompt = case.num_prompt_tokens - prefix * sharers
    squares = sum(len(r.prompt) ** 2 for r in case.requests) - prefix**2 * sharers
    contexts = sum(
        (r.max_tokens - 1) * len(r.prompt) + r.max_tokens * (r.max_tokens - 1) // 2
        for r in case.requests
    )
    num_decoded = case.num_output_tokens - len(case.requests)
    longest = max(request.max_tokens for request in case.requests) - 1
    steps = max(longest, -(-num_decoded // max_num_seqs))
    return Work(
        prefill_bytes=(layers + head) * weight_bytes,
        prefill_ops=2 * layers * num_prompt
        + 2 * head * len(case.requests)
        + attention_ops * squares // 2,
        decode_bytes=(layers + head) * weight_bytes * steps + kv_bytes * contexts,
        decode_ops=2 * (layers + head) * num_decoded + attention_ops * contexts,
    )
