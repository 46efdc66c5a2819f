"""A small HTTP/1.1 client on asyncio, for one server: JSON there, bytes back as they arrive.

Written out because a load generator must cost less than what it measures: connections are kept,
a piece of a stream costs a few microseconds, and nothing is imported but the standard library.
Follows no redirects, uses no proxy, asks for no compression. Knows no JSON and no models.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from nanovllm import __version__
from nanovllm.errors import ConfigError, NanoVLLMError

MAX_HEAD = 64 << 10
CONNECT_SECONDS = 10.0
PORTS = {"http": 80, "https": 443}


class ConnectionFailedError(NanoVLLMError):
    """No answer, or not a whole one; kind is a word for statistics."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server is; prefix is the path before every request's own."""

    scheme: str
    host: str
    port: int
    prefix: str

    @classmethod
    def parse(cls, url: str) -> Address:
        """Without a path, /v1 is meant. Raises ConfigError."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise ConfigError(f"{url!r} is no address: {error}") from None
        if parts.scheme not in PORTS or not parts.hostname or parts.username is not None:
            raise ConfigError(f"{url!r} is no address like http://127.0.0.1:8000")
        if not parts.path.isascii() or not parts.path.isprintable() or " " in parts.path:
            raise ConfigError(f"{url!r} has a path that is not plain ASCII")
        prefix = parts.path.rstrip("/") or "/v1"
        return cls(parts.scheme, parts.hostname, port or PORTS[parts.scheme], prefix)

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.authority}{self.prefix}"


class HttpClient:
    """Requests to one server. Connections are kept while nobody uses them, and then used again."""

    def __init__(self, address: Address, headers: Mapping[str, str] | None = None) -> None:
        self.address = address
        self._idle: list[_Connection] = []
        self._tls = ssl.create_default_context() if address.scheme == "https" else None
        lines = {
            "Host": address.authority,
            "User-Agent": f"nanovllm/{__version__}",
            "Accept-Encoding": "identity",
        }
        lines |= headers or {}
        for name, value in lines.items():
            if not value.isascii() or not value.isprintable():
                raise ConfigError(f"the header {name} must be plain ASCII")
        self._head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())

    async def request(self, method: str, path: str, body: bytes | None = None) -> Response:
        """The answer once its head is there; use it as an async context manager.

        Raises ConnectionFailedError. A kept connection that the server closed in the meantime is
        replaced once: it took nothing of the request.
        """
        data = self._encode(method, path, body)
        while True:
            kept = bool(self._idle)
            connection = self._idle.pop() if kept else await self._connect()
            try:
                return await self._exchange(connection, data, method)
            except _ClosedUnusedError:
                connection.close()
                if not kept:
                    raise ConnectionFailedError(
                        "connection closed", f"{self.address.authority} closed without an answer"
                    ) from None
            except BaseException:
                connection.close()
                raise

    async def _exchange(self, connection: _Connection, data: bytes, method: str) -> Response:
        try:
            connection.writer.write(data)
            await connection.writer.drain()
            status, headers = await connection.read_head()
        except OSError:
            raise _ClosedUnusedError from None
        return Response(self, connection, status, headers, has_body=method != "HEAD")

    def _encode(self, method: str, path: str, body: bytes | None) -> bytes:
        head = f"{method} {path} HTTP/1.1\r\n{self._head}"
        if body is not None:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        return head.encode() + b"\r\n" + (body or b"")

    async def _connect(self) -> _Connection:
        address = self.address
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                streams = await asyncio.open_connection(
                    address.host, address.port, ssl=self._tls, limit=MAX_HEAD
                )
        except TimeoutError:
            raise ConnectionFailedError(
                "connect timeout", f"{address.authority} did not answer in {CONNECT_SECONDS:g} s"
            ) from None
        except ConnectionRefusedError:
            raise ConnectionFailedError(
                "connection refused", f"nothing listens on {address.authority}"
            ) from None
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ConnectionFailedError(
                "connect error", f"cannot connect to {address.authority}: {reason}"
            ) from None
        return _Connection(*streams)

    def keep(self, connection: _Connection) -> None:
        self._idle.append(connection)

    async def close(self) -> None:
        """Closes what is kept; answers that are still read close their own."""
        idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()
        await asyncio.sleep(0)  # lets the transports go before their loop does

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class _ClosedUnusedError(Exception):
    """The connection ended before the first byte of an answer."""


class _Connection:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def close(self) -> None:
        self.writer.transport.abort()

    async def read_head(self) -> tuple[int, dict[str, str]]:
        """(status, headers by lower-case name); informational answers are skipped."""
        while True:
            try:
                head = await self.reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError as error:
                if error.partial:
                    raise _broken("the server closed within the head of its answer") from None
                raise _ClosedUnusedError from None
            except asyncio.LimitOverrunError:
                raise _broken(f"the answer's head is over {MAX_HEAD} bytes") from None
            first, *lines = head.decode("latin-1").split("\r\n")
            words = first.split(" ", 2)
            if not words[0].startswith("HTTP/1.") or not words[1:] or not words[1].isdigit():
                raise _broken(f"this is no HTTP: {first[:80]!r}")
            if not words[1].startswith("1"):
                pairs = (line.partition(":") for line in lines if line)
                headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
                if words[0] == "HTTP/1.0":
                    headers.setdefault("connection", "close")
                return int(words[1]), headers


def _broken(message: str) -> ConnectionFailedError:
    return ConnectionFailedError("bad answer", message)


class Response:
    """One answer. A context manager: what was not read to the end is cut off by closing."""

    def __init__(
        self,
        client: HttpClient,
        connection: _Connection,
        status: int,
        headers: dict[str, str],
        *,
        has_body: bool,
    ) -> None:
        self.status = status
        self.headers = headers
        self._client = client
        self._connection = connection
        self._complete = not has_body or status in (204, 304)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._complete and self.headers.get("connection", "").lower() != "close":
            self._client.keep(self._connection)
        else:
            self._connection.close()

    async def read(self, limit: int) -> bytes:
        """The whole body. Raises ConnectionFailedError if it is cut off or over limit bytes."""
        body = bytearray()
        async for piece in self.pieces():
            body += piece
            if len(body) > limit:
                raise _broken(f"the answer is over {limit} bytes")
        return bytes(body)

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it arrives. Raises ConnectionFailedError if it is cut off."""
        if self._complete:
            return
        try:
            async for piece in self._framed():
                yield piece
        except (asyncio.IncompleteReadError, OSError):
            raise ConnectionFailedError(
                "cut off", "the server closed the connection in the middle of its answer"
            ) from None
        except (ValueError, asyncio.LimitOverrunError):
            raise _broken("the answer is not framed as HTTP/1.1 says") from None
        self._complete = True

    def _framed(self) -> AsyncIterator[bytes]:
        if "chunked" in self.headers.get("transfer-encoding", "").lower():
            return self._chunks()
        length = self.headers.get("content-length")
        if length is not None:
            return self._counted(int(length))
        self.headers["connection"] = "close"
        return self._until_end()

    async def _chunks(self) -> AsyncIterator[bytes]:
        reader = self._connection.reader
        while size := int((await reader.readuntil(b"\r\n")).partition(b";")[0], 16):
            yield await reader.readexactly(size)
            if await reader.readexactly(2) != b"\r\n":
                raise ValueError
        while (await reader.readuntil(b"\r\n")) != b"\r\n":
            pass  # trailers

    async def _counted(self, length: int) -> AsyncIterator[bytes]:
        reader = self._connection.reader
        while length:
            piece = await reader.read(min(length, MAX_HEAD))
            if not piece:
                raise asyncio.IncompleteReadError(b"", length)
            length -= len(piece)
            yield piece

    async def _until_end(self) -> AsyncIterator[bytes]:
        while piece := await self._connection.reader.read(MAX_HEAD):
            yield piece
