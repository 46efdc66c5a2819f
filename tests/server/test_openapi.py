"""The OpenAPI document is true: what it promises is what the server answers."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from nanovllm import InvalidRequestError, SamplingParams
from nanovllm.server.endpoints import ENDPOINTS
from nanovllm.server.openapi import document

from .live_server import Live, request

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
    "allow_header_conformance",
)
NUM_CASES = 2000


def test_it_lists_every_endpoint(live: Live) -> None:
    status, headers, found = request(live.port, "GET", "/openapi.json")
    assert (status, headers["content-type"]) == (200, "application/json")
    assert found["openapi"].startswith("3.1")
    listed = {
        (method.upper(), path)
        for path, operations in found["paths"].items()
        for method in operations
    }
    assert listed == {(one.method, one.path.replace(":path", "")) for one in ENDPOINTS}
    ids = [
        op["operationId"] for operations in found["paths"].values() for op in operations.values()
    ]
    assert len(set(ids)) == len(ids)
    text = msgspec.json.encode(found).decode()
    named = set(re.findall(r'"#/components/schemas/([\w.]+)"', text))
    assert not any("." in name for name in named), "two records have one name"
    assert named == set(found["components"]["schemas"])


def test_it_says_who_needs_the_key() -> None:
    for keyed in (False, True):
        paths = document(ENDPOINTS, keyed=keyed)["paths"]
        asks = {
            path
            for path, operations in paths.items()
            for op in operations.values()
            if op["security"]
        }
        assert asks == (set(paths) - {"/", "/health"} if keyed else set())
        assert "401" in paths["/load"]["get"]["responses"]
        assert "401" not in paths["/health"]["get"]["responses"]


def _ranges() -> dict[str, dict[str, float]]:
    """Of the sampling parameters, the ranges that the document tells."""
    found = {}
    properties = document(ENDPOINTS, keyed=False)["components"]["schemas"]["CompletionRequest"]
    for name, schema in properties["properties"].items():
        for kind in schema.get("anyOf", [schema]):
            limits = {k: v for k, v in kind.items() if "imum" in k.lower()}
            if limits and hasattr(SamplingParams, name):
                found[name] = limits
    return found


def test_ranges_are_those_that_are_enforced() -> None:
    ranges = _ranges()
    assert len(ranges) >= 11
    for name, limits in ranges.items():
        step: Any = (
            1 if name in ("top_k", "seed", "n", "max_tokens", "min_tokens", "logprobs") else 1e-9
        )
        for key, good, bad in (
            ("minimum", 0, -step),
            ("maximum", 0, step),
            ("exclusiveMinimum", step, 0),
        ):
            if key in limits:
                more = {"max_tokens": None} if name == "min_tokens" else {}
                SamplingParams(**{name: limits[key] + good}, **more)
                with pytest.raises(InvalidRequestError):
                    SamplingParams(**{name: limits[key] + bad}, **more)


def test_thousands_of_requests_find_no_lie(start: Any, tmp_path: Path) -> None:
    """Schemathesis: each operation at the edges of its schema, beyond them, and at random."""
    live = start({"any_model": True})
    done = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{live.url}/openapi.json"),
            *("--checks", ",".join(CHECKS), "--max-examples", "20", "--seed", "1"),
            *("--continue-on-failure", "--no-shrink", "--report", "ndjson"),
            *("--report-ndjson-path", str(tmp_path / "cases.ndjson"), "--no-color"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    cases = re.search(r"(\d+) generated, (\d+) passed", said)
    assert cases is not None, said
    assert cases[1] == cases[2]
    assert int(cases[1]) >= NUM_CASES
    seen = (tmp_path / "cases.ndjson").read_text(encoding="utf-8")
    statuses = re.findall(r'"status_code":(\d+)', seen)
    assert statuses.count("200") > 300, "most requests were refused: little was tried"
    assert "text/event-stream" in seen
    live.wait_until_idle()
