"""Writes grafana-dashboard.json, next to it, from the list of panels below.

    python deploy/make_dashboard.py

Every metric that a panel names is one that the server exports: a test compares them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

OUTPUT = Path(__file__).with_name("grafana-dashboard.json")
RATE = "[$__rate_interval]"
WIDTH, HEIGHT, COLUMNS = 8, 7, 3


def rate(name: str) -> str:
    return f"sum(rate(nanovllm:{name}{RATE}))"


def quantiles(name: str) -> dict[str, str]:
    """The median, 90th and 99th percentile of a histogram."""
    return {
        f"p{q}": f"histogram_quantile(0.{q}, sum by (le) (rate(nanovllm:{name}_bucket{RATE})))"
        for q in (50, 90, 99)
    }


# title, unit in Grafana's names, {legend: expression}
PANELS: list[tuple[str, str, dict[str, str]]] = [
    (
        "Sequences",
        "short",
        {
            "running": "sum(nanovllm:num_requests_running)",
            "waiting": "sum(nanovllm:num_requests_waiting)",
        },
    ),
    (
        "Tokens a second",
        "short",
        {"generated": rate("generation_tokens_total"), "prompt": rate("prompt_tokens_total")},
    ),
    ("KV cache in use", "percentunit", {"used": "max(nanovllm:kv_cache_usage_perc)"}),
    ("Time to first token", "s", quantiles("time_to_first_token_seconds")),
    ("Time between tokens", "s", quantiles("inter_token_latency_seconds")),
    ("Whole request", "s", quantiles("e2e_request_latency_seconds")),
    ("Time in the queue", "s", quantiles("request_queue_time_seconds")),
    ("Prefill", "s", quantiles("request_prefill_time_seconds")),
    ("Decode", "s", quantiles("request_decode_time_seconds")),
    (
        "Prefix cache hits",
        "percentunit",
        {"hits": f"{rate('prefix_cache_hits_total')} / {rate('prefix_cache_queries_total')}"},
    ),
    (
        "Ended sequences a second",
        "short",
        {
            "{{finished_reason}}": "sum by (finished_reason) "
            f"(rate(nanovllm:request_success_total{RATE}))"
        },
    ),
    (
        "Refused requests and preemptions a second",
        "short",
        {
            "{{reason}}": f"sum by (reason) (rate(nanovllm:admission_rejections_total{RATE}))",
            "preempted": rate("num_preemptions_total"),
        },
    ),
    ("Prompt tokens a request", "short", quantiles("request_prompt_tokens")),
    ("Generated tokens a request", "short", quantiles("request_generation_tokens")),
    ("Tokens a step", "short", quantiles("iteration_tokens_total")),
]


def panel(index: int, title: str, unit: str, targets: dict[str, str]) -> dict[str, Any]:
    return {
        "id": index + 1,
        "type": "timeseries",
        "title": title,
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "gridPos": {
            "x": WIDTH * (index % COLUMNS),
            "y": HEIGHT * (index // COLUMNS),
            "w": WIDTH,
            "h": HEIGHT,
        },
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + i), "expr": expression, "legendFormat": legend}
            for i, (legend, expression) in enumerate(targets.items())
        ],
    }


def dashboard() -> dict[str, Any]:
    return {
        "uid": "nanovllm",
        "title": "nanovllm",
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {
            "list": [{"name": "datasource", "type": "datasource", "query": "prometheus"}]
        },
        "panels": [panel(index, *entry) for index, entry in enumerate(PANELS)],
    }


def render() -> str:
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    OUTPUT.write_text(render(), encoding="utf-8")
