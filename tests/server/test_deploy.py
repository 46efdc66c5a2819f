"""What is shipped for operators names only metrics that the server exports."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from nanovllm.metrics.prometheus import PrometheusMetrics

DEPLOY = Path(__file__).parents[2] / "deploy"


def exported(prefix: str = "nanovllm") -> set[str]:
    metrics = PrometheusMetrics("m", prefix)
    metrics.rejected("queue_full")
    lines = metrics.render().decode().splitlines()
    return {re.split(r"[{ ]", line)[0] for line in lines if not line.startswith("#")}


def named(text: str) -> set[str]:
    return set(re.findall(r"nanovllm:\w+", text))


def test_dashboard_is_made_from_its_panels_and_names_what_exists() -> None:
    spec = importlib.util.spec_from_file_location("make_dashboard", DEPLOY / "make_dashboard.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = (DEPLOY / "grafana-dashboard.json").read_text(encoding="utf-8")
    assert text == module.render(), "run deploy/make_dashboard.py"
    found = named(text)
    assert len(found) > 15
    assert found <= exported()
    places = [tuple(panel["gridPos"].values()) for panel in json.loads(text)["panels"]]
    assert len(set(places)) == len(places)


def test_alerts_name_what_exists() -> None:
    found = named((DEPLOY / "alerts.yml").read_text(encoding="utf-8"))
    assert len(found) >= 6
    assert found <= exported()


def test_another_prefix_suits_other_dashboards() -> None:
    assert {name.replace("vllm:", "nanovllm:", 1) for name in exported("vllm")} == exported()


def test_alerts_fire() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("there is no promtool")
    done = subprocess.run(
        [promtool, "test", "rules", "alerts_test.yml"], cwd=DEPLOY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
