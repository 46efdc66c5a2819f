"""`nanovllm serve` as a process: start, signals, death of either side, and what is left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from nanovllm.cli.main import main
from nanovllm.server.launch import Backoff

from .live_server import Command, assert_error, command, request

LONG = {"prompt": [5, 6, 7], "max_tokens": 400, "ignore_eos": True}
# Slow enough to be caught in the middle: one token a step, and a wide vocabulary of logprobs.
SLOW = LONG | {"logprobs": 20, "n": 8}


@pytest.fixture(scope="module")
def flags(model_dir: Path) -> tuple[str, ...]:
    return ("--model", str(model_dir), "--num-kv-blocks", "200", "--max-num-seqs", "16")


@pytest.fixture
def serve(flags: tuple[str, ...]) -> Iterator[Callable[..., Command]]:
    started: list[Any] = []

    def begin(*more: str, wait: bool = True) -> Command:
        context = command(*flags, *more, wait=wait)
        started.append(context)
        server: Command = context.__enter__()
        return server

    yield begin
    for context in started:
        context.__exit__(None, None, None)


def in_background(port: int, body: dict[str, Any]) -> tuple[threading.Thread, list[Any]]:
    answers: list[Any] = []

    def send() -> None:
        try:
            answers.append(request(port, "POST", "/v1/completions", body))
        except OSError as error:
            answers.append(error)

    thread = threading.Thread(target=send)
    thread.start()
    return thread, answers


def until(condition: Callable[[], Any], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Not gone, and no zombie that only waits to be counted."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def load(port: int) -> dict[str, int]:
    found: dict[str, int] = request(port, "GET", "/load")[2]
    return found


def running(port: int) -> bool:
    return load(port)["num_requests_running"] > 0


def test_it_serves_drains_and_leaves_nothing(serve: Callable[..., Command]) -> None:
    server = serve("--served-model-name", "tiny", "alias")
    (child,) = server.children()
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="x")
    assert [model.id for model in client.models.list()] == ["tiny", "alias"]
    answer = client.chat.completions.create(
        model="alias", messages=[{"role": "user", "content": "hi"}], max_tokens=5
    )
    assert answer.usage is not None
    thread, answers = in_background(server.port, SLOW)
    until(lambda: running(server.port))
    server.process.send_signal(signal.SIGTERM)
    until(lambda: request(server.port, "GET", "/ready")[0] == 503)
    status, headers, refusal = request(server.port, "POST", "/v1/completions", LONG)
    assert status == 503
    assert headers["retry-after"]
    assert_error(refusal, "unavailable")
    assert request(server.port, "GET", "/health")[0] == 200
    thread.join(60)
    assert answers[0][0] == 200
    assert answers[0][2]["usage"]["completion_tokens"] == 8 * 400
    assert server.process.wait(30) == 0
    until(lambda: not alive(child))


def test_what_the_engine_notes_is_in_the_log_once(serve: Callable[..., Command]) -> None:
    server = serve("--num-kv-blocks", "4")
    free = load(server.port)
    assert free["num_free_blocks"] == free["num_blocks"] == 4  # before the first request, too
    assert server.end() == 0
    lines = server.output().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d [\d:,]+ [A-Z]+ ", line) for line in lines), lines
    assert len([line for line in lines if "WARNING max_model_len is 128 instead of" in line]) == 1


def test_drain_timeout_and_second_signal(serve: Callable[..., Command]) -> None:
    for drain, number in (("0.2", 1), ("100", 2)):
        server = serve("--drain-timeout", drain)
        (child,) = server.children()
        slow = SLOW | {"n": 60}
        streaming, events = in_background(server.port, slow | {"stream": True})
        until(lambda port=server.port: running(port))
        thread, answers = in_background(server.port, slow)
        until(lambda port=server.port: load(port)["num_requests_waiting"] >= 60)
        for _ in range(number):
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
        assert server.process.wait(20) == 0
        thread.join(20)
        streaming.join(20)
        assert answers[0][0] == 503
        assert "shutting down" in assert_error(answers[0][2], "unavailable")["message"]
        *_, last, done = events[0][2].decode().strip().split("\n\n")
        assert done == "data: [DONE]"
        assert_error(json.loads(last.removeprefix("data: ")), "unavailable")
        until(lambda pid=child: not alive(pid))
        assert "Traceback" not in server.output()


def test_the_engine_is_killed(serve: Callable[..., Command]) -> None:
    server = serve()
    (child,) = server.children()
    thread, answers = in_background(server.port, SLOW)
    until(lambda: running(server.port))
    os.kill(child, signal.SIGKILL)
    began = time.monotonic()
    thread.join(60)
    assert time.monotonic() - began < 2 + 3  # told within 2 s; the rest is for a busy machine
    status, _, answer = answers[0]
    assert status == 500
    assert_error(answer, "engine_error")
    assert server.process.wait(20) == 1
    assert "the engine process ended" in server.output()


def test_a_hung_engine_is_noticed_and_ended(serve: Callable[..., Command]) -> None:
    server = serve("--engine-timeout", "1.5")
    (child,) = server.children()
    os.kill(child, signal.SIGSTOP)
    _, answers = in_background(server.port, LONG)
    assert server.process.wait(30) == 1
    until(lambda: answers)
    assert_error(answers[0][2], "engine_error")
    until(lambda: not alive(child))
    assert "hung" in server.output()


def test_another_engine_is_started_if_that_is_wanted(serve: Callable[..., Command]) -> None:
    server = serve("--on-engine-death", "restart", "--engine-timeout", "5")
    seen = []
    for number in (signal.SIGKILL, signal.SIGSTOP):  # ended, hung
        (child,) = server.children()
        seen.append(child)
        thread, answers = in_background(server.port, SLOW)
        until(lambda: running(server.port))
        os.kill(child, number)
        thread.join(60)
        assert answers[0][0] == 500
        assert_error(answers[0][2], "engine_error")
        metrics = request(server.port, "GET", "/metrics")[2]
        assert b'num_requests_running{model_name="tiny"} 0.0' in metrics
        until(lambda: request(server.port, "GET", "/health")[0] == 200, 60)
        body = {"prompt": "fox", "max_tokens": 2}
        assert request(server.port, "POST", "/v1/completions", body)[0] == 200
        until(lambda: load(server.port)["num_free_blocks"] == load(server.port)["num_blocks"] > 0)
        metrics = request(server.port, "GET", "/metrics")[2]
        assert b'engine_up{model_name="tiny"} 1.0' in metrics
        assert not alive(child)
    (child,) = server.children()
    assert child not in seen
    assert server.end() == 0
    until(lambda: not alive(child))
    said = server.output()
    assert "Traceback" not in said
    assert re.findall(r"another engine is started in (\d+) s: this one served", said) == ["1", "2"]


def test_engines_that_end_soon_are_replaced_ever_later() -> None:
    backoff = Backoff()
    assert [backoff.after(3.0) for _ in range(7)] == [1, 2, 4, 8, 16, 30, 30]
    assert backoff.after(60.0) == 0
    assert backoff.after(59.0) == 1
    assert [backoff.after(0.0) for _ in range(5000)][-1] == 30


def test_a_server_without_an_engine_ends_when_told(serve: Callable[..., Command]) -> None:
    server = serve("--on-engine-death", "restart")
    (child,) = server.children()
    os.kill(child, signal.SIGKILL)
    until(lambda: request(server.port, "GET", "/health")[0] == 503)
    assert server.end() == 0
    assert "Traceback" not in server.output()


def test_an_engine_that_cannot_start_is_not_started_again(
    serve: Callable[..., Command], model_dir: Path, tmp_path: Path
) -> None:
    for path in model_dir.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    server = serve("--model", str(tmp_path), "--on-engine-death", "restart", wait=False)
    assert server.process.wait(60) == 1
    assert "another engine" not in server.output()


@pytest.mark.slow
def test_twenty_killed_servers_leave_nothing_and_it_starts_again(
    serve: Callable[..., Command],
) -> None:
    """Killed while they load, at once or later, and while they serve."""
    shared = set(os.listdir("/dev/shm"))
    for _ in range(3):
        started = [serve(wait=False) for _ in range(6)]
        for server in started:
            until(server.children)
            (child,) = server.children()
            time.sleep(0.15)
            server.process.kill()
            until(lambda pid=child: not alive(pid), 100)
    for _ in range(2):
        server = serve()
        (child,) = server.children()
        body = {"prompt": "fox", "max_tokens": 2}
        assert request(server.port, "POST", "/v1/completions", body)[0] == 200
        thread, answers = in_background(server.port, SLOW)
        until(lambda port=server.port: running(port))
        server.process.kill()
        thread.join(60)
        assert isinstance(answers[0], OSError)
        until(lambda pid=child: not alive(pid), 100)
    assert set(os.listdir("/dev/shm")) <= shared


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_start_ends_it(serve: Callable[..., Command], number: int) -> None:
    server = serve(wait=False)
    until(server.children)
    (child,) = server.children()
    time.sleep(1.0)
    assert server.end(number) in (0, -number, 130)
    until(lambda: not alive(child), 20)
    assert "Traceback" not in server.output()


@pytest.mark.parametrize("delay", [0.0, 0.1, 0.5])
def test_an_interrupt_of_the_whole_group_during_start_is_quiet(
    flags: tuple[str, ...], delay: float
) -> None:
    """As a terminal sends it: to the engine's process, too."""
    server = Command(*flags, wait=False, start_new_session=True)
    until(server.children)
    (child,) = server.children()
    time.sleep(delay)
    os.killpg(server.process.pid, signal.SIGINT)
    assert server.process.wait(30) == 130
    until(lambda: not alive(child), 20)
    said = server.output().splitlines()
    assert all("INFO shutting down" in line for line in said), said


def test_two_servers_and_a_taken_port(
    serve: Callable[..., Command], flags: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = serve(), serve("--in-process")
    for server in (first, second):
        body = {"prompt": "fox", "max_tokens": 3}
        assert request(server.port, "POST", "/v1/completions", body)[2]["model"] == "tiny"
    assert main(["serve", *flags, "--port", str(first.port)]) == 2
    said = f"nanovllm: cannot listen on 127.0.0.1:{first.port}: Address already in use\n"
    assert capsys.readouterr().err == said
    assert second.end() == 0
    assert not second.output().count("Traceback")


def test_health_while_the_model_loads(flags: tuple[str, ...]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with command(*flags, "--port", str(port), wait=False):
        seen = []
        deadline = time.monotonic() + 60
        while 200 not in seen and time.monotonic() < deadline:
            try:
                seen.append(request(port, "GET", "/health")[0])
                if seen[-1] == 503:
                    body = {"prompt": "a", "max_tokens": 1}
                    _, headers, answer = request(port, "POST", "/v1/completions", body)
                    assert headers.get("retry-after") or answer["choices"]
            except ConnectionRefusedError:
                seen.append(0)
            time.sleep(0.02)
        assert set(seen) == {0, 503, 200}


# --- wrong use: one line, status 2, before anything is loaded


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--port", "99999"], "cannot listen on"),
        (["--host", "203.0.113.7"], "cannot listen on"),
        (["--prot", "1"], "--port"),
        (["--model", "/no/such"], "no directory"),
        (["--chat-template", "/no/such"], "cannot be read"),
        (["--config", "/no/such"], "cannot be read"),
        (["--log-level", "loud"], "log_level"),
        (["--max-num-seqs", "0"], "max_num_seqs"),
        (["--max-waiting", "-1"], "max_waiting"),
        (["--engine-timeout", "nan"], "engine_timeout"),
        (["--drain-timeout", "-1"], "drain_timeout"),
        (["--metrics-prefix", "a b"], "metrics_prefix"),
        (["--api-key", ""], "api_key"),
        (["--on-engine-death", "pray"], "on_engine_death"),
        (["--on-engine-death", "restart", "--in-process"], "on_engine_death"),
        (["--skip-tokenizer-init"], "tokenizer"),
    ],
)
def test_wrong_use(
    arguments: list[str], said: str, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--port", "0", "--model", str(model_dir), *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize("more", [[], ["--in-process"]])
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--max-model-len", "999999"], "max_model_len is 999999"),
        (["--attention-backend", "nope"], "attention_backend must be"),
    ],
)
def test_what_the_engine_refuses_is_wrong_use_too(
    serve: Callable[..., Command], arguments: list[str], said: str, more: list[str]
) -> None:
    server = serve(*arguments, *more, wait=False)
    assert server.process.wait(60) == 2
    (line,) = server.output().splitlines()
    assert line.startswith(f"nanovllm: {said}")


def test_broken_models_end_the_server_in_words(
    serve: Callable[..., Command], model_dir: Path, tmp_path: Path
) -> None:
    for path in model_dir.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    server = serve("--model", str(tmp_path), wait=False)
    assert server.process.wait(60) == 1
    said = server.output()
    assert "WeightsError" in said
    assert "Traceback" not in said
    (tmp_path / "tokenizer.json").unlink()
    assert main(["serve", "--port", "0", "--model", str(tmp_path)]) == 2


def test_yaml_and_flags(tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(
        "nanovllm.server.launch.serve", lambda *args, **named: seen.append((args, named)) or 0
    )
    path = tmp_path / "server.yaml"
    path.write_text("port: 1234\nmax-num-seqs: 7\napi_key: secret\nserved-model-name: [a, b]\n")
    assert main(["serve", str(model_dir), "--config", str(path), "--max-num-seqs", "9"]) == 0
    (config, engine), named = seen[0]
    assert (config.port, config.api_keys, config.served_model_names) == (
        1234, ("secret",), ("a", "b"),
    )  # fmt: skip
    assert (engine.max_num_seqs, engine.model) == (9, str(model_dir))
    assert named == {"chat_template": None, "in_process": False}
    path.write_text("port: 5\ndtype: float8\n")  # a flag wins over what is wrong, too
    assert main(["serve", str(model_dir), "--config", str(path), "--dtype", "auto"]) == 0


@pytest.mark.parametrize(
    "text",
    ["prot: 1", "port: abc", "port: true", "any-model: 5", "drain-timeout: x", "chat-template: 5",
     "api-key: 123", "api-key: [a, 1]", "api-key:", "api-key: |\n  secret", "served-model-name: 7",
     "in-process: 5", "log-level: loud", "max-num-seqs: x", "dtype: float8", "seed: x", "model: 5",
     "on-engine-death: pray", "gpu-memory-utilization: 2", "- 1", "a: ["],
)  # fmt: skip
def test_a_wrong_file_names_itself_and_the_key(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "server.yaml"
    path.write_text(text + "\n")
    assert main(["serve", "--config", str(path), "--host", "127.0.0.1"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"nanovllm: {path}")
    assert text.startswith(("- ", "a: [")) or text.split(":")[0].replace("-", "_") in said
    assert said.count("\n") == 1


def test_help_is_short(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--help"]) == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  -")]
    assert len(shown) <= 40
    assert main(["serve", "--help=all"]) == 0
    every = capsys.readouterr().out
    for flag in ("--host", "--port", "--api-key", "--served-model-name", "--max-model-len",
                 "--num-kv-blocks", "--gpu-memory-utilization", "--chat-template"):  # fmt: skip
        assert flag in every


def test_listening_for_others_without_a_key_warns(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("nanovllm.server.launch.serve", lambda *args, **named: 0)
    for more, number in (([], 1), (["--api-key", "x"], 1)):
        main(["serve", "--host", "0.0.0.0", "--model", str(model_dir), *more])
        assert len([r for r in caplog.records if "api-key" in r.getMessage()]) == number
