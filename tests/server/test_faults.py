"""Faults inside the engine, clients that go away, overload: nobody else notices."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from nanovllm.engine.scheduler import Scheduler
from nanovllm.executor.inline import InlineExecutor
from nanovllm.runner.sampler import Sampler
from nanovllm.text.detokenizer import IncrementalDetokenizer

from .live_server import Gate, Live, assert_error, make_tokenizer, request

TEXT = "/v1/completions"
CHAT = "/v1/chat/completions"
LONG = {"prompt": list(range(5, 25)), "max_tokens": 230, "ignore_eos": True, "temperature": 0}


@contextmanager
def open_request(live: Live, **fields: Any) -> Iterator[socket.socket]:
    """A completion that was sent and is not read."""
    body = json.dumps(LONG | fields).encode()
    head = (
        f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", live.port), timeout=60) as sock:
        sock.sendall(head.encode() + body)
        yield sock


# --- clients that go away -------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("state", ["queued", "prefilling", "decoding", "last step"])
def test_a_client_that_goes_frees_everything(
    start: Callable[..., Live], gate: Gate, state: str, stream: bool
) -> None:
    live = start(max_num_seqs=2, max_num_batched_tokens=16)
    client = live.service.client
    if state == "decoding":
        with open_request(live, stream=stream):
            live.wait_until(lambda: request(live.port, "GET", "/load")[2]["generation_tokens"] > 3)
    else:
        fields = {
            "queued": {},
            "prefilling": {"prompt": list(range(5, 205))},
            "last step": {"prompt": [5, 6], "max_tokens": 1},
        }[state]
        with gate, open_request(live, stream=stream, **fields):
            live.wait_until(lambda: client.num_sequences == 1)
    live.wait_until(lambda: client.num_sequences == 0)
    live.wait_until_idle()
    live.wait_until(lambda: live.service.num_open == 0)
    # Fewer tokens than were asked for: it did end early.
    assert request(live.port, "GET", "/load")[2]["generation_tokens"] < 230


def test_an_abort_that_races_the_end(start: Callable[..., Live]) -> None:
    """Clients that leave around their last token: each request ends once, whichever was first."""
    live = start(max_num_seqs=4)
    number = 40
    for i in range(number):
        with open_request(live, prompt=[5 + i], max_tokens=3, stream=bool(i % 2)) as sock:
            if i % 4:
                sock.recv(50 * (i % 4))
    live.wait_until_idle()
    live.wait_until(lambda: live.service.num_open == 0)
    lines = request(live.port, "GET", "/metrics")[2].decode().splitlines()
    ended = {
        line.split('reason="')[1].split('"')[0]: float(line.split()[-1])
        for line in lines
        if line.startswith("nanovllm:request_success_total")
    }
    assert sum(ended.values()) <= number, ended
    assert ended["error"] == 0
    assert live.service.client.num_sequences == 0


def test_clients_of_the_waiting_queue_may_go_too(start: Callable[..., Live]) -> None:
    live = start(max_num_seqs=1)
    with open_request(live, stream=True) as first:
        first.recv(100)
        with open_request(live, stream=True):
            live.wait_until(lambda: live.service.client.load.num_waiting == 1)
        live.wait_until(lambda: live.service.client.load.num_waiting == 0)
        assert live.service.client.num_sequences == 1
    live.wait_until_idle()


def test_an_openai_stream_closed_early(start: Callable[..., Live], gate: Gate) -> None:
    live = start()
    gate.close_after(20)
    stream = live.client().completions.create(
        model="tiny", prompt="fox", max_tokens=200, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    live.wait_until(lambda: live.service.client.num_sequences == 0)
    gate.open()
    live.wait_until_idle()
    assert request(live.port, "GET", "/load")[2]["generation_tokens"] < 50


def test_a_slow_reader_delays_nobody(start: Callable[..., Live]) -> None:
    live = start()
    with open_request(live, stream=True, n=8, logprobs=20) as slow:
        other = live.client().completions.create(model="tiny", prompt="a", max_tokens=50)
        assert other.usage.completion_tokens
        # The engine finishes without being read; nothing was dropped for the reader.
        live.wait_until_idle()
        data = b""
        while b"[DONE]" not in data:
            piece = slow.recv(1 << 20)
            assert piece
            data += piece
    assert data.count(b'"finish_reason":"length"') == 8


# --- faults inside of the engine ------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError("boom /a/path"), torch.OutOfMemoryError("no")])
def test_a_failed_step_fails_its_requests_alone(
    start: Callable[..., Live], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    live = start()
    armed = threading.Event()
    submit = InlineExecutor.submit

    class Broken:
        def result(self) -> Any:
            raise error

    def fail_once(executor: InlineExecutor, plan: Any) -> Any:
        if armed.is_set():
            armed.clear()
            return Broken()
        return submit(executor, plan)

    monkeypatch.setattr(InlineExecutor, "submit", fail_once)
    for stream in (False, True):
        armed.set()
        status, _, answer = request(live.port, "POST", TEXT, LONG | {"stream": stream})
        assert status == 500
        found = assert_error(answer, "engine_error")
        assert found["type"] == "server_error"
        assert "boom" not in found["message"]
        live.wait_until_idle()
    assert request(live.port, "POST", TEXT, {"prompt": "a", "max_tokens": 2})[0] == 200


def test_a_failure_underway_ends_the_stream_in_words(
    start: Callable[..., Live], monkeypatch: pytest.MonkeyPatch
) -> None:
    live = start()
    submit = InlineExecutor.submit
    num_steps = 0

    class Broken:
        def result(self) -> Any:
            raise RuntimeError("boom")

    def fail_later(executor: InlineExecutor, plan: Any) -> Any:
        nonlocal num_steps
        num_steps += 1
        return Broken() if num_steps == 10 else submit(executor, plan)

    monkeypatch.setattr(InlineExecutor, "submit", fail_later)
    status, _, raw = request(live.port, "POST", TEXT, LONG | {"stream": True})
    assert status == 200
    *_, last, done, rest = raw.decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert_error(json.loads(last.removeprefix("data: ")), "engine_error")
    num_steps = 0
    with pytest.raises(openai.APIError):
        list(live.client().completions.create(model="tiny", stream=True, **_client(LONG)))
    live.wait_until_idle()


def _client(body: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in body.items() if k != "ignore_eos"} | {
        "extra_body": {"ignore_eos": True}
    }


def test_the_engine_itself_breaks(
    start: Callable[..., Live], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anything but a failed step ends the engine; clients and /health are told."""
    live = start()
    monkeypatch.setattr("nanovllm.server.launch.DEATH_LINGER", 5.0)
    monkeypatch.setattr(Scheduler, "schedule", lambda _: 1 / 0)
    status, _, answer = request(live.port, "POST", TEXT, LONG)
    assert status == 500
    assert_error(answer, "engine_error")
    for path, expected in (("/health", 503), ("/ready", 503), ("/version", 200)):
        status, headers, answer = request(live.port, "GET", path)
        assert status == expected
        assert status == 200 or headers["retry-after"]
    assert_error(request(live.port, "POST", TEXT, LONG)[2], "unavailable")
    assert b'engine_up{model_name="tiny"} 0.0' in request(live.port, "GET", "/metrics")[2]


def test_an_engine_that_hears_no_more_commands_ends(
    start: Callable[..., Live], monkeypatch: pytest.MonkeyPatch
) -> None:
    def deaf(core: Any) -> Callable[[Any], None]:
        def prepare(command: Any) -> None:
            raise RuntimeError("boom")

        return prepare

    monkeypatch.setattr("nanovllm.server.engine_process.compiler_for", deaf)
    monkeypatch.setattr("nanovllm.server.launch.DEATH_LINGER", 5.0)
    live = start()
    status, _, answer = request(live.port, "POST", TEXT, LONG)
    assert status == 500
    assert_error(answer, "engine_error")
    assert request(live.port, "GET", "/health")[0] == 503


def test_nan_logits_fail_their_request_alone(
    start: Callable[..., Live], monkeypatch: pytest.MonkeyPatch
) -> None:
    live = start()
    sample = Sampler.sample
    poisoned = threading.Event()

    def poison(self: Sampler, logits: torch.Tensor, *rest: Any, **more: Any) -> Any:
        if poisoned.is_set() and len(logits) == 2:
            logits[1] = float("nan")
            poisoned.clear()
        return sample(self, logits, *rest, **more)

    monkeypatch.setattr(Sampler, "sample", poison)
    with open_request(live, stream=True) as first:
        first.recv(10)
        poisoned.set()
        status, _, answer = request(live.port, "POST", TEXT, LONG)
        assert status == 500
        assert_error(answer, "engine_error")
        data = b""
        while b"[DONE]" not in data:
            data += first.recv(1 << 16)
    assert b'"finish_reason":"length"' in data
    assert b"error" not in data
    live.wait_until_idle()


def test_a_text_that_cannot_be_made_fails_its_request_alone(
    start: Callable[..., Live], monkeypatch: pytest.MonkeyPatch
) -> None:
    live = start()
    push = IncrementalDetokenizer.push
    armed = threading.Event()

    def fail_once(self: IncrementalDetokenizer, token_ids: Any) -> str:
        if armed.is_set():
            armed.clear()
            raise RuntimeError("boom")
        return push(self, token_ids)

    with open_request(live, stream=True) as first:
        first.recv(10)
        monkeypatch.setattr(IncrementalDetokenizer, "push", fail_once)
        armed.set()
        status, _, answer = request(live.port, "POST", TEXT, LONG)
        data = b""
        while b"[DONE]" not in data:
            data += first.recv(1 << 16)
    # One of the two was hit, the other ended well.
    assert [status == 500, b"engine_error" in data].count(True) == 1
    if status == 500:
        assert_error(answer, "engine_error")
    live.wait_until_idle()
    assert request(live.port, "POST", TEXT, LONG)[0] == 200


# --- overload -------------------------------------------------------------------------------------


def test_a_full_queue_is_told(start: Callable[..., Live], gate: Gate) -> None:
    live = start({"max_waiting": 2}, max_num_seqs=2)
    client = live.service.client
    with gate, open_request(live, n=2), open_request(live, n=2):
        live.wait_until(lambda: client.num_sequences == 4)
        status, headers, answer = request(live.port, "POST", TEXT, LONG)
        assert status == 429
        assert int(headers["retry-after"]) > 0
        error = assert_error(answer, "queue_full")
        assert error["type"] == "rate_limit_error"
        with pytest.raises(openai.RateLimitError):
            live.client().completions.create(model="tiny", prompt="a")
    assert_error(request(live.port, "POST", TEXT, LONG | {"n": 5})[2])
    assert_error(request(live.port, "POST", TEXT, LONG | {"prompt": [[5]] * 5})[2])
    live.wait_until_idle()
    assert request(live.port, "POST", TEXT, {"prompt": "a", "max_tokens": 1})[0] == 200


def test_what_can_never_fit_the_pool_is_refused(start: Callable[..., Live]) -> None:
    live = start(block_size=16, num_kv_blocks=4)  # 64 slots, and a context of 64
    for length, status in ((100, 400), (64, 400), (63, 200), (40, 200)):
        got, _, answer = request(live.port, "POST", TEXT, LONG | {"prompt": [5] * length})
        assert got == status
        if status == 400:
            error = assert_error(answer, "context_length_exceeded")
            assert "maximum context length is 64 tokens" in error["message"]
        else:
            assert answer["usage"]["total_tokens"] == 64
            assert answer["choices"][0]["finish_reason"] == "length"
    live.wait_until_idle()


def test_preemption_changes_no_answer(start: Callable[..., Live]) -> None:
    live = start(block_size=8, num_kv_blocks=30)
    bodies = [LONG | {"prompt": [i + 5] * 9, "max_tokens": 60} for i in range(8)]
    alone = [request(live.port, "POST", TEXT, body)[2]["choices"][0]["text"] for body in bodies]

    async def together() -> list[Any]:
        client = openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="x", max_retries=0)
        async with client:
            calls = [client.completions.create(model="tiny", **_client(body)) for body in bodies]
            return [answer.choices[0].text for answer in await asyncio.gather(*calls)]

    assert asyncio.run(together()) == alone
    lines = request(live.port, "GET", "/metrics")[2].decode().splitlines()
    (line,) = [x for x in lines if x.startswith("nanovllm:num_preemptions_total")]
    assert float(line.split()[-1]) > 0
    live.wait_until_idle()


def test_new_requests_do_not_starve_a_running_one(start: Callable[..., Live]) -> None:
    """One that streams gets a token in each step, however many long prompts arrive."""
    live = start(max_num_batched_tokens=16, max_num_seqs=16, enable_prefix_caching=False)
    client = live.service.client
    with open_request(live, stream=True, max_tokens=60) as first:
        first.recv(10)
        prompts = [[i % 300 + 5] * 200 for i in range(24)]  # 4,800 tokens: over 300 steps
        with open_request(live, prompt=prompts, max_tokens=2):
            live.wait_until(lambda: client.load.num_waiting > 0)
            data = b""
            while b"[DONE]" not in data:
                data += first.recv(1 << 16)
            assert client.num_sequences > 12
    live.wait_until_idle()


def test_requests_that_join_and_leave_at_random(start: Callable[..., Live]) -> None:
    """Many clients, a quarter of them leaving early, a pool too small: nothing leaks."""
    live = start(block_size=8, num_kv_blocks=40)

    def work(number: int) -> None:
        for turn in range(3):
            stream = (number + turn) % 2 == 0
            body = LONG | {"prompt": [number + 5] * 20, "max_tokens": 30, "stream": stream}
            if (number + turn) % 4 == 0:
                with open_request(live, **body) as sock:
                    sock.recv(50)
            else:
                assert request(live.port, "POST", TEXT, body)[0] == 200

    threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    live.wait_until_idle()
    # An abort that races the end of its request: each ended exactly once.
    lines = request(live.port, "GET", "/metrics")[2].decode().splitlines()
    ended = [line for line in lines if line.startswith("nanovllm:request_success_total")]
    assert sum(float(line.split()[-1]) for line in ended) == 12 * 3
    live.wait_until(lambda: live.service.num_open == 0)


def test_keep_alive_connections_serve_many_requests(live: Live) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", live.port, timeout=60)
    for body in (b"{", json.dumps({"prompt": "a", "max_tokens": 1}).encode()) * 3:
        connection.request("POST", TEXT, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert response.status == (400 if body == b"{" else 200)
        response.read()
    connection.close()


def test_a_model_without_template_refuses_chat_alone(
    start: Callable[..., Live], model_dir: Path, tmp_path: Path
) -> None:
    for path in model_dir.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    make_tokenizer(tmp_path, None)
    live = start(model=tmp_path)
    body = {"messages": [{"role": "user", "content": "a"}]}
    status, _, answer = request(live.port, "POST", CHAT, body)
    assert status == 400
    assert "chat template" in assert_error(answer)["message"]
    assert request(live.port, "POST", TEXT, {"prompt": "a", "max_tokens": 1})[0] == 200
