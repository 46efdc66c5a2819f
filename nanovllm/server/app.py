"""The ASGI application: routes, the gate in front of them, and errors in one shape everywhere."""

from __future__ import annotations

import hmac
import re
import secrets

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanovllm.server.endpoints import ENDPOINTS
from nanovllm.server.errors import ApiError
from nanovllm.server.http import ClientGoneError, error_response
from nanovllm.server.service import Service

MAX_HEADERS = 128
MAX_HEADER_BYTES = 32 << 10
MAX_HELD = 512 << 20  # bytes of the bodies of all requests that are not answered yet
CLIENT_CLOSED = 499  # nginx's number; nobody is left to read it
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")


def create_app(service: Service) -> ASGIApp:
    """The whole server for one service."""
    app = Starlette(
        routes=[Route(one.path, one.call, methods=[one.method]) for one in ENDPOINTS],
        exception_handlers={
            ApiError: _api_error,
            HTTPException: _http_error,
            ClientGoneError: _client_gone,
            Exception: _unexpected,
        },
    )
    app.router.redirect_slashes = False
    app.state.service = service
    return Gate(app, service)


class Gate:
    """In front of everything: request ids, limits of headers and of what all bodies hold, the key,
    and the count of requests."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service
        self._open = {one.path.encode() for one in ENDPOINTS if one.open}
        self._keys = [key.encode() for key in service.config.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = scope["headers"]
        request_id = _request_id(headers)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
            await send(message)

        refusal = _check_size(headers) or self._check_key(scope)
        if refusal is not None:
            await error_response(refusal)(scope, receive, send_with_id)
            return
        service = self._service
        taken = 0

        async def receive_some() -> Message:
            nonlocal taken
            message = await receive()
            size = len(message.get("body", b""))
            taken += size
            service.num_held += size
            if size and service.num_held > MAX_HELD:
                raise _too_much(service)
            return message

        service.num_open += 1
        try:
            await self._app(scope, receive_some, send_with_id)
        finally:
            service.num_open -= 1
            service.num_held -= taken

    def _check_key(self, scope: Scope) -> ApiError | None:
        path = scope.get("raw_path", scope["path"].encode()).partition(b"?")[0]
        if not self._keys or path in self._open:
            return None
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        given_key = _bearer_key(given)
        # Compares with every key, so that the time tells nothing.
        right = [hmac.compare_digest(given_key, key) for key in self._keys]
        if any(right):
            return None
        self._service.metrics.rejected("unauthorized")
        message = (
            "The API key is wrong." if given_key else "An API key is needed: Bearer, then the key."
        )
        challenge = {"WWW-Authenticate": "Bearer"}
        return ApiError(401, message, code="invalid_api_key", headers=challenge)


def _bearer_key(authorization: bytes) -> bytes:
    """Empty if it holds none. A scheme is written in any case, with spaces behind it (RFC 9110)."""
    scheme, _, key = authorization.strip(b" \t").partition(b" ")
    return key.strip(b" \t") if scheme.lower() == b"bearer" else b""


def _too_much(service: Service) -> ApiError:
    service.metrics.rejected("queue_full")
    message = f"The requests underway hold {MAX_HELD} bytes, the most they may. Try again later."
    return ApiError(429, message, code="queue_full", headers={"Retry-After": "1"})


def _request_id(headers: list[tuple[bytes, bytes]]) -> bytes:
    """The client's own, if it can be echoed safely."""
    for name, value in headers[:MAX_HEADERS]:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            return value
    return secrets.token_hex(16).encode()


def _check_size(headers: list[tuple[bytes, bytes]]) -> ApiError | None:
    if len(headers) > MAX_HEADERS:
        return ApiError(431, f"{len(headers)} headers; {MAX_HEADERS} are allowed.")
    size = sum(len(name) + len(value) for name, value in headers)
    if size > MAX_HEADER_BYTES:
        return ApiError(431, f"The headers have {size} bytes; {MAX_HEADER_BYTES} are allowed.")
    return None


# --- errors -------------------------------------------------------------------------------------


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError), "registered for it"
    return error_response(error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException), "registered for it"
    path = request.url.path[:200]
    said = {404: f"There is no {path} here.", 405: f"{request.method} is not allowed on {path}."}
    message = said.get(error.status_code, error.detail)
    return error_response(ApiError(error.status_code, message, headers=error.headers))


async def _client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED)


async def _unexpected(request: Request, error: Exception) -> Response:
    return error_response(ApiError(500, "The server failed.", code="internal_error"))
