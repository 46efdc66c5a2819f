"""OpenAI's interface from the client's side: models, answers whole or streamed, errors in words.

Every failure is a RemoteError with a message for a person and a kind for statistics.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import httpx2

from nanovllm.client.http import ConnectionFailedError, new_client, read, request, server_url
from nanovllm.errors import ConfigError, NanoVLLMError

MAX_BODY = 256 << 20
MAX_ERROR_BODY = 64 << 10
CONTEXT_CODE = "context_length_exceeded"


class RemoteError(NanoVLLMError):
    """The server refused, failed, or went away. status is None where no HTTP answer came."""

    def __init__(
        self,
        message: str,
        *,
        kind: str,
        status: int | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.status = status
        self.code = code
        self.retry_after = retry_after


@dataclass(frozen=True, slots=True)
class Model:
    """max_model_len is None where the server does not tell."""

    name: str
    max_model_len: int | None


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer, whatever its status; body is JSON, or text where it was none."""

    status: int
    request_id: str | None
    body: Any
    retry_after: float | None = None


class ApiClient:
    """One server. Belongs to one event loop."""

    def __init__(self, url: str, key: str | None = None) -> None:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        if key is not None and (not key.isascii() or not key.isprintable()):
            raise ConfigError("the API key must be plain ASCII")
        self._base = server_url(url)
        self.url = str(self._base)
        self._http = new_client(self._base, headers)

    async def models(self) -> list[Model]:
        """Raises RemoteError."""
        body = await self._ok("GET", "/models")
        entries = body.get("data") if isinstance(body, dict) else None
        if not isinstance(entries, list):
            raise RemoteError(f"{self.url}/models lists no models", kind="bad answer")
        return [
            Model(str(entry["id"]), _count(entry.get("max_model_len")))
            for entry in entries
            if isinstance(entry, dict) and "id" in entry
        ]

    async def version(self) -> str | None:
        """What the server says of itself, where it does."""
        try:
            body = await self._ok("GET", self._base.join("/version"))
        except RemoteError:
            return None
        found = body.get("version") if isinstance(body, dict) else None
        return None if found is None else str(found)

    async def _ok(self, method: str, url: httpx2.URL | str) -> Any:
        answer = await self._exchange(method, url)
        if answer.status != 200:
            raise explain(answer)
        return answer.body

    async def post(self, path: str, body: bytes) -> Answer:
        """path is below the server's URL. Raises RemoteError where there is no whole answer."""
        return await self._exchange("POST", path, body)

    async def _exchange(
        self, method: str, url: httpx2.URL | str, body: bytes | None = None
    ) -> Answer:
        """url is whole or below the server's. Raises RemoteError without a whole answer."""
        try:
            async with request(self._http, method, url, body) as response:
                return await _whole(response, MAX_BODY)
        except ConnectionFailedError as error:
            raise RemoteError(str(error), kind=error.kind) from None

    async def stream(
        self, path: str, body: Mapping[str, Any]
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The chunks of a streamed answer, until [DONE]. Raises RemoteError.

        Close it (aclosing) to leave early: that closes the connection, and the server aborts.
        """
        data = json.dumps({**body, "stream": True}).encode()
        try:
            async with request(self._http, "POST", path, data) as response:
                if response.status_code != 200:
                    raise explain(await _whole(response, MAX_ERROR_BODY))
                if "event-stream" not in response.headers.get("content-type", ""):
                    raise RemoteError("the server answered without streaming", kind="bad answer")
                async for chunk in _chunks(response):
                    yield chunk
        except ConnectionFailedError as error:
            raise RemoteError(str(error), kind=error.kind) from None

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


async def _whole(response: httpx2.Response, limit: int) -> Answer:
    content = await read(response, limit)
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        body = content.decode("utf-8", "replace")
    return Answer(
        response.status_code,
        response.headers.get("x-request-id"),
        body,
        _seconds(response.headers.get("retry-after")),
    )


async def _chunks(response: httpx2.Response) -> AsyncIterator[dict[str, Any]]:
    done = False
    async for event in httpx2.EventSource(response, MAX_BODY):
        if event.data == "[DONE]":
            done = True  # the connection is kept if the body ends here, as it should
        elif event.data and not done:
            yield _chunk(event.data)
    if not done:
        raise RemoteError("the stream ended before [DONE]", kind="cut off")


def _chunk(data: str) -> dict[str, Any]:
    try:
        chunk = json.loads(data)
    except (ValueError, RecursionError):
        chunk = None
    if not isinstance(chunk, dict):
        raise RemoteError(f"the stream holds what is no chunk: {data[:80]!r}", kind="bad answer")
    if chunk.get("error"):
        message, code = _error_words(chunk)
        raise RemoteError(f"the server failed: {message}", kind="error in stream", code=code)
    return chunk


def explain(answer: Answer) -> RemoteError:
    """An answer that is no 200, in one line."""
    message, code = _error_words(answer.body)
    wait = "" if answer.retry_after is None else f" (try again in {answer.retry_after:g} s)"
    return RemoteError(
        f"the server says {answer.status}: {message}{wait}",
        kind=f"HTTP {answer.status}",
        status=answer.status,
        code=code,
        retry_after=answer.retry_after,
    )


def _error_words(body: Any) -> tuple[str, str | None]:
    """(message, code) of an error in any of the shapes that servers have for it."""
    error = body.get("error", body) if isinstance(body, dict) else body
    if isinstance(error, dict):
        code = error.get("code")
        message = error.get("message") or error.get("detail") or json.dumps(error)
        return " ".join(str(message).split())[:500], None if code is None else str(code)
    return " ".join(str(error).split())[:200] or "nothing more", None


def _seconds(text: str | None) -> float | None:
    """Retry-After in seconds; its other form, a date, counts as none."""
    return float(text) if text is not None and text.isascii() and text.isdigit() else None


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
