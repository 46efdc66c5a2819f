"""Puts a load on a server and notes when each piece of an answer came. Knows no statistics.

An open loop (a rate) sends when it is time, whatever the server does; a closed loop (a number of
clients) sends when the answer before is complete. Two figures say whether the generator itself
was fast enough: how late requests went out, and how long its event loop was kept from looking.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from nanovllm.bench.traffic import Load, Planned
from nanovllm.client.api import ApiClient, RemoteError

TICK_SECONDS = 0.005
Body = Callable[[Planned], Mapping[str, Any]]


@dataclass(slots=True)
class Record:
    """One request. Times in seconds after the load's begin; failure is a kind, None for success.

    first is when the first text came; gaps are the seconds between pieces of text after it.
    """

    scheduled: float
    started: float
    first: float | None = None
    ended: float = 0.0
    gaps: list[float] = field(default_factory=list)
    num_prompt: int = 0
    num_cached: int = 0
    num_output: int = 0
    failure: str | None = None
    message: str | None = None


@dataclass(frozen=True, slots=True)
class Measured:
    """stalls: how much later than asked the event loop woke up, every few milliseconds."""

    load: Load
    records: list[Record]
    stalls: list[float]


async def measure(
    api: ApiClient,
    path: str,
    load: Load,
    requests: Sequence[Planned],
    body: Body,
    *,
    timeout: float,
    tell: Callable[[int, int], None] = lambda done, count: None,
) -> Measured:
    """All requests under one load. tell hears of (done, all) after each."""
    records: list[Record] = []
    stalls: list[float] = []
    begin = time.perf_counter()
    num_done = 0

    async def send(request: Planned) -> None:
        nonlocal num_done
        now = time.perf_counter() - begin
        record = Record(request.at if load.kind == "rate" else now, now)
        records.append(record)
        await _one(api, path, body(request), record, begin, timeout)
        num_done += 1
        tell(num_done, len(requests))

    watch = asyncio.create_task(_watch(stalls))
    try:
        if load.kind == "rate":
            await _open_loop(requests, send, begin)
        else:
            rest = iter(requests)
            async with asyncio.TaskGroup() as clients:
                for _ in range(int(load.value)):
                    clients.create_task(_client(rest, send))
    finally:
        watch.cancel()
    return Measured(load, records, stalls)


async def _open_loop(
    requests: Sequence[Planned], send: Callable[[Planned], Any], begin: float
) -> None:
    async with asyncio.TaskGroup() as running:
        for request in requests:
            wait = request.at - (time.perf_counter() - begin)
            if wait > 0:
                await asyncio.sleep(wait)
            running.create_task(send(request))


async def _client(rest: Iterator[Planned], send: Callable[[Planned], Any]) -> None:
    for request in rest:
        await send(request)


async def _watch(stalls: list[float]) -> None:
    while True:
        before = time.perf_counter()
        await asyncio.sleep(TICK_SECONDS)
        stalls.append(max(0.0, time.perf_counter() - before - TICK_SECONDS))


async def _one(
    api: ApiClient, path: str, body: Mapping[str, Any], record: Record, begin: float, timeout: float
) -> None:
    """Sends one request and fills its record; a failure is noted, not raised."""
    try:
        async with asyncio.timeout(timeout), aclosing(api.stream(path, body)) as chunks:
            last = 0.0
            async for chunk in chunks:
                now = time.perf_counter() - begin
                if _has_text(chunk):
                    if record.first is None:
                        record.first = now
                    else:
                        record.gaps.append(now - last)
                    last = now
                if chunk.get("usage"):
                    _count(record, chunk["usage"])
                record.ended = now
        if record.first is None:  # an answer of special tokens alone, or of nothing
            record.first = record.ended = time.perf_counter() - begin
    except TimeoutError:
        record.failure, record.message = "timeout", f"no whole answer in {timeout:g} s"
    except RemoteError as error:
        record.failure, record.message = error.kind, str(error)
    if record.failure is not None:
        record.ended = time.perf_counter() - begin
    elif not record.num_output:
        record.num_output = len(record.gaps) + 1  # a server that counts no tokens: one a piece


def _has_text(chunk: Mapping[str, Any]) -> bool:
    for choice in chunk.get("choices") or ():
        delta = choice.get("delta") or {}
        if choice.get("text") or delta.get("content"):
            return True
        if delta.get("reasoning_content") or delta.get("reasoning") or delta.get("tool_calls"):
            return True
    return False


def _count(record: Record, usage: Mapping[str, Any]) -> None:
    record.num_prompt = usage.get("prompt_tokens") or 0
    record.num_output = usage.get("completion_tokens") or 0
    record.num_cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
