"""uvicorn as we run it: signals left to us, and its own refusals in our shape of errors."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from nanovllm.server.app import create_app
from nanovllm.server.errors import ApiError
from nanovllm.server.http import error_response
from nanovllm.server.service import Service

GRACE_SECONDS = 1


class _Protocol(HttpToolsProtocol):
    """Bytes that are no HTTP reach no application; they are answered here."""

    def send_400_response(self, msg: str) -> None:
        answer = error_response(ApiError(400, "This is not valid HTTP/1.1."))
        answer.headers["connection"] = "close"
        answer.headers["x-request-id"] = secrets.token_hex(16)
        lines = [b"%s: %s\r\n" % header for header in answer.raw_headers]
        self.transport.write(b"".join([b"HTTP/1.1 400 Bad Request\r\n", *lines, b"\r\n"]))
        self.transport.write(bytes(answer.body))
        self.transport.close()


class HttpServer(uvicorn.Server):
    """Serves an application; does not touch signals."""

    def __init__(self, service: Service) -> None:
        super().__init__(
            uvicorn.Config(
                create_app(service),
                http=_Protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=GRACE_SECONDS,
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
