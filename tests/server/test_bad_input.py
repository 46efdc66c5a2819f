"""What broken and hostile requests get; after each of them the server answers the next one."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from .live_server import Live, assert_error, request

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hi"}]
JSON = {"Content-Type": "application/json"}


@pytest.fixture(autouse=True)
def _still_answers(live: Live) -> Iterator[None]:
    yield
    status, _, answer = request(live.port, "POST", TEXT, {"prompt": "fox", "max_tokens": 1})
    assert status == 200, answer


def refused(live: Live, path: str, body: Any, status: int = 400, **headers: str) -> dict[str, Any]:
    got, _, answer = request(live.port, "POST", path, body, headers or None)
    assert got == status, answer
    return assert_error(answer)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"  ",
        b'{"prompt": "a"',
        b'{"prompt": "\xff\xfe"}',
        b'"text"',
        b"[1]",
        b"null",
        b"[" * 100_000,
        b'{"prompt":' + b"[" * 100_000,
        b'{"prompt":"a","x":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001,
        b'{"prompt": "a", "max_tokens": ' + b"9" * 10_000 + b"}",
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": Infinity}',
        b'{"prompt": "a", "temperature": 1e400}',
        b'{"prompt": "a", "logit_bias": {"5": -1e999}}',
        b'{"prompt": [' + b'"",' * 5000 + b'""]}',
        b'{"prompt": [' + b"1.5," * 5000 + b"1.5]}",
    ],
    ids=lambda body: repr(body[:30]),
)
def test_broken_bodies(live: Live, body: bytes) -> None:
    refused(live, TEXT, body, **JSON)
    refused(live, CHAT, body, **JSON)


def test_wrong_type_and_size_of_body(live: Live) -> None:
    refused(live, TEXT, b'{"prompt": "a"}', 415, **{"Content-Type": "text/plain"})
    refused(live, TEXT, b'{"prompt": "a"}', 415, **{"Content-Type": ""})
    with socket.create_connection(("127.0.0.1", live.port)) as sock:
        head = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        sock.sendall((head + f"Content-Length: {33 << 20}\r\n\r\n").encode())
        assert b" 413 " in sock.recv(100)
    with socket.create_connection(("127.0.0.1", live.port)) as sock:
        sock.sendall((head + "Transfer-Encoding: chunked\r\n\r\n").encode())
        piece = b"100000\r\n" + b" " * (1 << 20) + b"\r\n"
        try:
            for _ in range(34):
                sock.sendall(piece)
        except OSError:
            pass  # refused before all was sent
        else:
            assert b" 413 " in sock.recv(100)


@pytest.mark.parametrize(
    ("path", "start", "value", "end"),
    [
        (TEXT, b'{"prompt":[', b"5,", b"5]}"),
        (TEXT, b'{"prompt":[', b"[],", b"[]]}"),
        (TEXT, b'{"prompt":"a","x":[', b"{},", b"{}]}"),
        ("/detokenize", b'{"tokens":[', b"5,", b"5]}"),
    ],
)
def test_bodies_of_too_many_values(
    live: Live, path: str, start: bytes, value: bytes, end: bytes
) -> None:
    error = refused(live, path, start + value * (1 << 21) + end, 413, **JSON)
    assert str(1 << 20) in error["message"]


def test_too_many_prompts_are_counted_before_they_are_read(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Any] = []
    monkeypatch.setattr(live.service.prompts, "encode_all", lambda *a, **b: read.append(a))
    for prompts in (["a"] * 50_000, [[]] * 50_000):
        error = refused(live, TEXT, {"prompt": prompts})
        assert error["message"].startswith("50000 completions in one request")
    assert not read
    monkeypatch.undo()  # for the request that follows


def test_too_many_names_of_special_tokens(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live.service, "_most_characters", 1 << 20)  # as if the context were large
    content = "<think>" * 40_000
    error = refused(live, CHAT, {"messages": [{"role": "user", "content": content}]})
    assert "special tokens" in error["message"]


def test_routes_models_and_methods(live: Live) -> None:
    error = refused(live, CHAT, {"model": "none", "messages": HELLO}, 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert error["type"] == "not_found_error"
    refused(live, "/v1/none", {}, 404)
    for method, path in (("GET", CHAT), ("POST", "/health"), ("DELETE", "/v1/models")):
        status, headers, answer = request(live.port, method, path)
        assert status == 405
        assert headers["allow"]
        assert_error(answer)
    with pytest.raises(openai.NotFoundError):
        live.client().completions.create(model="none", prompt="x")


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (None, "messages"),
        ("text", "messages"),
        ([], "messages"),
        ([1], "messages[0]"),
        ([{}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "user", "content": 7}], "messages[0].content"),
        ([{"role": 1, "content": "a"}], "messages[0].role"),
        ([{"role": "pirate", "content": "a"}], "messages[0].role"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": ["a"]}], "messages[0].content[0]"),
        ([{"role": "assistant", "content": "a", "tool_calls": [{}]}], None),
    ],
)
def test_messages(live: Live, messages: Any, param: str | None) -> None:
    error = refused(live, CHAT, {"messages": messages})
    assert param is None or error["param"] == param


def test_messages_are_required(live: Live) -> None:
    assert refused(live, CHAT, {})["param"] == "messages"
    assert refused(live, TEXT, {})["param"] == "prompt"


def test_images_are_refused_and_never_fetched(live: Live) -> None:
    with socket.create_server(("127.0.0.1", 0)) as trap:
        trap.settimeout(0.3)
        url = f"http://127.0.0.1:{trap.getsockname()[1]}/image.png"
        part = {"type": "image_url", "image_url": {"url": url}}
        error = refused(live, CHAT, {"messages": [{"role": "user", "content": [part]}]})
        assert "image_url" in error["message"]
        with pytest.raises(TimeoutError):
            trap.accept()


def test_templates_of_requests_are_never_rendered(live: Live) -> None:
    body = {"messages": HELLO, "chat_template": "{{ 7 * 7 }}"}
    assert refused(live, CHAT, body)["param"] == "chat_template"
    for name in ("tokenize", "messages", "self", "chat_template", "eos_token", "a b"):
        body = {"messages": HELLO, "chat_template_kwargs": {name: False}}
        assert refused(live, CHAT, body)["param"] == "chat_template_kwargs"
    injected = [{"role": "user", "content": "{{ 7 * 7 }}{% raise %}"}]
    tokens = request(live.port, "POST", "/tokenize", {"messages": injected})[2]["tokens"]
    shown = request(live.port, "POST", "/detokenize", {"tokens": tokens})[2]["prompt"]
    assert "{{ 7 * 7 }}{% raise %}" in shown


def test_deep_tools_are_refused_not_fatal(live: Live) -> None:
    deep = b'{"a":' * 900 + b"1" + b"}" * 900
    tool = b'{"type":"function","function":{"name":"f","parameters":' + deep + b"}}"
    body = b'{"messages":[{"role":"user","content":"a"}],"max_tokens":1,"tools":[' + tool + b"]}"
    refused(live, CHAT, body, **JSON)


@pytest.mark.parametrize(
    "prompt",
    ["", [], [[]], [""], ["a", 1], [1, [2]], [[1], "a"], [[[1]]], [-1], [10**6], [2**63], [1.5],
     [True], [[1, "a"]], None, 5, {"a": 1}, [None], ["a", ""]],
)  # fmt: skip
def test_prompts(live: Live, prompt: Any) -> None:
    error = refused(live, TEXT, {"prompt": prompt})
    assert (error["param"] or "").startswith("prompt")


def test_prompts_that_are_too_long(live: Live) -> None:
    for length, status in ((255, 200), (256, 400), (100_000, 400)):
        body = {"prompt": [5] * length, "max_tokens": 4}
        got, _, answer = request(live.port, "POST", TEXT, body)
        assert got == status
    error = assert_error(answer, "context_length_exceeded")
    assert "This model's maximum context length is 256 tokens" in error["message"]
    chat = {"messages": [{"role": "user", "content": "word " * 2000}], "stream": True}
    error = refused(live, CHAT, chat)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")


def test_one_bad_prompt_refuses_all(live: Live) -> None:
    before = request(live.port, "GET", "/load")[2]["prompt_tokens"]
    refused(live, TEXT, {"prompt": [[5, 6], [7], [10**6]]})
    refused(live, TEXT, {"prompt": ["a", "b " * 5000]})
    assert request(live.port, "GET", "/load")[2]["prompt_tokens"] == before


BAD_VALUES: dict[str, list[Any]] = {
    "temperature": [-0.1, 101, True, "1", [1]],
    "top_p": [0, -1, 1.1, True, "x"],
    "top_k": [-2, 1.5, True, "x"],
    "min_p": [-0.1, 1.1, True],
    "presence_penalty": [-2.1, 2.1, True, "x"],
    "frequency_penalty": [-2.1, 2.1, True],
    "repetition_penalty": [0, -1, 101, True],
    "seed": [2**63, -(2**63) - 1, 1.5, True, "x"],
    "n": [0, -1, 129, 1.5, True, "2"],
    "max_tokens": [0, -5, 1.5, True, "5"],
    "min_tokens": [-1, 99, 2**70, True],
    "stop": ["", [""], ["a"] * 5, 5, [5], {"a": 1}],
    "stop_token_ids": [[-1], [10**6], 5, [1.5], [True], [5] * 5000],
    "logit_bias": [{"a": 1}, {"-1": 1}, {"99999999": 1}, {"5": 101}, {"5": "x"}, {"5": True},
                   {"5.0": 1}, {"٣": 1}, [1], {"1" * 5000: 1},
                   {f"{i:010}": 1 for i in range(5000)}],
    "allowed_token_ids": [[], [-1], [10**6], "x", [5] * 5000],
    "bad_words": [[""], 5, [5], ["a"] * 1001, ["a" * 66_000]],
    "ignore_eos": [1, "true"],
    "stream": [1, "yes"],
    "priority": [2**40, 1.5, "x"],
    "cache_salt": ["x" * 2000, 5],
    "stream_options": [{"include_usage": True}, 5],
    "model": [5, ["x"]],
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_VALUES)
def test_sampling_parameters(live: Live, name: str) -> None:
    for value in BAD_VALUES[name]:
        body = {"max_tokens": 8} | {name: value}
        for path, prompt in ((CHAT, {"messages": HELLO}), (TEXT, {"prompt": "fox"})):
            error = refused(live, path, prompt | body)
            assert name in (error["param"] or "") or name in error["message"], error


def test_demands_that_leave_no_token(live: Live) -> None:
    for fields in (
        {"allowed_token_ids": [2], "min_tokens": 1},
        {"allowed_token_ids": [9], "stop_token_ids": [9], "min_tokens": 1},
        {"allowed_token_ids": [live.service.tokenizer.encode("a")[0]], "bad_words": ["a"]},
    ):
        body = {"prompt": "fox", "max_tokens": 4} | fields
        assert refused(live, TEXT, body)["param"] == "allowed_token_ids"
    body = {"prompt": "fox", "max_tokens": 4, "allowed_token_ids": [9], "ignore_eos": True}
    assert request(live.port, "POST", TEXT, body)[2]["choices"][0]["finish_reason"] == "length"


def test_huge_numbers_that_only_ask_for_everything(live: Live) -> None:
    stop = {"logit_bias": {"2": 100}}  # the end token comes at once
    body = {"prompt": "fox", "max_tokens": 2**70, "top_k": 2**70, "temperature": 0} | stop
    status, _, answer = request(live.port, "POST", TEXT, body)
    assert status == 200
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_logprobs(live: Live) -> None:
    for fields in (
        {"logprobs": True, "top_logprobs": 21},
        {"logprobs": True, "top_logprobs": -1},
        {"top_logprobs": 2},
        {"logprobs": 3},
    ):
        refused(live, CHAT, {"messages": HELLO} | fields)
    for value in (21, -1, True, "x"):
        refused(live, TEXT, {"prompt": "fox", "logprobs": value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("suffix", "x"),
        ("functions", [{"name": "f"}]),
        ("prompt_logprobs", 0),
        ("prompt_logprobs", 5),
        ("skip_special_tokens", False),
        ("continue_final_message", True),
        ("audio", {"voice": "x"}),
    ],
)
def test_what_is_known_and_not_supported_is_refused_by_name(
    live: Live, name: str, value: Any
) -> None:
    for path, prompt in ((CHAT, {"messages": HELLO}), (TEXT, {"prompt": "fox"})):
        error = refused(live, path, prompt | {name: value})
        assert (error["param"], error["code"]) == (name, "unsupported_parameter")


def test_tools_of_other_kinds(live: Live) -> None:
    refused(live, CHAT, {"messages": HELLO, "tools": [{"type": "web_search"}]})
    refused(live, CHAT, {"messages": HELLO, "tools": "x"})


def test_best_of(live: Live) -> None:
    for fields in (
        {"best_of": 0},
        {"best_of": -1},
        {"best_of": 129},
        {"best_of": 2, "n": 3},
        {"best_of": True},
        {"best_of": "2"},
        {"best_of": 1.5},
        {"best_of": 2, "stream": True},
    ):
        assert refused(live, TEXT, {"prompt": "fox"} | fields)["param"] == "best_of"
    error = refused(live, CHAT, {"messages": HELLO, "best_of": 2})
    assert (error["param"], error["code"]) == ("best_of", "unsupported_parameter")


def test_more_completions_than_fit(start: Any) -> None:
    live = start({"max_waiting": 1}, max_num_seqs=2)
    for name in ("n", "best_of"):
        assert refused(live, TEXT, {"prompt": "fox", name: 4})["param"] == name
        assert request(live.port, "POST", TEXT, {"prompt": "fox", name: 3})[0] == 200


def test_long_values_give_short_answers(live: Live) -> None:
    refused(live, CHAT, {"model": "m" * 100_000, "messages": HELLO}, 404)
    refused(live, CHAT, {"messages": [{"role": "r" * 100_000, "content": "a"}]})
    refused(live, CHAT, {"messages": HELLO, "temperature": "t" * 100_000})
    refused(live, TEXT, {"prompt": "a", "logit_bias": {"k" * 100_000: 1}})
    refused(live, TEXT, {"prompt": "a", "n" * 100_000: 1, "suffix": "x"})
    assert_error(request(live.port, "GET", "/" + "p" * 10_000)[2])


# --- below the bodies -----------------------------------------------------------------------------


def test_header_floods(live: Live) -> None:
    many = {f"x-{i}": "1" for i in range(90)}
    assert request(live.port, "GET", "/health", headers=many)[0] == 200
    with socket.create_connection(("127.0.0.1", live.port)) as sock:
        lines = "".join(f"x-{i}: 1\r\n" for i in range(2000))
        sock.sendall(f"GET /health HTTP/1.1\r\nHost: x\r\n{lines}\r\n".encode())
        assert b" 431 " in sock.recv(100)
    status, _, answer = request(live.port, "GET", "/health", headers={"x-big": "a" * (64 << 10)})
    assert status == 431
    assert_error(answer)


@pytest.mark.parametrize(
    "data",
    [
        f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "GET /health HTTP/1.1\r\nno colon\r\n\r\n",
        "what is this?\r\n\r\n",
        "GET /health HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
    ],
    ids=["length and chunked", "header", "nonsense", "length"],
)
def test_what_is_not_http(live: Live, data: str) -> None:
    with socket.create_connection(("127.0.0.1", live.port), timeout=30) as sock:
        sock.sendall(data.encode())
        answer = b""
        while piece := sock.recv(1000):
            answer += piece
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *headers = head.decode().lower().split("\r\n")
    assert " 400 " in status
    names = {line.partition(":")[0] for line in headers}
    assert names >= {"content-type", "content-length", "x-request-id", "connection"}
    assert_error(json.loads(body))


def test_half_open_bodies_harm_nobody(live: Live) -> None:
    head = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    socks = []
    for _ in range(100):
        sock = socket.create_connection(("127.0.0.1", live.port))
        sock.sendall((head + "Content-Length: 100\r\n\r\n{").encode())
        socks.append(sock)
    status, _, _ = request(live.port, "POST", TEXT, {"prompt": "fox", "max_tokens": 2})
    assert status == 200
    for sock in socks:
        sock.close()
    live.wait_until(lambda: live.service.num_open == 0)


def test_bodies_together_have_a_limit(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanovllm.server.app.MAX_HELD", 10_000)
    head = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    body = {"prompt": "fox", "max_tokens": 1, "user": "x" * 5000}
    with socket.create_connection(("127.0.0.1", live.port)) as sock:
        sock.sendall((head + "Content-Length: 9000\r\n\r\n" + " " * 8000).encode())
        live.wait_until(lambda: live.service.num_held == 8000)
        status, headers, answer = request(live.port, "POST", TEXT, body)
        assert status == 429
        assert int(headers["retry-after"]) > 0
        assert_error(answer, "queue_full")
        assert request(live.port, "GET", "/health")[0] == 200
    live.wait_until(lambda: live.service.num_held == 0)
    assert request(live.port, "POST", TEXT, body)[0] == 200


def test_a_body_that_never_comes_ends(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanovllm.server.http.BODY_SECONDS", 0.2)
    head = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", live.port), timeout=30) as sock:
        sock.sendall((head + "Content-Length: 100\r\n\r\n{").encode())
        assert b" 408 " in sock.recv(100)


def test_huge_prompts_leave_health_alone(live: Live) -> None:
    text = " ".join(["word"] * 400_000)
    answers: list[Any] = []

    def send() -> None:
        answers.append(request(live.port, "POST", "/tokenize", {"prompt": text}))

    thread = threading.Thread(target=send)
    thread.start()
    times = []
    while thread.is_alive():
        began = time.monotonic()
        assert request(live.port, "GET", "/health")[0] == 200
        times.append(time.monotonic() - began)
    thread.join()
    assert answers[0][2]["count"] >= 400_000
    assert len(times) >= 3, "the text was tokenized in no time, or nobody was answered"
    assert sorted(times)[len(times) // 2] < 0.5


def test_texts_that_cannot_fit_are_not_tokenized(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a text that cannot fit was tokenized")

    limits = live.service.limits()
    text = "a" * (limits.max_prompt_chars + 1)
    monkeypatch.setattr(live.service.prompts, "encode_all", refuse)
    monkeypatch.setattr(live.service.prompts, "encode_chat", refuse)
    parts = [{"type": "text", "text": text[1:]}, {"type": "text", "text": "a"}]
    for path, body in (
        (TEXT, {"prompt": text}),
        (TEXT, {"prompt": ["short", text]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": parts}]}),
    ):
        status, _, answer = request(live.port, "POST", path, body)
        assert status == 400
        error = assert_error(answer, "context_length_exceeded")
        assert f"maximum context length is {limits.max_prompt_len} tokens" in error["message"]


def test_keys(start: Any) -> None:
    live = start({"api_keys": ("secret", "other")})
    for key in ("", "Bearer", "Bearer wrong", "Bearer secre", "Bearer secretx", "secret",
                "Basic secret", "Bearer söcret"):  # fmt: skip
        headers = {"Authorization": key.encode().decode("latin1")} if key else {}
        for path in ("/v1/models", "/metrics", "/load", "/none", "//health", "/health/x",
                     "/v1/../health", "/%68ealth", "/health?x"):  # fmt: skip
            status, found, answer = request(live.port, "GET", path, headers=headers)
            if path == "/health?x":
                assert status == 200
                continue
            assert status == 401, path
            assert found["www-authenticate"] == "Bearer"
            error = assert_error(answer, "invalid_api_key")
            assert error["type"] == "authentication_error"
            assert "secret" not in json.dumps(answer)
    assert request(live.port, "GET", "/health")[0] == 200
    for key in ("secret", "other"):
        assert live.client(key).models.list().data
    with pytest.raises(openai.AuthenticationError):
        live.client("wrong").models.list()
    for value in ("bearer secret", "BEARER   secret", " Bearer other ", "bEARER \tother"):
        headers = {"Authorization": value}
        assert request(live.port, "GET", "/v1/models", headers=headers)[0] == 200, value


@pytest.mark.parametrize("value", ["Bearer", "bearer ", "Basic c2VjcmV0", "Bearersecret", "secret"])
def test_a_header_without_a_key_is_told_what_is_needed(start: Any, value: str) -> None:
    live = start({"api_keys": ("secret",)})
    answer = request(live.port, "GET", "/v1/models", headers={"Authorization": value})[2]
    assert assert_error(answer)["message"] == "An API key is needed: Bearer, then the key."


def test_any_model(start: Any) -> None:
    live = start({"any_model": True})
    answer = live.client().completions.create(model="gpt-x", prompt="a", max_tokens=1)
    assert answer.model == "gpt-x"
