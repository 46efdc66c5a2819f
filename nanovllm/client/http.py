"""httpx2, set up for one server, and its errors in our words. Knows no JSON and no models.

Follows no redirects, and uses no proxy from the environment: most servers are on this machine or
in this network, where a proxy would be in the way, and a measurement would measure it too.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager

import httpx2

from nanovllm import __version__
from nanovllm.errors import ConfigError, NanoVLLMError

CONNECT_SECONDS = 10.0
KEPT_SECONDS = 4.0  # less than servers keep idle connections (uvicorn: 5), or both ends race


class ConnectionFailedError(NanoVLLMError):
    """No answer, or not a whole one; kind is a word for statistics."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def server_url(text: str) -> httpx2.URL:
    """Without a path, /v1 is meant. Raises ConfigError."""
    try:
        url = httpx2.URL(text)
    except httpx2.InvalidURL as error:
        raise ConfigError(f"{text!r} is no address: {error}") from None
    if (
        url.scheme not in ("http", "https")
        or not url.host
        or url.userinfo
        or (url.port or 0) > 65535
    ):
        raise ConfigError(f"{text!r} is no address like http://127.0.0.1:8000")
    return url.copy_with(path=url.path.rstrip("/") or "/v1", query=None, fragment=None)


def new_client(url: httpx2.URL, headers: Mapping[str, str]) -> httpx2.AsyncClient:
    """As many connections as there are requests at once, and no limit on how long answers take."""
    return httpx2.AsyncClient(
        base_url=url,
        headers={
            "User-Agent": f"nanovllm/{__version__}",
            "Accept-Encoding": "identity",
            **headers,
        },
        timeout=httpx2.Timeout(None, connect=CONNECT_SECONDS),
        limits=httpx2.Limits(keepalive_expiry=KEPT_SECONDS),
        verify=ssl.create_default_context(),
        trust_env=False,
    )


@asynccontextmanager
async def request(
    client: httpx2.AsyncClient, method: str, url: httpx2.URL | str, body: bytes | None = None
) -> AsyncIterator[httpx2.Response]:
    """The answer once its head is there; what was not read of it by the end closes the connection.

    Raises ConnectionFailedError, for the reading within it too.
    """
    headers = {} if body is None else {"Content-Type": "application/json"}
    begun = False
    try:
        async with client.stream(method, url, content=body, headers=headers) as response:
            begun = True
            yield response
    except (httpx2.HTTPError, UnicodeError) as error:  # a host name that no name server can take
        raise _in_words(error, client.base_url.netloc.decode(), begun) from None


async def read(response: httpx2.Response, limit: int) -> bytes:
    """The whole body. Raises ConnectionFailedError if it is over limit bytes."""
    body = bytearray()
    async for piece in response.aiter_bytes():
        body += piece
        if len(body) > limit:
            raise ConnectionFailedError("bad answer", f"the answer is over {limit} bytes")
    return bytes(body)


def _in_words(error: Exception, server: str, begun: bool) -> ConnectionFailedError:
    if isinstance(error, httpx2.ConnectTimeout):
        return ConnectionFailedError(
            "connect timeout", f"{server} did not answer in {CONNECT_SECONDS:g} s"
        )
    if isinstance(error, httpx2.ConnectError | UnicodeError):
        causes = list(_causes(error))
        if any(isinstance(cause, ConnectionRefusedError) for cause in causes):
            return ConnectionFailedError("connection refused", f"nothing listens on {server}")
        reasons = [getattr(cause, "strerror", None) for cause in causes]
        reason = next((text for text in reversed(reasons) if text), None) or str(error)
        return ConnectionFailedError("connect error", f"cannot connect to {server}: {reason}")
    # The library has one class for a server that closes and for one that speaks no HTTP.
    if isinstance(error, httpx2.NetworkError) or "without sending" in str(error):
        if begun:
            return ConnectionFailedError(
                "cut off", "the server closed the connection in the middle of its answer"
            )
        return ConnectionFailedError("connection closed", f"{server} closed without an answer")
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return ConnectionFailedError("bad answer", f"the answer is not as HTTP says: {reason}")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """What an error was raised from, the first reason last."""
    if error is None:
        return
    yield error
    for inner in error.exceptions if isinstance(error, BaseExceptionGroup) else ():
        yield from _causes(inner)
    yield from _causes(error.__cause__ or error.__context__)
