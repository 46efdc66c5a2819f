"""Errors as clients see them: OpenAI's shape, always all four keys, never an inside view."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from nanovllm.errors import InvalidRequestError, NanoVLLMError
from nanovllm.sampling_params import SamplingParams

MAX_MESSAGE = 2000
_PARAMETERS = "|".join(field.name for field in fields(SamplingParams))
_NAMED = re.compile(rf"\b({_PARAMETERS})\b")
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(NanoVLLMError):
    """An answer with this status; type follows from it, code is a string or None."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        message = str(self)
        if len(message) > MAX_MESSAGE:
            message = message[:MAX_MESSAGE] + "..."
        return {
            "error": {
                "message": message,
                "type": _TYPES.get(self.status, kind),
                "param": self.param,
                "code": self.code,
            }
        }


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The request cannot be served as it is."""
    return ApiError(400, message, param=param, code=code)


def from_engine(error: InvalidRequestError) -> ApiError:
    """The same refusal for a client; the parameter is the first one that the message names."""
    named = _NAMED.search(str(error))
    return invalid(str(error), named and named[1])


def context_overflow(limit: int, num_tokens: int, param: str) -> ApiError:
    return invalid(
        f"This model's maximum context length is {limit} tokens. However, your {param} resulted "
        f"in {num_tokens} tokens; at most {limit - 1} leave room for an answer.",
        param,
        "context_length_exceeded",
    )


def text_overflow(limit: int, num_characters: int, param: str) -> ApiError:
    return invalid(
        f"This model's maximum context length is {limit} tokens. However, your {param} have "
        f"{num_characters} characters, which no {limit} tokens can hold.",
        param,
        "context_length_exceeded",
    )


def unavailable(reason: str) -> ApiError:
    return ApiError(
        503,
        f"The server cannot answer now: {reason}.",
        code="unavailable",
        headers={"Retry-After": "5"},
    )


def engine_failed() -> ApiError:
    """A request was lost inside; what happened is in the server's log, not in the answer."""
    return ApiError(500, "The engine failed while it computed this request.", code="engine_error")
