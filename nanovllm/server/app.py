"""The ASGI application: routes, the gate in front of them, and errors in one shape everywhere."""

from __future__ import annotations

import hmac
import re
import secrets
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanovllm import __version__
from nanovllm.server import schemas, validate
from nanovllm.server.chat import chat_completions
from nanovllm.server.completions import completions
from nanovllm.server.errors import ApiError, invalid
from nanovllm.server.http import ClientGoneError, error_response, json_response, read_body
from nanovllm.server.service import Service

MAX_HEADERS = 128
MAX_HEADER_BYTES = 32 << 10
OPEN_PATHS = (b"/health", b"/")  # the page at / holds nothing but itself, and asks for the key
# The page runs its own script and style, talks to its own server, and shows nothing from elsewhere.
PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
CLIENT_CLOSED = 499  # nginx's number; nobody is left to read it
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")


def create_app(service: Service) -> ASGIApp:
    """The whole server for one service."""
    post = [
        ("/v1/chat/completions", chat_completions),
        ("/v1/completions", completions),
        ("/chat/completions", chat_completions),
        ("/completions", completions),
        ("/tokenize", tokenize),
        ("/detokenize", detokenize),
    ]
    get = [
        ("/", page),
        ("/v1/models", list_models),
        ("/v1/models/{name:path}", get_model),
        ("/models", list_models),
        ("/models/{name:path}", get_model),
        ("/health", health),
        ("/ready", ready),
        ("/load", load),
        ("/version", version),
        ("/metrics", metrics),
    ]
    app = Starlette(
        routes=[Route(path, endpoint, methods=["POST"]) for path, endpoint in post]
        + [Route(path, endpoint, methods=["GET"]) for path, endpoint in get],
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
    """In front of everything: request ids, header limits, the key, and the count of requests."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service
        self._keys = [b"Bearer " + key.encode() for key in service.config.api_keys]

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
        self._service.num_open += 1
        try:
            await self._app(scope, receive, send_with_id)
        finally:
            self._service.num_open -= 1

    def _check_key(self, scope: Scope) -> ApiError | None:
        path = scope.get("raw_path", scope["path"].encode()).partition(b"?")[0]
        if not self._keys or path in OPEN_PATHS:
            return None
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        # Compares with every key, so that the time tells nothing.
        right = [hmac.compare_digest(given, key) for key in self._keys]
        if any(right):
            return None
        self._service.metrics.rejected("unauthorized")
        message = (
            "The API key is wrong." if given else "An API key is needed: Bearer, then the key."
        )
        challenge = {"WWW-Authenticate": "Bearer"}
        return ApiError(401, message, code="invalid_api_key", headers=challenge)


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


# --- small endpoints ----------------------------------------------------------------------------


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


async def page(request: Request) -> Response:
    source = files("nanovllm.server").joinpath("page.html").read_text(encoding="utf-8")
    return HTMLResponse(source, headers=PAGE_HEADERS)


def _model_card(service: Service, name: str) -> dict[str, Any]:
    info = service.client.info
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "nanovllm",
        "root": service.names[0],
        "parent": None,
        "max_model_len": info and service.client.max_prompt_len,
    }


async def list_models(request: Request) -> Response:
    service = _service(request)
    cards = [_model_card(service, name) for name in service.names]
    return json_response({"object": "list", "data": cards})


async def get_model(request: Request) -> Response:
    service = _service(request)
    return json_response(_model_card(service, service.model_name(request.path_params["name"])))


async def health(request: Request) -> Response:
    """200 while the engine answers; it also does while running requests drain."""
    trouble = _service(request).client.trouble()
    return json_response(
        {"status": trouble or "ok"}, 200 if trouble is None else 503, _retry(trouble)
    )


async def ready(request: Request) -> Response:
    """200 while new requests are taken."""
    trouble = _service(request).trouble()
    return json_response(
        {"status": trouble or "ok"}, 200 if trouble is None else 503, _retry(trouble)
    )


def _retry(trouble: str | None) -> dict[str, str]:
    return {} if trouble is None else {"Retry-After": "5"}


async def load(request: Request) -> Response:
    service = _service(request)
    now, info = service.client.load, service.client.info
    num_blocks = info.num_blocks if info else 0
    return json_response(
        {
            "server_load": service.client.num_sequences,
            "num_requests_running": now.num_running,
            "num_requests_waiting": now.num_waiting,
            "num_blocks": num_blocks,
            "num_free_blocks": now.num_free_blocks,
            **service.metrics.totals(),
        }
    )


async def version(request: Request) -> Response:
    return json_response({"version": __version__})


async def metrics(request: Request) -> Response:
    return Response(_service(request).metrics.render(), media_type=METRICS_TYPE)


async def tokenize(request: Request) -> Response:
    service = _service(request)
    body = schemas.decode(await read_body(request), schemas.TokenizeRequest)
    service.model_name(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise invalid("give either prompt or messages", "prompt")
    limits = service.limits()
    if body.prompt is not None:
        special = body.add_special_tokens is not False
        token_ids = await service.prompts.encode(body.prompt, add_special_tokens=special)
    else:
        prompt = await service.prompts.encode_chat(
            body.messages or [],
            body.tools,
            body.chat_template_kwargs,
            add_generation_prompt=body.add_generation_prompt is not False,
        )
        token_ids = prompt.token_ids
    return json_response(
        {"count": len(token_ids), "max_model_len": limits.max_prompt_len, "tokens": token_ids}
    )


async def detokenize(request: Request) -> Response:
    service = _service(request)
    body = schemas.decode(await read_body(request), schemas.DetokenizeRequest)
    service.model_name(body.model)
    validate.check_token_ids(body.tokens, service.limits().vocab_size, "tokens")
    text = service.tokenizer.decode(body.tokens, skip_special_tokens=False)
    return json_response({"prompt": text})
