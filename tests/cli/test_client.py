"""The client against what networks and servers do to it."""

from __future__ import annotations

import asyncio
import socket
import threading
from contextlib import aclosing
from typing import Any

import pytest
from scripted_server import Scripted, answer, delta, event, scripted, stream

from nanovllm import ConfigError
from nanovllm.client.api import ApiClient, RemoteError
from nanovllm.client.http import server_url

DONE = b"data: [DONE]\n\n"


def collect(url: str, key: str | None = None) -> list[dict[str, Any]]:
    async def work() -> list[dict[str, Any]]:
        async with ApiClient(url, key) as api, aclosing(api.stream("/chat/completions", {})) as got:
            return [chunk async for chunk in got]

    return asyncio.run(work())


def texts(chunks: list[dict[str, Any]]) -> str:
    return "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks)


def test_a_stream_in_single_bytes_is_the_same_stream() -> None:
    source = b": hello\n\n" + delta("你") + delta("🙂!") + DONE
    with scripted(stream(*(source[i : i + 1] for i in range(len(source))))) as server:
        assert texts(collect(server.url)) == "你🙂!"


BROKEN: dict[str, tuple[Any, str, str]] = {
    "cut": (stream(delta("a"), end=False), "cut off", "in the middle"),
    "no done": (stream(delta("a")), "cut off", "before [DONE]"),
    "error": (stream(event({"error": {"message": "no memory"}})), "error in stream", "no memory"),
    "no json": (stream(b"data: {oops\n\n"), "bad answer", "no chunk"),
    "no stream": (answer({}), "bad answer", "without streaming"),
    "closed": ([], "connection closed", "closed without an answer"),
    "no http": ([b"SSH-2.0-x\r\n\r\n"], "bad answer", "status line"),
    "half a head": ([b"HTTP/1.1 200 OK\r\nContent-"], "connection closed", "without an answer"),
    "bad chunk": (
        [stream()[0] + b"zz\r\nxx\r\n", b"0\r\n\r\n"],
        "bad answer",
        "not as HTTP says",
    ),
    "endless": ([b"HTTP/1.1 500 No\r\n\r\n", b"x" * (1 << 17)], "bad answer", "over 65536 bytes"),
    "elsewhere": (answer({}, 302, Location="http://127.0.0.1:1"), "HTTP 302", "says 302"),
    "401": (answer({"error": {"message": "wrong key"}}, 401), "HTTP 401", "401: wrong key"),
    "429": (
        answer({"error": {"message": "full"}}, 429, Retry_After="7"),
        "HTTP 429",
        "try again in 7 s",
    ),
    "html": ([b"HTTP/1.1 502 Bad\r\nContent-Length: 9\r\n\r\n<h1>x</h>"], "HTTP 502", "<h1>x</h>"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_breaks_is_one_line_with_a_kind(name: str) -> None:
    script, kind, words = BROKEN[name]
    with scripted(script) as server, pytest.raises(RemoteError) as caught:
        collect(server.url)
    assert caught.value.kind == kind
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nothing_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(RemoteError, match="nothing listens") as caught:
        collect(f"http://127.0.0.1:{port}")
    assert caught.value.kind == "connection refused"


def test_tls_with_a_server_that_has_none() -> None:
    def reply(listener: socket.socket) -> None:
        with listener.accept()[0] as sock:
            sock.recv(1 << 16)
            sock.sendall(b"HTTP/1.1 400 Bad\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=reply, args=(listener,))
        thread.start()
        with pytest.raises(RemoteError, match=r"cannot connect to 127\.0\.0\.1") as caught:
            collect(f"https://127.0.0.1:{listener.getsockname()[1]}")
        thread.join()
    assert caught.value.kind == "connect error"
    assert "\n" not in str(caught.value)


def test_proxies_in_the_environment_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with scripted(stream(delta("a"), DONE)) as server:
        assert texts(collect(server.url)) == "a"


def test_events_are_framed_in_any_way_and_comments_are_none() -> None:
    first = b": hi\r\n\r\nid: 7\r\n\r\ndata:" + delta("a")[6:-2] + b"\r\n\r\n"
    with scripted(stream(first, b"event: x\n" + delta("b"), DONE)) as server:
        assert texts(collect(server.url)) == "ab"


def test_connections_are_kept_and_replaced_when_the_server_closed_them() -> None:
    async def work(url: str) -> None:
        async with ApiClient(url) as api:
            for _ in range(3):
                assert (await api.post("/x", b"{}")).body == {"ok": 1}
            assert server.num_connections == 1
            assert (await api.post("/x", b'{"close": 1}')).body == {"ok": 1}
            await asyncio.sleep(0.05)
            assert (await api.post("/x", b"{}")).body == {"ok": 1}
            assert server.num_connections == 2

    def respond(method: str, path: str, body: Any) -> Any:
        if body == {"close": 1}:  # says nothing of closing, and does
            head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
            return [head, b'9\r\n{"ok": 1}\r\n', b"0\r\n", b"\r\n"]
        return answer({"ok": 1})

    server = Scripted(respond)
    asyncio.run(work(server.url))
    server.close()


ADDRESSES = {
    "http://127.0.0.1:8000": "http://127.0.0.1:8000/v1",
    "http://localhost:8000/": "http://localhost:8000/v1",
    "https://host/v1/": "https://host/v1",
    "https://host:443/api/v2": "https://host/api/v2",
    "http://[::1]:80": "http://[::1]/v1",
}


def test_addresses() -> None:
    assert {url: str(server_url(url)) for url in ADDRESSES} == ADDRESSES
    for url in (
        "localhost:8000",
        "ftp://x",
        "http://",
        "http://h:99999",
        "http://u:p@h",
        "http://h\n/",
    ):
        with pytest.raises(ConfigError, match="no address"):
            server_url(url)
    with pytest.raises(ConfigError, match="plain ASCII"):
        ApiClient("http://h", "key\r\nX: y")
