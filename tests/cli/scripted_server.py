"""A server that says exactly the bytes it is told to, for clients that must survive anything."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

Script = Sequence[bytes]
MODELS = {"object": "list", "data": [{"id": "scripted", "max_model_len": 100}]}


def answer(body: Any, status: int = 200, **headers: str) -> Script:
    """A JSON answer in one piece."""
    data = json.dumps(body).encode()
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    head = f"HTTP/1.1 {status} Whatever\r\nContent-Length: {len(data)}\r\n{lines}\r\n"
    return [head.encode() + data]


def stream(*pieces: bytes, end: bool = True) -> Script:
    """A chunked event stream, one chunk a piece; without an end the connection is cut."""
    head = (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    chunks = [b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces]
    return [head, *chunks, *([b"0\r\n\r\n"] if end else [])]


def delta(text: str) -> bytes:
    return event({"choices": [{"index": 0, "delta": {"content": text}}]})


def event(value: Any) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


def _is_whole(script: Script) -> bool:
    if not script or b"\r\n\r\n" not in script[0]:
        return False
    return b"chunked" not in script[0] or script[-1] == b"0\r\n\r\n"


class Scripted:
    """respond(method, path, body) is the script of the answer; a cut one closes the connection."""

    def __init__(self, respond: Callable[[str, str, Any], Script]) -> None:
        self.requests: list[tuple[str, str, Any]] = []
        self.num_connections = 0
        self._respond = respond
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                self.num_connections += 1
                threading.Thread(target=self._talk, args=(sock,), daemon=True).start()

    def _talk(self, sock: socket.socket) -> None:
        with sock, sock.makefile("rb") as file, contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while line := file.readline():
                method, path, _ = line.decode().split()
                length = 0
                while (header := file.readline().strip()) != b"":
                    name, _, value = header.decode().partition(":")
                    length = int(value) if name.lower() == "content-length" else length
                data = file.read(length)
                if len(data) < length:
                    return  # the client ended between head and body
                body = json.loads(data) if length else None
                self.requests.append((method, path, body))
                script = self._respond(method, path, body)
                for piece in script:
                    sock.sendall(piece)
                if not _is_whole(script):
                    return

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # else the accepting thread keeps it open
        self._listener.close()


@contextmanager
def scripted(*answers: Script, models: Any = MODELS) -> Iterator[Scripted]:
    """Every GET lists the models; the POSTs get the answers in turn."""
    rest = iter(answers)
    server = Scripted(lambda method, path, body: answer(models) if method == "GET" else next(rest))
    yield server
    server.close()
