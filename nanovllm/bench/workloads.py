"""What is measured: lists of requests, made from fixed seeds. Knows no engine and no torch.

A workload is one or more cases; a case is one `generate` call. Token ids are random, so nothing
is shared between prompts but what a workload shares on purpose.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

VOCAB = 10000  # ids are drawn below this, and taken modulo the model's vocabulary


@dataclass(frozen=True, slots=True)
class Request:
    """max_tokens are generated exactly: end tokens are ignored."""

    prompt: tuple[int, ...]
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Case:
    """shared_prefix is the number of leading tokens that all prompts have in common.

    metric says what the case is about: output tokens/s, prompt tokens/s, or the time to the
    first token.
    """

    name: str
    requests: tuple[Request, ...]
    temperature: float = 0.0
    shared_prefix: int = 0
    metric: str = "output"

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(request.prompt) for request in self.requests)

    @property
    def num_output_tokens(self) -> int:
        return sum(request.max_tokens for request in self.requests)

    def shifted(self, by: int, vocab_size: int) -> Case:
        """The same lengths with other token ids: no prefix cache helps a repeat."""
        limit = min(VOCAB, vocab_size)

        def shift(request: Request) -> Request:
            return replace(request, prompt=tuple((t + by) % limit for t in request.prompt))

        return replace(self, requests=tuple(shift(request) for request in self.requests))

    def shortened(self, scale: float) -> Case:
        """Prompts and outputs times scale, at least one token each."""

        shared = round(self.shared_prefix * scale)

        def cut(request: Request) -> Request:
            own = request.prompt[self.shared_prefix :]
            prompt = request.prompt[:shared] + own[: max(1, round(len(own) * scale))]
            return Request(prompt, max(1, round(request.max_tokens * scale)))

        requests = tuple(cut(request) for request in self.requests)
        return replace(self, requests=requests, shared_prefix=shared)


def quick(num_requests: int | None = None) -> list[Case]:
    """8 prompts of 32-128, 64 out: seconds on two CPU cores with the model in the package."""
    rng = random.Random(0)
    count = 8 if num_requests is None else num_requests
    requests = tuple(Request(_ids(rng, rng.randint(32, 128)), 64) for _ in range(count))
    return [Case("quick", requests)]


def nano(num_requests: int | None = None) -> list[Case]:
    """nano-vllm's benchmark: 256 prompts of 100-1024 ids, 100-1024 out, temperature 0.6."""
    rng = random.Random(0)
    count = 256 if num_requests is None else num_requests
    prompts = [
        tuple(rng.randint(0, 10000) for _ in range(rng.randint(100, 1024))) for _ in range(count)
    ]
    requests = tuple(Request(prompt, rng.randint(100, 1024)) for prompt in prompts)
    return [Case("nano", requests, temperature=0.6)]


def batch(num_requests: int | None = None) -> list[Case]:
    """128 in, 256 out, for batches of 1 to 256."""
    sizes = [n for n in (1, 8, 32, 64, 128, 256) if num_requests is None or n <= num_requests]
    return [Case(f"batch {n}", _uniform(n, 128, 256)) for n in sizes]


def prefill(num_requests: int | None = None) -> list[Case]:
    """32 prompts of 2048, one token each."""
    count = 32 if num_requests is None else num_requests
    return [Case(f"prefill {count}", _uniform(count, 2048, 1), metric="prompt")]


def first_token(num_requests: int | None = None) -> list[Case]:
    """One prompt of 1000: the time to its first token."""
    return [Case("first token", _uniform(1, 1000, 1), metric="first token")]


def smollm(num_requests: int | None = None, shared_prefix: int = 0) -> list[Case]:
    """32 prompts of 64-512, 32-256 out; with a shared prefix before each if asked for."""
    rng = random.Random(0)
    count = 32 if num_requests is None else num_requests
    prefix = _ids(rng, shared_prefix)
    lengths = [(rng.randint(64, 512), rng.randint(32, 256)) for _ in range(count)]
    requests = tuple(Request(prefix + _ids(rng, n), out) for n, out in lengths)
    name = f"smollm +{shared_prefix} shared" if shared_prefix else "smollm"
    return [Case(name, requests, shared_prefix=shared_prefix)]


WORKLOADS: dict[str, Callable[..., list[Case]]] = {
    "quick": quick,
    "nano": nano,
    "batch": batch,
    "prefill": prefill,
    "first-token": first_token,
    "smollm": smollm,
}


def _uniform(count: int, num_prompt: int, num_output: int) -> tuple[Request, ...]:
    rng = random.Random(0)
    return tuple(Request(_ids(rng, num_prompt), num_output) for _ in range(count))


def _ids(rng: random.Random, count: int) -> tuple[int, ...]:
    return tuple(rng.randrange(VOCAB) for _ in range(count))
