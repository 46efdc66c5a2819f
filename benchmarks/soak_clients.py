"""The clients of soak.py: polite ones, early leavers, slow readers and hostile ones.

Plain sockets and bytes, so that requests may be as wrong as they like. Each records how it ended;
what a client of its kind should never see goes to `unexpected`.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import random
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any

PATIENCE = 240.0  # for one whole request, in seconds
HALF_OPEN_SECONDS = 20.0
MAX_HALF_OPEN = 16
NUM_LARGE = 3  # of the largest bodies at once, before anything is measured
WORDS = "paged blocks hold keys and values of tokens that a prompt shares with another".split()
BUSY = 429


async def connect(port: int, **options: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", port, **options)


def post(body: bytes, path: str = "/v1/completions", length: int | None = None) -> bytes:
    """A whole request; length is what its header claims."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: soak\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: "
        f"{len(body) if length is None else length}\r\n\r\n"
    )
    return head.encode() + body


def parse(answer: bytes) -> tuple[int, bytes]:
    """(status, body); chunked bodies keep their chunk lines. Status 0: closed without an answer."""
    head, _, body = answer.partition(b"\r\n\r\n")
    words = head.split(b" ", 2)
    return (int(words[1]) if len(words) > 1 else 0), body


async def exchange(port: int, sent: bytes) -> tuple[int, bytes]:
    """Sends, reads until the server closes. A connection that breaks counts as closed."""
    reader, writer = await connect(port)
    answer = b""
    try:
        with contextlib.suppress(ConnectionError):
            writer.write(sent)
            await writer.drain()
        with contextlib.suppress(ConnectionError):
            while piece := await reader.read(1 << 16):
                answer += piece
    finally:
        await hang_up(writer)
    return parse(answer)


async def hang_up(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


async def ask(port: int, body: dict[str, Any]) -> tuple[int, Any]:
    status, answer = await exchange(port, post(json.dumps(body).encode()))
    return status, json.loads(answer)


async def get(port: int, path: str) -> bytes:
    sent = f"GET {path} HTTP/1.1\r\nHost: soak\r\nConnection: close\r\n\r\n".encode()
    status, body = await exchange(port, sent)
    assert status == 200, f"{path} answers {status}"
    return body


async def get_json(port: int, path: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(await get(port, path))
    return found


async def metric(port: int) -> dict[str, float]:
    """The counters that tell what the run was like; errors are of sequences."""
    found: dict[str, float] = collections.defaultdict(float)
    for line in (await get(port, "/metrics")).decode().splitlines():
        name, _, rest = line.partition("{")
        if not name.endswith("_total") or line.startswith("#"):
            continue
        value = float(rest.rsplit(" ", 1)[1])
        found[name.partition(":")[2].removesuffix("_total")] += value
        found["errors"] += value * ('finished_reason="error"' in rest)
    return dict(found)


class Clients:
    """What they do is drawn from rng, prompts of about max_tokens at most; outcomes count ends."""

    def __init__(
        self,
        port: int,
        max_tokens: int,
        rng: random.Random,
        *,
        leaving: float,
        hostile: float,
        slow: float,
    ) -> None:
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.unexpected: list[str] = []
        self._port = port
        self._max_tokens = max_tokens
        self._rng = rng
        self._shares = (leaving, hostile, slow)
        self._half_open: set[asyncio.Task[None]] = set()
        self._attacks: list[Callable[[], Awaitable[tuple[str, int]]]] = [
            self._malformed, self._deep, self._claims_too_much, self._oversized, self._headers,
            self._wrong_numbers, self._long_text, self._half_sent, self._never_ending_head,
            self._garbage,
        ]  # fmt: skip

    async def run(self, deadline: float) -> None:
        """One client after the other, until the deadline."""
        while time.monotonic() < deadline:
            leaving, hostile, slow = self._shares
            dice = self._rng.random()
            if dice < hostile:
                await self._attack(self._rng.choice(self._attacks))
            elif dice < hostile + slow:
                await self._guarded("slow", self._slow())
            elif dice < hostile + slow + leaving:
                await self._guarded("left early", self._leave())
            else:
                await self._guarded("polite", self._polite())

    async def one_of_each(self) -> None:
        """So that whatever the server makes on first use is made, and its buffers have grown.

        Memory that large bodies took stays with the allocator, as much as they took at once.
        """
        large = (self._oversized, self._long_text)
        await asyncio.gather(*(self._attack(attack) for attack in large * NUM_LARGE))
        for attack in self._attacks:
            await self._attack(attack)
        for name, work in (("slow", self._slow), ("left early", self._leave)):
            await self._guarded(name, work())
        for _ in range(4):
            await self._guarded("polite", self._polite())
        await self.close()

    async def close(self) -> None:
        for task in list(self._half_open):
            task.cancel()
        await asyncio.gather(*self._half_open, return_exceptions=True)

    async def _guarded(self, kind: str, work: Awaitable[str]) -> None:
        try:
            async with asyncio.timeout(PATIENCE):
                outcome = await work
        except Exception as error:
            self.unexpected.append(f"{kind}: {type(error).__name__}: {error}")
            outcome = "failed"
        self.outcomes[f"{kind}: {outcome}"] += 1
        if outcome == "refused":
            await asyncio.sleep(self._rng.uniform(0.1, 0.5))

    # --- requests that mean well ------------------------------------------------------------

    def _body(self) -> dict[str, Any]:
        rng = self._rng
        length = rng.randint(1, self._max_tokens)
        if rng.random() < 0.5:  # these begin alike, for the prefix cache
            prompt: Any = [*range(20, 20 + length), *(rng.randint(20, 250) for _ in range(8))]
        else:
            prompt = " ".join(rng.choices(WORDS, k=1 + length // 6))
        body: dict[str, Any] = {
            "prompt": prompt, "max_tokens": rng.randint(16, 160), "ignore_eos": True,
            "temperature": rng.choice([0, 0.7, 1]), "stream": rng.random() < 0.7,
        }  # fmt: skip
        if rng.random() < 0.2:
            body["n"] = rng.randint(2, 4)
        if rng.random() < 0.2:
            body["logprobs"] = rng.randint(0, 5)
        if rng.random() < 0.2:
            body["stop"] = [rng.choice(["the", "\n", "ee"])]
        return body

    async def _polite(self) -> str:
        body = self._body()
        status, answer = await exchange(self._port, post(json.dumps(body).encode()))
        if status == BUSY:
            return "refused"
        ended = answer.count(b'"finish_reason":"')
        whole = ended == body.get("n", 1) and (not body["stream"] or b"[DONE]" in answer)
        if status != 200 or not whole:
            self.unexpected.append(f"polite: {status}, {ended} ends: {answer[-300:]!r}")
            return "failed"
        return "answered"

    async def _leave(self) -> str:
        """Closes the connection after some pieces, or some time."""
        # Theirs alone may come first or last: a late one never has to end.
        body = self._body() | {"max_tokens": 300, "priority": self._rng.randint(-1, 1)}
        reader, writer = await connect(self._port)
        try:
            writer.write(post(json.dumps(body).encode()))
            pieces = self._rng.randint(0, 8)
            with contextlib.suppress(TimeoutError, ConnectionError):
                async with asyncio.timeout(self._rng.uniform(0.01, 2)):
                    for _ in range(pieces):
                        if not await reader.read(1 << 14):
                            break
        finally:
            writer.transport.abort() if self._rng.random() < 0.5 else await hang_up(writer)
        return "gone"

    async def _slow(self) -> str:
        """Reads a large answer drop by drop, through a small window."""
        body = self._body() | {"stream": True, "n": 3, "logprobs": 5, "max_tokens": 100}
        body.pop("stop", None)
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self._port))
        reader, writer = await asyncio.open_connection(sock=sock, limit=4096)
        answer = b""
        try:
            writer.write(post(json.dumps(body).encode()))
            while piece := await reader.read(4096):
                answer += piece
                await asyncio.sleep(0.02)
        finally:
            await hang_up(writer)
        status, _ = parse(answer)
        if status == BUSY:
            return "refused"
        if status != 200 or answer.count(b'"finish_reason":"length"') != 3:
            self.unexpected.append(f"slow: {status}: {answer[-300:]!r}")
            return "failed"
        return "answered"

    # --- requests that do not ---------------------------------------------------------------

    async def _attack(self, attack: Callable[[], Awaitable[tuple[str, int]]]) -> None:
        try:
            async with asyncio.timeout(PATIENCE):
                name, status = await attack()
        except Exception as error:
            self.unexpected.append(f"{attack.__name__}: {type(error).__name__}: {error}")
            return
        self.outcomes[f"hostile {name}: {status or 'closed'}"] += 1
        if status == 200 or status >= 500:
            self.unexpected.append(f"hostile {name} got {status}")

    async def _send(self, name: str, sent: bytes) -> tuple[str, int]:
        return name, (await exchange(self._port, sent))[0]

    async def _malformed(self) -> tuple[str, int]:
        return await self._send("not JSON", post(b'{"prompt": "x", "max_tokens": '))

    async def _deep(self) -> tuple[str, int]:
        return await self._send("deep", post(b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000))

    async def _claims_too_much(self) -> tuple[str, int]:
        return await self._send("claims 1 TiB", post(b"{}", length=1 << 40))

    async def _oversized(self) -> tuple[str, int]:
        head = (
            b"POST /v1/completions HTTP/1.1\r\nHost: soak\r\nConnection: close\r\n"
            b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        chunk = b"100000\r\n" + b"x" * (1 << 20) + b"\r\n"
        return await self._send("33 MiB", head + chunk * 33 + b"0\r\n\r\n")

    async def _headers(self) -> tuple[str, int]:
        many = b"".join(b"X-%d: y\r\n" % i for i in range(2000))
        return await self._send("2000 headers", b"GET /load HTTP/1.1\r\n" + many + b"\r\n")

    async def _wrong_numbers(self) -> tuple[str, int]:
        wrong = self._rng.choice(
            ['"prompt": [-1]', '"prompt": [9223372036854775808]', '"prompt": "x", "n": 1e400',
             '"prompt": "x", "temperature": NaN', '"prompt": "x", "max_tokens": true',
             '"prompt": [[]]', '"prompt": "x", "logit_bias": {"x": 1}']
        )  # fmt: skip
        return await self._send("wrong numbers", post(b"{" + wrong.encode() + b"}"))

    async def _long_text(self) -> tuple[str, int]:
        return await self._send("400k words", post(b'{"prompt": "' + b"word " * 400_000 + b'"}'))

    async def _half_sent(self) -> tuple[str, int]:
        return await self._hold("half a body", post(b'{"prompt": "x', length=1000))

    async def _never_ending_head(self) -> tuple[str, int]:
        return await self._hold("half a head", b"POST /v1/completions HTTP/1.1\r\nHost: so")

    async def _hold(self, name: str, sent: bytes) -> tuple[str, int]:
        """Keeps the connection open in the background."""

        async def hold() -> None:
            _, writer = await connect(self._port)
            try:
                writer.write(sent)
                await asyncio.sleep(HALF_OPEN_SECONDS)
            finally:
                await hang_up(writer)

        if len(self._half_open) < MAX_HALF_OPEN:
            task = asyncio.create_task(hold())
            self._half_open.add(task)
            task.add_done_callback(self._half_open.discard)
            await asyncio.sleep(0.05)
        return name, 0

    async def _garbage(self) -> tuple[str, int]:
        return await self._send("garbage", self._rng.randbytes(5000) + b"\r\n\r\n")
