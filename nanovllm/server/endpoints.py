"""The list of endpoints, which routes and the OpenAPI document are made of, and the small ones."""

from __future__ import annotations

from importlib.resources import files

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from nanovllm import __version__
from nanovllm.server import answers, schemas, validate
from nanovllm.server.chat import chat_completions
from nanovllm.server.completions import completions
from nanovllm.server.errors import invalid, unavailable
from nanovllm.server.http import json_response, read_body
from nanovllm.server.openapi import Endpoint, document
from nanovllm.server.service import Service

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


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


async def page(request: Request) -> Response:
    source = files("nanovllm.server").joinpath("page.html").read_text(encoding="utf-8")
    return HTMLResponse(source, headers=PAGE_HEADERS)


async def openapi(request: Request) -> Response:
    return json_response(document(ENDPOINTS, keyed=bool(_service(request).config.api_keys)))


def _model(service: Service, name: str) -> answers.Model:
    return answers.Model(
        id=name,
        object="model",
        created=service.created,
        owned_by="nanovllm",
        root=service.names[0],
        parent=None,
        max_model_len=service.client.max_prompt_len if service.client.info else None,
    )


async def list_models(request: Request) -> Response:
    service = _service(request)
    cards = [_model(service, name) for name in service.names]
    return json_response(answers.ModelList(object="list", data=cards))


async def get_model(request: Request) -> Response:
    service = _service(request)
    return json_response(_model(service, service.model_name(request.path_params["name"])))


async def health(request: Request) -> Response:
    return _status(_service(request).client.trouble())


async def ready(request: Request) -> Response:
    return _status(_service(request).trouble())


def _status(trouble: str | None) -> Response:
    if trouble is not None:
        raise unavailable(trouble)
    return json_response(answers.Status(status="ok"))


async def load(request: Request) -> Response:
    service = _service(request)
    now, info = service.client.load, service.client.info
    return json_response(
        answers.Load(
            server_load=service.client.num_sequences,
            num_requests_running=now.num_running,
            num_requests_waiting=now.num_waiting,
            num_blocks=info.num_blocks if info else 0,
            num_free_blocks=now.num_free_blocks,
            **service.metrics.totals(),
        )
    )


async def version(request: Request) -> Response:
    return json_response(answers.Version(version=__version__))


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
        answers.Tokens(count=len(token_ids), max_model_len=limits.max_prompt_len, tokens=token_ids)
    )


async def detokenize(request: Request) -> Response:
    service = _service(request)
    body = schemas.decode(await read_body(request), schemas.DetokenizeRequest)
    service.model_name(body.model)
    validate.check_token_ids(body.tokens, service.limits().vocab_size, "tokens")
    return json_response(answers.Prompt(prompt=await service.prompts.decode(body.tokens)))


CHAT = Endpoint(
    "POST",
    "/v1/chat/completions",
    chat_completions,
    "Answers a conversation, whole or as a stream",
    answers.ChatCompletion,
    body=schemas.ChatRequest,
    events=answers.ChatCompletionChunk,
    errors=(429, 503),
)
TEXT = Endpoint(
    "POST",
    "/v1/completions",
    completions,
    "Goes on with one prompt or several, whole or as a stream",
    answers.TextCompletion,
    body=schemas.CompletionRequest,
    events=answers.TextCompletionChunk,
    errors=(429, 503),
)
MODELS = Endpoint("GET", "/v1/models", list_models, "The model's names", answers.ModelList)
MODEL = Endpoint(
    "GET", "/v1/models/{name:path}", get_model, "The model by a name", answers.Model, errors=(404,)
)
ENDPOINTS = (
    CHAT,
    TEXT,
    MODELS,
    MODEL,
    CHAT.under("/chat/completions"),
    TEXT.under("/completions"),
    MODELS.under("/models"),
    MODEL.under("/models/{name:path}"),
    Endpoint(
        "POST",
        "/tokenize",
        tokenize,
        "Token ids of a prompt, or of a conversation as the model reads it",
        answers.Tokens,
        body=schemas.TokenizeRequest,
        errors=(429, 503),
    ),
    Endpoint(
        "POST",
        "/detokenize",
        detokenize,
        "The text of token ids",
        answers.Prompt,
        body=schemas.DetokenizeRequest,
        errors=(429, 503),
    ),
    Endpoint(
        "GET",
        "/health",
        health,
        "200 while the engine answers, also while requests drain",
        answers.Status,
        errors=(503,),
        open=True,
    ),
    Endpoint(
        "GET", "/ready", ready, "200 while new requests are taken", answers.Status, errors=(503,)
    ),
    Endpoint("GET", "/load", load, "What runs and waits, free KV blocks, tokens", answers.Load),
    Endpoint("GET", "/version", version, "The version of the server", answers.Version),
    Endpoint("GET", "/metrics", metrics, "Metrics for Prometheus", METRICS_TYPE),
    Endpoint("GET", "/openapi.json", openapi, "This document", "application/json"),
    # It holds nothing but itself, and asks for the key.
    Endpoint("GET", "/", page, "The chat page", "text/html; charset=utf-8", open=True),
)
