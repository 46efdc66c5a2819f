"""The OpenAPI document of the server, made from the endpoints and the records of their bodies.

Knows how to describe, not what: the list of endpoints is in endpoints.py.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from nanovllm import __version__
from nanovllm.server import answers

ABOUT = (
    "Chat and text completions as OpenAI's clients ask for them. Fields of requests that are not "
    "described here are ignored, or refused by name if they are known and not supported. Ids of "
    "tokens must be within the vocabulary. Every GET also answers HEAD. With an API key set, every "
    "path but /health and / asks for it."
)
ERRORS = {
    400: "The request cannot be served as it is; param names what is wrong",
    401: "There is an API key, and it was not given",
    404: "There is no such model",
    408: "The body did not come in time",
    413: "The body is too large",
    415: "The body is no JSON",
    429: "Too many requests run and wait, or they hold too much",
    431: "Too many or too long headers",
    500: "The request was lost inside",
    503: "The model is loading, the server is ending, or the engine is gone",
}
OF_ALL = (431, 500)
OF_BODIES = (400, 404, 408, 413, 415)
_TEXT = {"schema": {"type": "string"}}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One method on one path.

    call    answers it
    answer  the record of its 200, or the media type of something else
    body    the record of what is sent, if anything is
    events  the record of a stream's events, if it can stream
    errors  statuses beside those that all endpoints share
    open    asks for no key
    """

    method: str
    path: str
    call: Callable[[Request], Awaitable[Response]]
    summary: str
    answer: type | str
    body: type | None = None
    events: type | None = None
    errors: tuple[int, ...] = ()
    open: bool = False

    def under(self, path: str) -> Endpoint:
        """The same on another path."""
        return dataclasses.replace(self, path=path)

    def statuses(self) -> list[int]:
        """Of errors, in order."""
        of_bodies = OF_BODIES if self.body else ()
        return sorted({*OF_ALL, *of_bodies, *self.errors, *(() if self.open else (401,))})


def document(endpoints: Sequence[Endpoint], *, keyed: bool) -> dict[str, Any]:
    """OpenAPI 3.1. keyed: an API key is set."""
    kinds: list[type] = [answers.Error]
    for one in endpoints:
        named = (one.body, one.events, one.answer)
        kinds += [kind for kind in named if isinstance(kind, type) and kind not in kinds]
    refs, schemas = msgspec.json.schema_components(
        kinds, ref_template="#/components/schemas/{name}"
    )
    by_kind = dict(zip(kinds, refs, strict=True))
    paths: dict[str, Any] = {}
    for one in endpoints:
        path = one.path.replace(":path}", "}")
        paths.setdefault(path, {})[one.method.lower()] = _operation(one, path, by_kind, keyed)
    return {
        "openapi": "3.1.0",
        "info": {"title": "nanovllm", "version": __version__, "description": ABOUT},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(
    one: Endpoint, path: str, refs: dict[type, dict[str, Any]], keyed: bool
) -> dict[str, Any]:
    found: dict[str, Any] = {
        "operationId": re.sub(r"\W+", "_", f"{one.method.lower()}{path}").rstrip("_"),
        "summary": one.summary,
        "responses": {"200": _success(one, refs)}
        | {str(status): _error(status, refs) for status in one.statuses()},
        "security": [{"key": []}] if keyed and not one.open else [],
    }
    if "{name}" in path:
        name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
        found["parameters"] = [name]
    if one.body is not None:
        content = {"application/json": {"schema": refs[one.body]}}
        found["requestBody"] = {"required": True, "content": content}
    return found


def _success(one: Endpoint, refs: dict[type, dict[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any]
    if isinstance(one.answer, str):
        content = {one.answer: {} if "json" in one.answer else _TEXT}
    else:
        content = {"application/json": {"schema": refs[one.answer]}}
    if one.events is not None:
        piece = {"anyOf": [refs[one.events], refs[answers.Error]]}
        data = {"contentMediaType": "application/json", "contentSchema": piece}
        event = {
            "description": "One event; [DONE] is the last, an error may come right before it",
            "type": "object",
            "properties": {"data": {"anyOf": [{"const": "[DONE]"}, {"type": "string", **data}]}},
            "required": ["data"],
        }
        content["text/event-stream"] = {"schema": event}
    return {"description": "The answer", "headers": _headers(200), "content": content}


def _error(status: int, refs: dict[type, dict[str, Any]]) -> dict[str, Any]:
    return {
        "description": ERRORS[status],
        "headers": _headers(status),
        "content": {"application/json": {"schema": refs[answers.Error]}},
    }


def _headers(status: int) -> dict[str, Any]:
    found = {"X-Request-Id": "The client's own, or a new one"}
    if status == 401:
        found["WWW-Authenticate"] = "Bearer"
    if status in (429, 503):
        found["Retry-After"] = "Seconds"
    return {
        name: {"required": True, "description": about, "schema": {"type": "string"}}
        for name, about in found.items()
    }
