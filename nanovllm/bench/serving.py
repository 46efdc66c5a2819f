"""Measures a server over HTTP: finds its model, measures its words, warms it up, loads it.

Returns records and figures; tables, files and pictures are made elsewhere. Imports no torch: the
server has a process of its own, wherever it is.
"""

from __future__ import annotations

import asyncio
import ctypes
import secrets
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from nanovllm.bench.load import Measured, measure
from nanovllm.bench.traffic import (
    CHAT,
    PATHS,
    Load,
    Measure,
    Planned,
    Traffic,
    plan,
    request_body,
    words,
)
from nanovllm.client.api import ApiClient, RemoteError
from nanovllm.errors import ConfigError, NanoVLLMError

MEASURE_WORDS = (4, 32)  # few: they must fit a small context
WARM_UP = "warm-up"
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True, slots=True)
class Target:
    """The server and how it is asked; model None takes its first one."""

    url: str
    key: str | None = None
    model: str | None = None
    endpoint: str = CHAT
    temperature: float = 0.0
    ignore_eos: bool = True
    timeout: float = 600.0


@dataclass(slots=True)
class Session:
    """What was found out and measured so far; whole also when the run was interrupted."""

    model: str = ""
    version: str | None = None
    context: int | None = None
    measured: list[Measured] = field(default_factory=list)


def num_requests(load: Load, wanted: int | None) -> int:
    """Without a wish: 100, and at least four for each client."""
    if wanted is not None:
        return wanted
    return max(100, 4 * int(load.value)) if load.kind == "concurrency" else 100


async def run(
    session: Session,
    target: Target,
    traffic: Traffic,
    loads: Sequence[Load],
    *,
    count: int | None,
    warm_up: int,
    tell: Callable[[str], None] = lambda text: None,
) -> None:
    """Fills the session. Raises RemoteError if the server cannot be asked at all."""
    async with ApiClient(target.url, target.key) as api:
        async with _within(target.timeout, api):
            await _introduce(session, api, target)
        _check_length(session, traffic)
        tell("measuring the server's tokens per word ...")
        mark = secrets.token_hex(3)
        measured = await _measure_words(api, session.model, target, mark)

        def body(planned: Planned) -> Mapping[str, Any]:
            return request_body(
                target.endpoint,
                session.model,
                planned,
                temperature=target.temperature,
                ignore_eos=target.ignore_eos,
            )

        path = PATHS[target.endpoint]
        if warm_up:
            tell(f"warming up with {warm_up} requests ...")
            load = Load("concurrency", warm_up)
            requests = plan(traffic, load, warm_up, measured, mark, -1)
            warm = await measure(api, path, load, requests, body, timeout=target.timeout)
            _check_warm(warm)
        for stage, load in enumerate(loads):
            requests = plan(traffic, load, num_requests(load, count), measured, mark, stage)

            def progress(done: int, number: int, load: Load = load) -> None:
                tell(f"{load}: {done} of {number} requests ...")

            progress(0, len(requests))
            session.measured.append(
                await measure(
                    api, path, load, requests, body, timeout=target.timeout, tell=progress
                )
            )


async def _introduce(session: Session, api: ApiClient, target: Target) -> None:
    models = await api.models()
    if target.model is None and not models:
        raise NanoVLLMError(f"{api.url} serves no model: name one (--model)")
    session.model = target.model if target.model is not None else models[0].name
    session.context = next((m.max_model_len for m in models if m.name == session.model), None)
    session.version = await api.version()


@asynccontextmanager
async def _within(seconds: float, api: ApiClient) -> AsyncIterator[None]:
    """Raises RemoteError where it takes longer."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        said = f"{api.url}: no answer within {seconds:g} s"
        raise RemoteError(said, kind="timeout") from None


def _check_length(session: Session, traffic: Traffic) -> None:
    if session.context is not None and traffic.longest > session.context:
        raise ConfigError(
            f"requests of up to {traffic.longest} tokens do not fit the server's context of "
            f"{session.context}: a smaller --input-len, --output-len or --shared-prefix would"
        )


async def _measure_words(api: ApiClient, model: str, target: Target, mark: str) -> Measure:
    """Two short requests tell how many tokens a word has here, and what the template adds."""
    rng = Random(WARM_UP)
    found = []
    for count in MEASURE_WORDS:
        text = f"{mark} {words(rng, count)}"
        planned = Planned(text, 1, 0.0)
        body = request_body(
            target.endpoint,
            model,
            planned,
            temperature=target.temperature,
            ignore_eos=target.ignore_eos,
        )
        num_tokens = 0
        chunks = api.stream(PATHS[target.endpoint], body)
        async with _within(target.timeout, api), aclosing(chunks):
            async for chunk in chunks:
                num_tokens = (chunk.get("usage") or {}).get("prompt_tokens") or num_tokens
        found.append((count, num_tokens or count))  # a server that counts none: one a word
    return Measure.fit(found[0], found[1])


def _check_warm(warm: Measured) -> None:
    """A server that answers nothing is told before the loads."""
    failed = [record for record in warm.records if record.failure is not None]
    if len(failed) == len(warm.records):
        raise RemoteError(str(failed[0].message), kind=str(failed[0].failure))


@contextmanager
def own_server(command: Sequence[str], log: Path) -> Iterator[str]:
    """Starts a server, yields its URL, and ends it. Raises NanoVLLMError with its last words."""
    with log.open("wb") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, preexec_fn=_end_with_parent
        )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("ready:"):
                yield line.split(" API at ")[1].strip()
                break
        else:
            process.wait()
            last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["no word"]
            raise NanoVLLMError(f"the server did not start: {last[0]}")
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _end_with_parent() -> None:
    """Runs in the child, so that even a killed benchmark leaves no server behind (on Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
