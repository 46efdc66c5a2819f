"""The edges of HTTP: reading bodies within limits, JSON and event-stream answers, clients gone.

Knows ASGI and our errors, nothing of models.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from nanovllm.server.errors import ApiError

MAX_BODY = 32 << 20
MAX_VALUES = 1 << 20  # in all lists and objects of a body; a million take a tenth of a second
BODY_SECONDS = 60.0
logger = logging.getLogger("nanovllm.server")
T = TypeVar("T")

_encode = msgspec.json.Encoder().encode
DONE = b"data: [DONE]\n\n"


class ClientGoneError(Exception):
    """The client closed its connection before the answer was complete."""


def json_response(
    value: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    return Response(_encode(value), status, headers, "application/json")


def error_response(error: ApiError) -> Response:
    return json_response(error.body(), error.status, error.headers)


def event(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + _encode(value) + b"\n\n"


async def read_body(request: Request) -> bytes:
    """Raises ApiError if the body is of another type, too large, or does not arrive."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "The content type must be application/json.")
    length = request.headers.get("content-length", "0")
    if not length.isascii() or not length.isdigit():
        raise ApiError(400, "The content length is not a number.")
    if int(length) > MAX_BODY:
        raise _too_large()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            body = await _receive_body(request.receive)
    except TimeoutError:
        raise ApiError(408, f"The body did not arrive within {BODY_SECONDS:g} s.") from None
    # Commas in texts count as well: cheap, and far from what fits a context.
    if (found := body.count(b",")) > MAX_VALUES:
        raise ApiError(413, f"The body has {found} commas: {MAX_VALUES} values are allowed.")
    return body


async def _receive_body(receive: Receive) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        body += message.get("body", b"")
        if len(body) > MAX_BODY:
            raise _too_large()
        if not message.get("more_body", False):
            return bytes(body)


def _too_large() -> ApiError:
    return ApiError(
        413, f"The body is larger than {MAX_BODY} bytes.", headers={"Connection": "close"}
    )


async def until_gone(receive: Receive, work: Awaitable[T]) -> T:
    """The result of work; cancels it and raises ClientGoneError if the client goes first."""
    task = asyncio.ensure_future(work)
    gone = asyncio.create_task(_wait_for_disconnect(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        for pending in (task, gone):
            pending.cancel()
        with contextlib.suppress(BaseException):
            await asyncio.gather(task, gone, return_exceptions=True)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends the pieces of an event stream; `failed` turns an error underway into a last event.

    first was awaited before, so that a failure before the first byte is a plain HTTP answer.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        first: bytes,
        rest: AsyncIterator[bytes],
        *,
        failed: Callable[[Exception], ApiError],
        closed: Callable[[], None],
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._first = first
        self._rest = rest
        self._failed = failed
        self._closed = closed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_gone(receive, self._send_all(send))
        except ClientGoneError:
            pass
        finally:
            self._closed()

    async def _send_all(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        await _send_piece(send, self._first)
        try:
            async for piece in self._rest:
                await _send_piece(send, piece)
            last = DONE
        except OSError:
            raise
        except Exception as error:
            last = event(self._failed(error).body()) + DONE
        await send({"type": "http.response.body", "body": last, "more_body": False})


async def _send_piece(send: Send, piece: bytes) -> None:
    await send({"type": "http.response.body", "body": piece, "more_body": True})
