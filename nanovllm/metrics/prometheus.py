"""Metrics for Prometheus, under vLLM's names with our prefix, so that its dashboards port.

Names, types and units: https://docs.vllm.ai/en/stable/usage/metrics.html. `prefix="vllm"` makes
such dashboards work unchanged.
"""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from nanovllm.outputs import RequestMetrics
from nanovllm.trace.events import Event, SequenceAdmitted, SequencePreempted, StepPlanned

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
TOKENS = (1, 4, 16, 64, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)

GAUGES = {
    "num_requests_running": "Sequences in the running batch.",
    "num_requests_waiting": "Sequences waiting to be scheduled.",
    "kv_cache_usage_perc": "Used share of the KV blocks; 1 is full.",
    "engine_up": "1 while the engine answers.",
}
COUNTERS = {
    "prompt_tokens": "Prompt tokens of requests that got their first token.",
    "generation_tokens": "Generated tokens.",
    "prompt_tokens_cached": "Prompt tokens whose KV came from the prefix cache.",
    "prefix_cache_queries": "Tokens looked up in the prefix cache.",
    "prefix_cache_hits": "Tokens found in the prefix cache.",
    "num_preemptions": "Sequences that had to give back their KV blocks.",
}
HISTOGRAMS = {
    "time_to_first_token_seconds": ("From arrival to the first token.", SECONDS),
    "inter_token_latency_seconds": ("Between two tokens of a sequence.", SECONDS),
    "e2e_request_latency_seconds": ("From arrival to the last token.", SECONDS),
    "request_queue_time_seconds": ("From arrival to the first step.", SECONDS),
    "request_prefill_time_seconds": ("From the first step to the first token.", SECONDS),
    "request_decode_time_seconds": ("From the first token to the last.", SECONDS),
    "request_prompt_tokens": ("Prompt tokens a request.", TOKENS),
    "request_generation_tokens": ("Generated tokens a request.", TOKENS),
    "iteration_tokens_total": ("Tokens computed in a step.", TOKENS),
}


class PrometheusMetrics:
    """A ServerMetrics with a registry of its own: several servers fit in one process."""

    def __init__(self, model_name: str, prefix: str = "nanovllm") -> None:
        self._registry = CollectorRegistry()
        self._num_blocks = 0
        self._totals = {"prompt_tokens": 0, "generation_tokens": 0, "cached_tokens": 0}
        labels = ("model_name",)

        def make(kind: Any, name: str, text: str, *more: str, **options: Any) -> Any:
            metric = kind(
                f"{prefix}:{name}", text, labels + more, registry=self._registry, **options
            )
            return metric if more else metric.labels(model_name)

        self._gauges = {name: make(Gauge, name, text) for name, text in GAUGES.items()}
        self._counters = {name: make(Counter, name, text) for name, text in COUNTERS.items()}
        self._histograms = {
            name: make(Histogram, name, text, buckets=buckets)
            for name, (text, buckets) in HISTOGRAMS.items()
        }
        success = make(Counter, "request_success", "Ended sequences.", "finished_reason")
        self._success = lambda reason: success.labels(model_name, reason)
        rejections = make(Counter, "admission_rejections", "Refused requests.", "reason")
        self._rejections = lambda reason: rejections.labels(model_name, reason)
        for reason in ("stop", "length", "abort", "error"):
            self._success(reason)

    def emit(self, event: Event) -> None:
        if isinstance(event, StepPlanned):
            self._histograms["iteration_tokens_total"].observe(event.num_tokens)
        elif isinstance(event, SequenceAdmitted):
            self._counters["prefix_cache_queries"].inc(event.num_tokens)
            self._counters["prefix_cache_hits"].inc(event.num_cached_tokens)
        elif isinstance(event, SequencePreempted):
            self._counters["num_preemptions"].inc()

    def engine_ready(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self.engine_up(True)

    def engine_up(self, up: bool) -> None:
        self._gauges["engine_up"].set(int(up))

    def load(self, num_running: int, num_waiting: int, num_free_blocks: int) -> None:
        self._gauges["num_requests_running"].set(num_running)
        self._gauges["num_requests_waiting"].set(num_waiting)
        if self._num_blocks:
            used = self._num_blocks - num_free_blocks
            self._gauges["kv_cache_usage_perc"].set(used / self._num_blocks)

    def prompt_computed(self, num_tokens: int, num_cached: int) -> None:
        self._counters["prompt_tokens"].inc(num_tokens)
        self._counters["prompt_tokens_cached"].inc(num_cached)
        self._totals["prompt_tokens"] += num_tokens
        self._totals["cached_tokens"] += num_cached

    def tokens(self, count: int) -> None:
        self._counters["generation_tokens"].inc(count)
        self._totals["generation_tokens"] += count

    def inter_token_latency(self, seconds: float) -> None:
        self._histograms["inter_token_latency_seconds"].observe(seconds)

    def finished(self, reason: str, metrics: RequestMetrics) -> None:
        self._success(reason).inc()
        if not metrics.num_generated_tokens:
            return
        first = metrics.time_to_first_token
        observed = {
            "time_to_first_token_seconds": first,
            "e2e_request_latency_seconds": metrics.total_time,
            "request_queue_time_seconds": metrics.queue_time,
            "request_prefill_time_seconds": first - metrics.queue_time,
            "request_decode_time_seconds": metrics.total_time - first,
            "request_prompt_tokens": metrics.num_prompt_tokens,
            "request_generation_tokens": metrics.num_generated_tokens,
        }
        for name, value in observed.items():
            self._histograms[name].observe(max(value, 0))

    def rejected(self, reason: str) -> None:
        self._rejections(reason).inc()

    def totals(self) -> dict[str, int]:
        """Tokens since the start, for whoever does not scrape."""
        return dict(self._totals)

    def render(self) -> bytes:
        """The text format that Prometheus scrapes."""
        return generate_latest(self._registry)
