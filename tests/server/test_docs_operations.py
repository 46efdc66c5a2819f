"""The operations guide knows every error, every alert, and only flags and metrics that exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from nanovllm.cli import serve
from nanovllm.cli.flags import Parser
from nanovllm.metrics.prometheus import PrometheusMetrics

from .live_server import Live, request

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
PAGES = [ROOT / "docs" / "server.md", *(ROOT / "docs").glob("operations.md")]
PAGES += sorted((ROOT / "docs" / "clients").glob("*.md"))
Error = tuple[int, str | None]


def raised() -> Iterator[Error]:
    """(status, code) of each error that the server's source constructs."""
    for path in (ROOT / "nanovllm" / "server").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                continue
            if node.func.id == "ApiError" and isinstance(node.args[0], ast.Constant):
                yield from _error(node, node.args[0].value, 99)
            elif node.func.id == "invalid":
                yield from _error(node, 400, 2)


def _error(node: ast.Call, status: int, place: int) -> Iterator[Error]:
    given = [*node.args[place : place + 1], *(k.value for k in node.keywords if k.arg == "code")]
    if not given:
        yield status, None
    elif isinstance(given[0], ast.Constant):
        yield status, given[0].value


def table() -> list[Error]:
    rows = re.findall(r"^\| (\d{3}) \| (null|`\w+`) \| .+ \|$", GUIDE, re.MULTILINE)
    return [(int(status), None if code == "null" else code.strip("`")) for status, code in rows]


def test_every_error_is_in_the_table_and_no_other(live: Live) -> None:
    # Those that the router makes.
    known = set(raised()) | {(404, None), (405, None)}
    assert len(known) > 12
    assert set(table()) == known
    assert len(table()) == len(known)
    assert request(live.port, "GET", "/nowhere")[0] == 404
    assert request(live.port, "DELETE", "/health")[0] == 405


def test_every_alert_is_explained() -> None:
    (group,) = yaml.safe_load((ROOT / "deploy" / "alerts.yml").read_text())["groups"]
    alerts = [rule["alert"] for rule in group["rules"]]
    assert alerts == re.findall(r"^### (Nanovllm\w+)$", GUIDE, re.MULTILINE)
    for alert in alerts:
        section = GUIDE.split(f"### {alert}\n")[1].split("\n#")[0]
        assert "**Do:**" in section, alert


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_flags_exist(page: Path) -> None:
    parser = Parser("nanovllm serve", "")
    serve.add_arguments(parser)
    exist = set(parser._option_string_actions)
    text = page.read_text(encoding="utf-8")
    started = re.findall(r"nanovllm serve[^`\n]*", text)
    ours = {flag for line in started for flag in re.findall(r"(?<= )--[\w-]+", line)}
    inline = set(re.findall(r"`(--[\w-]+)[^`]*`", text))
    # On a client's page other flags are of the commands that stand there.
    theirs = set(re.findall(r"^ {4}.*?(--[\w-]+)", text, re.MULTILINE))
    ours |= inline - theirs if page.parent.name == "clients" else inline
    assert set(ours) <= exist, set(ours) - exist


def test_metrics_exist() -> None:
    metrics = PrometheusMetrics("m")
    metrics.rejected("queue_full")
    lines = metrics.render().decode().splitlines()
    exported = {line.split()[2].removesuffix("_total") for line in lines if line.startswith("# T")}
    exported = {name.removeprefix("nanovllm:") for name in exported}
    kinds = ("num_", "kv_cache_usage", "request_", "time_to", "prefix_cache_", "admission_")
    named = {name for name in re.findall(r"`(\w+)(?:\{[^`]*\})?`", GUIDE) if name.startswith(kinds)}
    assert len(named) >= 9
    assert named <= exported, named - exported


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), link
        if anchor:
            heads = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}
            assert anchor in anchors, link
