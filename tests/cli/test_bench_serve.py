"""`nanovllm bench serve` and `bench report`: traffic, figures, files, pages, a live server."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted_server import Scripted, answer, delta, event, scripted, stream
from server.live_server import Live

from nanovllm.bench import html, serve_report, svg
from nanovllm.bench.load import Measured, Record
from nanovllm.bench.serving import Session, Target
from nanovllm.bench.summary import (
    CURVE,
    Spread,
    curve,
    in_flight,
    parse_targets,
    quantile,
    summarize,
)
from nanovllm.bench.traffic import Load, Measure, Range, Traffic, arrivals, plan

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
MEASURE = Measure(around=10.0, per_word=1.25)
KEY = "a-secret-key"
DONE = b"data: [DONE]\n\n"


@pytest.fixture(scope="module")
def live(tiny: Path) -> Iterator[Live]:
    server = Live(tiny, {"served_model_names": ("tiny",), "api_keys": (KEY,)})
    yield server
    server.close()


# --- traffic ------------------------------------------------------------------------------------


def test_the_same_seed_is_the_same_traffic() -> None:
    traffic = Traffic(Range(20, 60), Range(5, 9), seed=3)
    load = Load("rate", 10)
    first = plan(traffic, load, 50, MEASURE, "mark", 0)
    assert plan(traffic, load, 50, MEASURE, "mark", 0) == first
    assert plan(traffic, load, 50, MEASURE, "mark", 1) != first
    other = plan(Traffic(Range(20, 60), Range(5, 9), seed=4), load, 50, MEASURE, "mark", 0)
    assert other != first
    marked = plan(traffic, load, 50, MEASURE, "other", 0)
    assert [p.text.split(" ", 1)[1] for p in marked] == [p.text.split(" ", 1)[1] for p in first]
    assert {p.max_tokens for p in first} == set(range(5, 10))
    tokens = [10 + 1.25 * (len(p.text.split()) - 1) for p in first]
    assert min(tokens) >= 19
    assert max(tokens) <= 61
    assert len({p.text for p in first}) == 50


def test_a_shared_prefix_is_shared_and_nothing_else() -> None:
    traffic = Traffic(Range(20, 20), Range(5, 5), shared_prefix=100)
    texts = [p.text.split() for p in plan(traffic, Load("rate", 1), 9, MEASURE, "m", 0)]
    assert len({tuple(text[:81]) for text in texts}) == 1
    assert len({tuple(text[81:]) for text in texts}) == 9


def test_arrivals_have_their_rate() -> None:
    rng = random.Random(0)
    constant = arrivals(rng, Load("rate", 4), 5, "constant")
    assert constant == pytest.approx([0, 0.25, 0.5, 0.75, 1.0])
    poisson = arrivals(rng, Load("rate", 4), 4000, "poisson")
    gaps = [b - a for a, b in itertools.pairwise(poisson)]
    assert sum(gaps) / len(gaps) == pytest.approx(0.25, rel=0.05)
    assert sum(gap * gap for gap in gaps) / len(gaps) == pytest.approx(2 / 16, rel=0.15)
    assert arrivals(rng, Load("concurrency", 4), 3, "poisson") == [0, 0, 0]


def test_words_are_measured() -> None:
    measure = Measure.fit((16, 40), (144, 200))
    assert (measure.per_word, measure.around) == (1.25, 20)
    assert measure.num_words(145) == 100
    assert measure.num_words(1) == 1


# --- figures ------------------------------------------------------------------------------------


def records() -> list[Record]:
    """Two good answers, a slow one, and a failure."""
    return [
        Record(0.0, 0.0, 0.1, 0.5, [0.1] * 4, num_prompt=10, num_cached=5, num_output=5),
        Record(0.0, 0.5, 0.7, 1.1, [0.2, 0.2], num_prompt=30, num_output=5),
        Record(1.0, 1.0, 3.0, 4.0, [1.0], num_prompt=20, num_output=2),
        Record(1.0, 1.0, None, 2.0, failure="HTTP 429", message="full"),
    ]


def test_figures() -> None:
    summary = summarize(
        Measured(Load("rate", 2), records(), [0.0, 0.002]), {"ttft": 250.0, "tpot": 150.0}
    )
    assert (summary.num_requests, summary.num_done) == (4, 3)
    assert summary.failures == {"HTTP 429": 1}
    assert summary.seconds == 4.0
    assert summary.request_rate == 0.75
    assert summary.output_rate == 3.0
    assert summary.goodput == 0.5  # the third is late, the fourth failed
    assert summary.cached_share == pytest.approx(5 / 60)
    assert summary.ttft is not None
    assert (summary.ttft.median, summary.ttft.max) == pytest.approx((200, 2000))
    assert summary.tpot is not None
    assert summary.tpot.median == pytest.approx(100)
    assert summary.itl is not None
    assert summary.itl.mean == pytest.approx(1000 * 1.8 / 7)
    assert summary.e2el is not None
    assert summary.e2el.max == pytest.approx(3000)
    assert summary.lag is not None
    assert summary.lag.max == pytest.approx(500)
    assert not summary.keeps_up  # half a second late
    relaxed = summarize(Measured(Load("concurrency", 2), records(), [0.0, 0.002]), {})
    assert relaxed.keeps_up
    assert (relaxed.lag, relaxed.goodput) == (None, None)


def test_all_failed_is_a_result() -> None:
    summary = summarize(Measured(Load("rate", 1), records()[3:], []), {"ttft": 1.0})
    assert (summary.num_done, summary.output_rate, summary.goodput) == (0, 0, 0)
    assert summary.ttft is None


def test_quantiles_and_curves() -> None:
    assert [quantile([1.0, 2.0, 3.0], q) for q in (0, 0.25, 0.5, 1)] == [1, 1.5, 2, 3]
    assert Spread.of([]) is None
    shares = curve([i / 1000 for i in range(1001)])
    assert shares == pytest.approx([1000 * q for q in CURVE])


def test_requests_in_flight() -> None:
    levels = in_flight([(0.0, 2.0), (1.0, 3.0), (2.0, 4.0)])
    assert max(level for _, level in levels) == 2  # an end comes before a start at the same time
    assert levels[-1] == (4.0, 0)


def test_targets() -> None:
    assert parse_targets("ttft:200, tpot:50.5") == {"ttft": 200, "tpot": 50.5}
    for text in ("ttft", "ttft:0", "foo:3", "ttft:200,", "ttft:-1"):
        with pytest.raises(ValueError, match="no target"):
            parse_targets(text)


# --- a live server ------------------------------------------------------------------------------


def bench(cli: Any, *flags: str) -> Any:
    return cli("bench", "serve", *flags)


SMALL = ("--num-requests", "6", "--input-len", "100-140", "--output-len", "4-8", "--warm-up", "2")


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_a_live_server(
    cli: Any, live: Live, tmp_path: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["nanovllm", "bench", "serve", "--api-key", KEY])
    file, page = tmp_path / "out.json", tmp_path / "out.html"
    line = ("--url", live.url, "--api-key", KEY, "--endpoint", endpoint, *SMALL)
    result = bench(
        cli,
        *line,
        "--concurrency",
        "1,3",
        "--goodput",
        "ttft:60000",
        "--json",
        file,
        "--html",
        page,
    )
    assert result.status == 0, result.err
    rates, latencies = result.out.split("\n\n")
    assert [text.split("  ")[0] for text in rates.splitlines()] == ["load", "1 client", "3 clients"]
    words = [text.split()[0] for text in latencies.splitlines()]
    assert words == ["ms", *(name for name in ("TTFT", "ITL", "TPOT", "e2e") for _ in range(2))]
    content = json.loads(file.read_text())
    for point in content["points"]:
        summary, requests = point["summary"], point["requests"]
        assert summary["num_done"] == 6
        assert all(4 <= n <= 8 for n in requests["num_output"])
        assert all(75 <= n <= 170 for n in requests["num_prompt"])
        assert summary["goodput"] == pytest.approx(summary["request_rate"])
        for started, first, ended in zip(
            requests["started"], requests["first"], requests["ended"], strict=True
        ):
            assert started < first <= ended
        assert summary["e2el"]["median"] >= summary["ttft"]["median"]
    assert content["server"]["max_model_len"] == 256
    assert content["command"] == "nanovllm bench serve --api-key ..."
    assert KEY not in file.read_text()  # the key stays out of files
    assert KEY not in page.read_text()
    live.wait_until_idle()


@pytest.mark.parametrize("flag", ["--json", "--html"])
def test_a_full_disk_names_the_file(cli: Any, live: Live, flag: str) -> None:
    line = ("--url", live.url, "--api-key", KEY, *SMALL, "--concurrency", "1", flag, "/dev/full")
    result = bench(cli, *line)
    assert result.status == 1
    assert result.err == "nanovllm: [Errno 28] No space left on device: '/dev/full'\n"
    assert "1 client" in result.out  # what was measured is not lost


def test_a_rate_is_kept(cli: Any, live: Live, tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    line = ("--url", live.url, "--api-key", KEY, *SMALL, "--request-rate", "20", "--json", file)
    assert bench(cli, *line, "--arrival", "constant").status == 0
    (point,) = json.loads(file.read_text())["points"]
    scheduled = point["requests"]["scheduled"]
    assert scheduled == pytest.approx([i / 20 for i in range(6)], abs=1e-5)
    begun = zip(point["requests"]["started"], scheduled, strict=True)
    assert all(started >= at - 0.005 for started, at in begun)
    assert point["summary"]["lag"] is not None


def test_a_shared_prefix_is_cached(cli: Any, live: Live, tmp_path: Path) -> None:
    shares = []
    for prefix in ("0", "100"):
        file = tmp_path / prefix
        line = ("--url", live.url, "--api-key", KEY, "--shared-prefix", prefix, "--json", file)
        assert bench(cli, *line, *SMALL[:2], "--input-len", "60", "--concurrency", "1",
                     "--output-len", "4").status == 0  # fmt: skip
        (point,) = json.loads(file.read_text())["points"]
        shares.append(point["summary"]["cached_share"])
    assert shares[0] < 0.3 < shares[1]


def test_failures_are_counted_by_kind(cli: Any, tmp_path: Path) -> None:
    usage = event({"choices": [], "usage": {"prompt_tokens": 20, "completion_tokens": 2}})
    good = stream(delta("a"), delta("b"), usage, DONE)
    full = answer({"error": {"message": "full"}}, 429)
    script = [good, good, good, full, stream(delta("a"), end=False), full, good]
    with scripted(*script) as server:
        line = ("--url", server.url, "--num-requests", "5", "--warm-up", "0", "--input-len", "20")
        result = bench(
            cli, *line, "--output-len", "2", "--concurrency", "1", "--goodput", "ttft:9999"
        )
    assert result.status == 0
    assert "2 failed (HTTP 429): the server says 429: full" in result.err
    assert "1 failed (cut off)" in result.err
    head, row = (re.split(r"  +", text) for text in result.out.splitlines()[:2])
    shown = dict(zip(head, row, strict=True))
    assert (shown["in"], shown["out"], shown["failed"]) == ("20", "2", "3")


def test_answers_without_text_have_times(cli: Any, tmp_path: Path) -> None:
    empty = event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    with scripted(*[stream(DONE), stream(empty, DONE)] * 2) as server:
        line = ("--url", server.url, "--num-requests", "2", "--warm-up", "0", "--input-len", "20",
                "--output-len", "2", "--concurrency", "1", "--json", tmp_path / "out")  # fmt: skip
        assert bench(cli, *line).status == 0
    (point,) = json.loads((tmp_path / "out").read_text())["points"]
    columns = (point["requests"][name] for name in ("started", "first", "ended"))
    assert all(started < first <= ended for started, first, ended in zip(*columns, strict=True))
    assert point["summary"]["num_done"] == 2


@pytest.mark.parametrize("silent", ["GET", "POST"])
def test_a_server_that_never_answers_is_told(cli: Any, silent: str) -> None:
    ended = threading.Event()

    def respond(method: str, path: str, body: Any) -> Any:
        if method == silent:
            ended.wait(60)
        return answer({"data": [{"id": "m"}]})

    server = Scripted(respond)
    result = bench(cli, "--url", server.url, "--timeout", "0.5")
    ended.set()
    server.close()
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert "no answer within 0.5 s" in result.err


def test_an_own_server_on_the_demo_model(cli: Any, tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    line = ("--model", tiny, "--max-num-seqs", "4", *SMALL, "--concurrency", "2", "--json", file)
    result = bench(cli, *line)
    assert result.status == 0, result.err
    assert json.loads(file.read_text())["points"][0]["summary"]["num_done"] == 6


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children of the end")
def test_a_killed_benchmark_leaves_no_server_behind(tiny: Path) -> None:
    flags = ["--model", str(tiny), "--concurrency", "1", "--num-requests", "100000"]
    flags += ["--input-len", "60", "--output-len", "20"]
    process = subprocess.Popen(
        [sys.executable, "-m", "nanovllm.cli.main", "bench", "serve", *flags]
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not (found := children.read_text().split()):
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(1)
    process.kill()
    process.wait()
    server = Path(f"/proc/{found[0]}/stat")
    with contextlib.suppress(OSError):  # the file goes with the process
        while server.read_text().rsplit(")", 1)[1].split()[0] != "Z":
            time.sleep(0.05)


@pytest.mark.parametrize("delay", [0.0, 6.0])  # while the server starts, while it is measured
def test_a_terminated_benchmark_leaves_no_files(tiny: Path, tmp_path: Path, delay: float) -> None:
    flags = ["--model", str(tiny), "--concurrency", "1", "--num-requests", "100000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "nanovllm.cli.main", "bench", "serve", *flags],
        stderr=subprocess.PIPE, text=True, env=os.environ | {"TMPDIR": str(tmp_path)},
    )  # fmt: skip
    while not any(tmp_path.glob("nanovllm-bench-*/log")):
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(delay)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert ("0 of 1 loads are complete" in err) == (delay > 0)
    assert "Traceback" not in err
    assert not list(tmp_path.glob("nanovllm-bench-*"))


def test_an_interrupt_reports_the_loads_that_are_complete(tmp_path: Path) -> None:
    good = stream(delta("a"), delta("b"), DONE)

    def respond(method: str, path: str, body: Any) -> Any:
        time.sleep(0.05)
        return answer({"data": [{"id": "m"}]}) if method == "GET" else good

    server = Scripted(respond)
    flags = ["--url", server.url, "--concurrency", "1,2", "--num-requests", "8", "--warm-up", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "nanovllm.cli.main", "bench", "serve", *flags,
         "--json", str(tmp_path / "out")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while sum(method == "POST" for method, _, _ in server.requests) < 2 + 8 + 2:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    server.close()
    assert process.returncode == 130
    assert "1 of 2 loads are complete" in err
    assert "Traceback" not in err
    rates = out.split("\n\n")[0].splitlines()
    assert [text.split("  ")[0] for text in rates] == ["load", "1 client"]
    assert len(json.loads((tmp_path / "out").read_text())["points"]) == 1


WRONG = {
    "--request-rate 1 --concurrency 2": "give one",
    "--request-rate 0": "above 0",
    "--concurrency 1,x": "whole numbers",
    "--concurrency 2,2": "twice",
    "--concurrency 2 --arrival constant": "--arrival says nothing",
    "--input-len 9-3": "upwards",
    "--output-len x": "no length",
    "--goodput ttft": "no target",
    "--num-requests 0": "at least 1",
    "--label x": "--json and --html",
    "--api-key x": "give its --url",
    "--url http://127.0.0.1:1 --dtype float32": "--dtype is the server's choice",
    "--url http://127.0.0.1:1": "nothing listens",
    "--model ./nowhere": "no directory ./nowhere",
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_use_is_one_line(cli: Any, line: str) -> None:
    result = bench(cli, *line.split())
    assert result.status == 2
    assert WRONG[line] in result.err
    assert result.err.count("\n") == 1


def test_what_does_not_fit_is_said_before_it_runs(cli: Any, live: Live) -> None:
    line = ("--url", live.url, "--api-key", KEY, "--input-len", "200", "--output-len", "100")
    result = bench(cli, *line)
    assert result.status == 2
    assert "300 tokens do not fit the server's context of 256" in result.err


@pytest.mark.parametrize("flag", ["--json", "--html"])
def test_a_file_that_cannot_be_written_is_told_before_the_run(
    cli: Any, tmp_path: Path, flag: str
) -> None:
    earlier = tmp_path / "earlier"
    earlier.write_text("kept")
    for name in ("none/out", "."):
        line = ("--url", "http://127.0.0.1:9", flag, str(tmp_path / name))
        result = cli("bench", "serve", *line)
        assert result.status == 1
        assert str(tmp_path / name) in result.err
    result = cli("bench", "serve", "--url", "http://127.0.0.1:9", flag, str(earlier))
    assert "127.0.0.1:9" in result.err
    assert earlier.read_text() == "kept"
    assert list(tmp_path.iterdir()) == [earlier]


# --- reports ------------------------------------------------------------------------------------


def content(label: str, *loads: Load) -> dict[str, Any]:
    session = Session("demo", "1", 256, [Measured(load, records(), [0.001]) for load in loads])
    traffic = Traffic(Range(1, 2), Range(3, 4))
    made = serve_report.as_json(
        session, Target("http://h"), traffic, {"ttft": 200.0}, ["bench"], label
    )
    return json.loads(json.dumps(made))  # type: ignore[no-any-return]


def test_runs_are_compared(cli: Any, tmp_path: Path) -> None:
    for name, load in (("a", Load("rate", 2)), ("b", Load("rate", 4))):
        (tmp_path / name).write_text(json.dumps(content(f"run <{name}>", load)))
    files = (tmp_path / "a", tmp_path / "b")
    result = cli("bench", "report", *files, "--html", tmp_path / "page")
    assert result.status == 0
    assert "run <a>" in result.out
    assert "4/s" in result.out
    page = (tmp_path / "page").read_text()
    assert "run &lt;a&gt;" in page
    assert "run <a>" not in page
    assert cli("bench", "report", *files, "--labels", "x").status == 2
    same = cli("bench", "report", files[0], files[0])
    assert "run <a> 1\n" in same.out


def test_files_that_are_no_runs_are_refused(cli: Any, tmp_path: Path) -> None:
    good = content("x", Load("rate", 2))
    del good["points"][0]["summary"]["ttft"]
    for text in ("", "[]", "{}", '{"kind": "nanovllm bench serve", "format": 9}', json.dumps(good)):
        (tmp_path / "bad").write_text(text)
        result = cli("bench", "report", tmp_path / "bad")
        assert result.status == 2, text
        assert result.err.count("\n") == 1
    assert cli("bench", "report", tmp_path / "none").status == 1
    assert "name one or more" in cli("bench", "report").err


def pages() -> dict[str, str]:
    rates = [Load("rate", value) for value in (1, 2, 8)]
    one = content("one", *rates)
    return {
        "single": html.page([one], ["one"]),
        "mixed": html.page([one, content("two", Load("concurrency", 4), rates[1])], ["one", "two"]),
    }


@pytest.mark.parametrize("name", ["single", "mixed"])
def test_pages_stand_alone(name: str) -> None:
    page = pages()[name]
    assert not re.findall(r"(?:src|href)=|@import|url\(|<script", page)
    assert "nan" not in re.sub(r"nanovllm", "", page)
    assert page.count("<svg") == page.count("</svg>") >= 9
    coordinates = [float(x) for d in re.findall(r' d="([^"]+)"', page)
                   for x in re.findall(r"-?\d+\.?\d*", d)]  # fmt: skip
    assert min(coordinates) >= 0
    assert max(coordinates) <= svg.WIDTH


def test_pages_in_a_browser(tmp_path: Path) -> None:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        for name, source in pages().items():
            (tmp_path / name).write_text(source)
            for width, scheme in ((1280, "light"), (390, "dark")):
                view = {"width": width, "height": 800}
                context = browser.new_context(viewport=view, color_scheme=scheme)
                page = context.new_page()
                problems: list[str] = []
                page.on("console", lambda message, p=problems: p.append(message.text))
                page.on("request", lambda request, p=problems: p.append(request.url))
                page.set_content(source)
                assert page.evaluate("document.documentElement.scrollWidth") <= width
                assert problems == []
                context.close()
        browser.close()


def test_axes() -> None:
    assert svg.axis("", [3, 97]).ticks == [0, 20, 40, 60, 80, 100]
    assert svg.axis("", [1.0], whole=True).ticks == [0, 1]
    assert svg.axis("", [1, 4, 16], log=True, marked=True).ticks == [1, 4, 16]
    log = svg.axis("", [0.3, 700], log=True)
    assert (log.low, log.place(log.low)) == (pytest.approx(0.2), 0)
    assert log.place(log.high) == pytest.approx(1)
    assert log.ticks == pytest.approx([1, 10, 100])
    assert "no data" in svg.chart("", [], svg.axis("", []), svg.axis("", []))
