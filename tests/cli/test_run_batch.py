"""`nanovllm run-batch`: the server's answers, bad lines, and going on after every kind of end."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from scripted_server import Scripted, answer, scripted
from server.live_server import Live, request

from nanovllm.batch.output import OutputFile
from nanovllm.batch.work import Batch
from nanovllm.client.loop import runner
from nanovllm.server.engine_client import EngineClient
from nanovllm.server.service import Service
from nanovllm.server.streams import Job, Stream

MODULE = [sys.executable, "-m", "nanovllm.cli.main", "run-batch"]
BODY = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "temperature": 0}


@pytest.fixture(scope="module")
def live(tiny: Path) -> Iterator[Live]:
    server = Live(tiny, {"served_model_names": ("tiny",), "api_keys": ("right",)})
    yield server
    server.close()


def line(custom_id: str, path: str = "/v1/chat/completions", **body: Any) -> str:
    body = BODY | body if path.endswith("chat/completions") else body
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": path, "body": body})


def write(path: Path, lines: Sequence[str]) -> Path:
    path.write_text("".join(text + "\n" for text in lines))
    return path


def entries(path: Path) -> list[dict[str, Any]]:
    text = path.read_text()
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def completed(text: str = "ok") -> Any:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}}
    return answer({"choices": [choice], "usage": {"completion_tokens": 2}}, x_request_id="req-1")


MIXED = [
    line("chat"),
    line("text", "/v1/completions", prompt="hello", max_tokens=3, temperature=0),
    "",
    "{oops",
    "[1]",
    '{"method": "POST"}',
    line("tools", "/v1/embeddings"),
    line("chat"),
    line("stream", stream=True),
    line("bad", max_tokens=-1),
    line("model", model="other"),
    line("last", n=2),
]
BAD = {4: "no JSON:", 5: "no JSON object", 6: "custom_id must be a text", 7: "url must be"}
BAD |= {8: "'chat' is that of line 1", 9: "body.stream"}


def check_mixed(path: Path) -> None:
    by_id: dict[Any, list[dict[str, Any]]] = {}
    for entry in entries(path):
        assert set(entry) == {"id", "custom_id", "response", "error"}
        by_id.setdefault(entry["custom_id"], []).append(entry)
    found = {e["error"]["line"]: e for es in by_id.values() for e in es
             if e["error"] and "line" in e["error"]}  # fmt: skip
    assert sorted(found) == sorted(BAD)
    for number, words in BAD.items():
        assert words in found[number]["error"]["message"]
        assert f"line {number}" in found[number]["error"]["message"]
        assert found[number]["response"] is None
    (bad,), (model,), (last,) = by_id["bad"], by_id["model"], by_id["last"]
    assert (bad["response"]["status_code"], bad["error"]["code"]) == (400, "http_400")
    assert "max_tokens" in bad["error"]["message"]
    assert model["error"]["code"] == "model_not_found"
    assert last["error"] is None
    assert len(last["response"]["body"]["choices"]) == 2
    assert last["response"]["request_id"]
    assert by_id["text"][0]["response"]["body"]["object"] == "text_completion"
    assert Counter(e["id"] for e in entries(path)).most_common(1)[0][1] == 1


def test_an_engine_here(cli: Any, tiny: Path, live: Live, tmp_path: Path) -> None:
    """The very answers of the server."""
    source, out = write(tmp_path / "in", MIXED), tmp_path / "out"
    result = cli("run-batch", "-i", source, "-o", out, "--model", tiny)
    assert result.status == 1
    assert result.out == ""
    assert "11 done, 8 failed among them" in result.err
    assert "1 lines repeat a custom_id" in result.err
    check_mixed(out)
    key = {"Authorization": "Bearer right"}
    _, _, served = request(live.port, "POST", "/v1/chat/completions", BODY, key)
    here = next(e for e in entries(out) if e["custom_id"] == "chat" and e["error"] is None)
    assert here["response"]["body"]["choices"] == served["choices"]
    assert here["response"]["body"]["usage"]["completion_tokens"] == 4
    # Who answers may change between runs.
    again = cli("run-batch", "-i", source, "-o", out, "--url", live.url, "--api-key", "right")
    assert again.status == 1  # what failed is still failed
    assert "0 done, 0 failed among them, 11 were done before" in again.err
    check_mixed(out)


def test_a_fault_of_the_server_fails_its_request_alone(
    cli: Any, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = Service.start

    def start(service: Service, jobs: Sequence[Job]) -> Stream:
        if jobs[0].params.max_tokens == 7:
            raise ZeroDivisionError
        return begin(service, jobs)

    monkeypatch.setattr(Service, "start", start)
    lines = [line("a"), line("b", max_tokens=7), line("c")]
    source, out = write(tmp_path / "in", lines), tmp_path / "out"
    result = cli("run-batch", "-i", source, "-o", out, "--model", tiny)
    assert result.status == 1
    assert "Traceback" not in result.err
    codes = {e["custom_id"]: e["error"] and e["error"]["code"] for e in entries(out)}
    assert codes == {"a": None, "b": "internal_error", "c": None}


def test_a_server(cli: Any, live: Live, tmp_path: Path) -> None:
    source, out = write(tmp_path / "in", MIXED), tmp_path / "out"
    result = cli("run-batch", "-i", source, "-o", out, "--url", live.url, "--api-key", "right")
    assert result.status == 1
    check_mixed(out)


def test_any_model_answers_for_others(cli: Any, tiny: Path, tmp_path: Path) -> None:
    source, out = write(tmp_path / "in", [line("a", model="gpt")]), tmp_path / "out"
    assert cli("run-batch", "-i", source, "-o", out, "--model", tiny, "--any-model").status == 0
    assert entries(out)[0]["response"]["body"]["model"] == "gpt"


def test_a_name_for_the_server_replaces_the_requests_own(cli: Any, tmp_path: Path) -> None:
    source, out = write(tmp_path / "in", [line("a", model="gpt")]), tmp_path / "out"
    with scripted(completed()) as server:
        line_ = ("run-batch", "-i", source, "-o", out, "--url", server.url, "--model", "mine")
        assert cli(*line_).status == 0
        assert server.requests == [("POST", "/v1/chat/completions", BODY | {"model": "mine"})]


def test_it_goes_on_behind_a_torn_line(cli: Any, live: Live, tmp_path: Path) -> None:
    source, out = write(tmp_path / "in", [line(f"r{i}") for i in range(6)]), tmp_path / "out"
    common = ("run-batch", "-i", source, "-o", out, "--url", live.url, "--api-key", "right")
    assert cli(*common).status == 0
    whole = out.read_bytes()
    kept = b"".join(whole.splitlines(keepends=True)[:3])
    for torn in (1, 40, len(whole) - len(kept) - 1):
        out.write_bytes(whole[: len(kept) + torn])
        result = cli(*common)
        assert result.status == 0
        assert "were done before" in result.err
        assert out.read_bytes().startswith(kept)
        assert sorted(e["custom_id"] for e in entries(out)) == [f"r{i}" for i in range(6)]


def test_failed_ones_are_tried_again_if_asked(cli: Any, tmp_path: Path) -> None:
    source, out = write(tmp_path / "in", [line("a"), line("b"), "oops"]), tmp_path / "out"
    common = ("run-batch", "-i", source, "-o", out, "--concurrency", "1")
    broke = answer({"error": {"message": "broke"}}, 500)
    with scripted(completed(), broke, completed("again")) as server:
        assert cli(*common, "--url", server.url).status == 1
        assert cli(*common, "--url", server.url).status == 1
        assert len(server.requests) == 2
        assert cli(*common, "--url", server.url, "--retry-failed").status == 1  # still "oops"
        assert len(server.requests) == 3
    assert [(e["custom_id"], e["error"] is None) for e in entries(out)] in (
        [("a", True), (None, False), ("b", True)],
        [("a", True), ("b", True), (None, False)],
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_busy_servers_are_asked_again(cli: Any, tmp_path: Path) -> None:
    source, out = write(tmp_path / "in", [line("a")]), tmp_path / "out"
    busy = answer({"error": {"message": "full"}}, 429, Retry_After="0")
    common = ("run-batch", "-i", source, "-o", out)
    with scripted(busy, [], busy, completed()) as server:
        assert cli(*common, "--url", server.url).status == 0
        assert len(server.requests) == 4
    out.unlink()
    with scripted(busy, busy, completed()) as server:
        assert cli(*common, "--url", server.url, "--retries", "1").status == 1
        assert len(server.requests) == 2
    assert entries(out)[0]["response"]["status_code"] == 429


def test_a_server_that_is_gone_ends_the_run_and_a_later_one_goes_on(
    cli: Any, tmp_path: Path
) -> None:
    source, out = write(tmp_path / "in", [line("a"), line("b"), line("c")]), tmp_path / "out"
    common = ("run-batch", "-i", source, "-o", out, "--concurrency", "1", "--retries", "0")
    leaving = answer({"error": {"message": "draining"}}, 503)
    with scripted(completed(), leaving) as server:
        result = cli(*common, "--url", server.url)
    assert result.status == 2
    assert "503" in result.err
    assert len(entries(out)) == 1
    gone = cli(*common, "--url", "http://127.0.0.1:1")
    assert gone.status == 2
    assert "nothing listens" in gone.err
    with scripted(completed(), completed()) as server:
        assert cli(*common, "--url", server.url).status == 0
    assert [e["custom_id"] for e in entries(out)] == ["a", "b", "c"]


def test_an_engine_that_cannot_load_is_one_line(cli: Any, tmp_path: Path) -> None:
    source = write(tmp_path / "in", [line("a")])
    result = cli("run-batch", "-i", source, "-o", tmp_path / "out", "--model", "./nowhere")
    assert result.status == 2
    assert "no directory ./nowhere" in result.err


def test_an_answer_that_never_comes_is_an_error(cli: Any, tmp_path: Path) -> None:
    source, out = write(tmp_path / "in", [line("a"), line("b")]), tmp_path / "out"

    def respond(method: str, path: str, body: Any) -> Any:
        if body["max_tokens"] == 1:
            time.sleep(5)
        return completed()

    write(source, [line("a", max_tokens=1), line("b")])
    server = Scripted(respond)
    result = cli("run-batch", "-i", source, "-o", out, "--url", server.url, "--timeout", "1")
    server.close()
    assert result.status == 1
    errors = {e["custom_id"]: e["error"] and e["error"]["code"] for e in entries(out)}
    assert errors == {"a": "timeout", "b": None}


# --- ends from outside --------------------------------------------------------------------------


class Slow(Scripted):
    """Answers after a moment; `asked` are the custom texts that it got."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        super().__init__(self._answer)

    def _answer(self, method: str, path: str, body: Any) -> Any:
        self.asked.append(body["messages"][0]["content"])
        time.sleep(0.05)
        return completed("x" * 300)


def numbered(count: int) -> list[str]:
    return [line(f"r{i}", messages=[{"role": "user", "content": f"r{i}"}]) for i in range(count)]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_every_request_is_answered_once_whatever_ends_it(
    cli: Any, tmp_path: Path, number: signal.Signals
) -> None:
    source, out = write(tmp_path / "in", numbered(40)), tmp_path / "out"
    server = Slow()
    common = ["-i", str(source), "-o", str(out), "--url", server.url, "--concurrency", "2"]
    statuses = []
    written: dict[str, int] = {}  # how often those had been asked for when they were written
    for _ in range(2):
        begun = out.read_bytes().count(b"\n") if out.exists() else 0
        process = subprocess.Popen([*MODULE, *common], stderr=subprocess.PIPE, text=True)
        while not out.exists() or out.read_bytes().count(b"\n") < begun + 5:
            time.sleep(0.01)
        process.send_signal(number)
        statuses.append(process.wait(60))
        _, err = process.communicate()
        for entry in entries_without_torn(out):
            written.setdefault(entry["custom_id"], server.asked.count(entry["custom_id"]))
    if number == signal.SIGINT:
        assert statuses == [130, 130]
        assert "the same command goes on" in err
        assert "Traceback" not in err
    assert cli("run-batch", *common).status == 0
    server.close()
    assert sorted(e["custom_id"] for e in entries(out)) == sorted(f"r{i}" for i in range(40))
    assert len(written) >= 10
    assert {name: server.asked.count(name) for name in written} == written  # not asked again
    assert len(server.asked) <= 40 + 2 * 3  # those in flight when it ended


def test_an_engine_that_is_killed_ends_the_run_and_a_later_one_goes_on(
    cli: Any, tiny: Path, tmp_path: Path
) -> None:
    long = [line(f"r{i}", max_tokens=150, min_tokens=150, ignore_eos=True) for i in range(30)]
    source, out = write(tmp_path / "in", long), tmp_path / "out"
    common = ["-i", str(source), "-o", str(out), "--model", str(tiny), "--max-num-seqs"]
    process = subprocess.Popen([*MODULE, *common, "2"], stderr=subprocess.PIPE, text=True)
    while not out.exists() or not out.stat().st_size:
        assert process.poll() is None
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "the engine process ended" in err
    assert all(entry["error"] is None for entry in entries_without_torn(out))
    assert len(entries(out)) < 30
    assert cli("run-batch", *common, "30").status == 0
    assert len({entry["custom_id"] for entry in entries(out)}) == len(entries(out)) == 30


@pytest.mark.parametrize("delay", [0.0, 0.1, 0.5])
def test_an_interrupt_of_the_whole_group_during_start_is_one_line(
    tiny: Path, tmp_path: Path, delay: float
) -> None:
    source, out = write(tmp_path / "in", numbered(3)), tmp_path / "out"
    process = subprocess.Popen(
        [*MODULE, "-i", str(source), "-o", str(out), "--model", str(tiny), "--any-model"],
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not children.read_text():
        assert process.poll() is None
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines() == [
        "interrupted: 0 done, 0 failed among them, 0 tokens; the same command goes on"
    ]


def test_an_engine_whose_start_is_cut_is_left_in_peace() -> None:
    async def cut(num_steps: int) -> None:
        ours, theirs = socket.socketpair()
        client = EngineClient(cast(Any, None))
        connecting = asyncio.create_task(client.connect(ours))
        for _ in range(num_steps):
            await asyncio.sleep(0)
        connecting.cancel()
        await asyncio.wait([connecting])
        await client.close(0.1)
        ours.close()
        theirs.close()

    for num_steps in range(5):
        with runner() as loop:
            loop.run(cut(num_steps))


def entries_without_torn(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().split("\n")[:-1]]


def test_a_full_disk_leaves_whole_lines(cli: Any, tmp_path: Path) -> None:
    source, out = write(tmp_path / "in", numbered(20)), tmp_path / "out"
    server = Slow()
    common = ["-i", str(source), "-o", str(out), "--url", server.url]

    def bound() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

    done = subprocess.run(
        [*MODULE, *common], preexec_fn=bound, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert str(out) in done.stderr
    assert done.stderr.count("\n") == 1
    assert 1 <= len(entries(out)) < 20
    assert cli("run-batch", *common).status == 0
    server.close()
    assert sorted(e["custom_id"] for e in entries(out)) == sorted(f"r{i}" for i in range(20))
    full = cli("run-batch", "-i", source, "-o", "/dev/full", "--url", "http://127.0.0.1:1",
               "--retries", "0")  # fmt: skip
    assert full.status == 2  # nothing was read from it, nothing hangs


def test_pipes(tmp_path: Path) -> None:
    with scripted(completed(), completed()) as server:
        text = line("a") + "\n" + line("b")  # the last line has no end
        done = subprocess.run(
            [*MODULE, "-i", "-", "-o", "-", "--url", server.url, "--quiet"],
            input=text, capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(json.loads(text)["custom_id"] for text in done.stdout.splitlines()) == ["a", "b"]
    assert done.stderr == ""


def test_a_slow_pipe_holds_up_no_answer() -> None:
    with scripted(completed(), completed()) as server:
        process = subprocess.Popen(
            [*MODULE, "-i", "-", "-o", "-", "--url", server.url],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(line("a") + "\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["custom_id"] == "a"  # before the next comes
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "1 done" in err
    assert "Traceback" not in err


# --- wrong use ----------------------------------------------------------------------------------


def test_a_file_of_something_else_is_left_alone(cli: Any, tmp_path: Path) -> None:
    source = write(tmp_path / "in", [line("a")])
    before = source.read_bytes()
    others = ["hello", "[]", '{"custom_id": [1], "response": null, "error": null}']
    others.append('{"custom_id": "a", "response": null, "error": {"line": {}}}')
    for out in (source, *(write(tmp_path / f"o{i}", [text]) for i, text in enumerate(others))):
        held = out.read_bytes()
        result = cli("run-batch", "-i", source, "-o", out, "--url", "http://127.0.0.1:1")
        assert result.status == 2
        assert out.read_bytes() == held
    assert source.read_bytes() == before


def test_two_runs_do_not_share_a_file(cli: Any, tmp_path: Path) -> None:
    source = write(tmp_path / "in", [line("a")])
    held = OutputFile(tmp_path / "out")
    result = cli("run-batch", "-i", source, "-o", tmp_path / "out", "--url", "http://127.0.0.1:1")
    held.close()
    assert result.status == 2
    assert "another run writes" in result.err


WRONG = {
    "": "--input-file is needed",
    "-i x": "--output-file is needed",
    "-i x -o y --concurrency 0": "--concurrency must be",
    "-i x -o y --retries -1": "--retries must be",
    "-i x -o y --timeout 0": "--timeout must be",
    "-i x -o - --retry-failed": "needs an output file",
    "-i x -o y --api-key z": "give its --url",
    "-i x -o y --url http://h --dtype float32": "--dtype is the server's choice",
    "-i x -o y --url http://h --any-model": "--any-model is the server's choice",
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_use_is_one_line(cli: Any, words: str) -> None:
    result = cli("run-batch", *words.split())
    assert result.status == 2
    assert WRONG[words] in result.err
    assert result.err.count("\n") == 1


def test_a_missing_input_makes_no_output(cli: Any, tmp_path: Path) -> None:
    flags = ("--url", "http://127.0.0.1:1")
    assert cli("run-batch", "-i", tmp_path / "no", "-o", tmp_path / "out", *flags).status == 1
    assert os.listdir(tmp_path) == []


def test_concurrency_is_bounded(cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running = most = 0
    answer_ = Batch._answer

    async def counted(batch: Batch, item: Any) -> Any:
        nonlocal running, most
        running += 1
        most = max(most, running)
        try:
            return await answer_(batch, item)
        finally:
            running -= 1

    monkeypatch.setattr(Batch, "_answer", counted)
    source, out = write(tmp_path / "in", numbered(12)), tmp_path / "out"
    server = Slow()
    cli("run-batch", "-i", source, "-o", out, "--url", server.url, "--concurrency", "3")
    server.close()
    assert most == 3
    assert server.num_connections == 3
