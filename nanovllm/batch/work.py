"""Works through a batch: lines in, at most so many requests at once, one line out for each.

What is busy or restarting is asked again; a server that is gone ends the run, so that the lines
that are left can be done later. Knows no files and no engine.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from nanovllm.batch.lines import BadLineError, Item, answered, parse, refused, unanswered
from nanovllm.batch.output import Output
from nanovllm.batch.target import ENGINE_ENDED, Target
from nanovllm.client.api import Answer, RemoteError
from nanovllm.errors import NanoVLLMError

RETRIES, TIMEOUT = 5, 3600.0
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
BUSY = (429, 502, 503, 504)
GONE = ("connection refused", "connect timeout", "connect error", ENGINE_ENDED)
END = (0, b"")
NUM_READ_AHEAD = 64


@dataclass(frozen=True, slots=True)
class Policy:
    """retries of what is busy; timeout in seconds for each try; model replaces every body's."""

    concurrency: int
    retries: int = RETRIES
    timeout: float = TIMEOUT
    model: str | None = None


@dataclass(slots=True)
class Tally:
    """Of this run: lines answered, failed among them, skipped as done before; tokens made."""

    num_done: int = 0
    num_failed: int = 0
    num_skipped: int = 0
    num_duplicates: int = 0
    num_tokens: int = 0


class Batch:
    """One run over one input; the tally is whole at any time."""

    def __init__(
        self,
        target: Target,
        output: Output,
        policy: Policy,
        tally: Tally,
        tell: Callable[[Tally], None] = lambda tally: None,
    ) -> None:
        self.tally = tally
        self._target = target
        self._output = output
        self._policy = policy
        self._tell = tell
        self._first_lines: dict[str, int] = {}

    async def run(self, lines: Iterable[bytes]) -> None:
        """Raises OSError if the output cannot be written, NanoVLLMError if nobody answers."""
        items: asyncio.Queue[Item | None] = asyncio.Queue(self._policy.concurrency)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._sort(_Reader(lines), items))
                for _ in range(self._policy.concurrency):
                    group.create_task(self._work(items))
        except BaseExceptionGroup as group:
            raise _first(group) from None

    async def _sort(self, reader: _Reader, items: asyncio.Queue[Item | None]) -> None:
        """Requests to the queue; what is no request to the output."""
        done = self._output.done
        while (found := await reader.next()) != END:
            number, raw = found
            if not raw.strip():
                continue
            try:
                item = self._checked(parse(number, raw))
            except BadLineError as error:
                if number in done.lines:
                    self.tally.num_skipped += 1
                else:
                    self._write(refused(error))
                continue
            if item.custom_id in done.custom_ids:
                self.tally.num_skipped += 1
            else:
                await items.put(item)
        for _ in range(self._policy.concurrency):
            await items.put(None)

    def _checked(self, item: Item) -> Item:
        """Raises BadLineError if an earlier line has the custom_id."""
        first = self._first_lines.setdefault(item.custom_id, item.line)
        if first != item.line:
            self.tally.num_duplicates += 1
            raise BadLineError(
                item.line, f"custom_id {item.custom_id!r} is that of line {first}", item.custom_id
            )
        return item

    async def _work(self, items: asyncio.Queue[Item | None]) -> None:
        while (item := await items.get()) is not None:
            self._write(await self._answer(item))

    async def _answer(self, item: Item) -> dict[str, Any]:
        """The output's line. Raises NanoVLLMError if the server is gone."""
        body = (
            item.body if self._policy.model is None else item.body | {"model": self._policy.model}
        )
        wait = FIRST_WAIT
        for left in range(self._policy.retries, -1, -1):
            try:
                async with asyncio.timeout(self._policy.timeout):
                    answer = await self._target.post(item.path, body)
                if answer.status not in BUSY or not left:
                    return self._count(item, answer)
                asked = answer.retry_after
            except TimeoutError:
                said = f"no answer within {self._policy.timeout:g} s"
                return unanswered(item, "timeout", said)
            except RemoteError as error:
                if error.kind == ENGINE_ENDED or (not left and error.kind in GONE):
                    raise NanoVLLMError(str(error)) from None
                if not left:
                    return unanswered(item, error.kind.replace(" ", "_"), str(error))
                asked = None
            await asyncio.sleep(wait if asked is None else min(asked, LONGEST_WAIT))
            wait = min(2 * wait, LONGEST_WAIT)
        raise AssertionError("the last try returns or raises")

    def _count(self, item: Item, answer: Answer) -> dict[str, Any]:
        if answer.status == 503:  # whoever answers is about to end: later runs do the rest
            raise NanoVLLMError("the server takes no requests (503)")
        if isinstance(answer.body, dict):
            usage = answer.body.get("usage")
            if isinstance(usage, dict) and isinstance(usage.get("completion_tokens"), int):
                self.tally.num_tokens += usage["completion_tokens"]
        return answered(item, answer)

    def _write(self, entry: dict[str, Any]) -> None:
        self._output.write(entry)
        self.tally.num_done += 1
        self.tally.num_failed += entry["error"] is not None
        self._tell(self.tally)


class _Reader:
    """(number, line) of the input, read by a thread: a slow pipe holds up nobody else."""

    def __init__(self, lines: Iterable[bytes]) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, bytes] | OSError] = asyncio.Queue()
        self._room = threading.Semaphore(NUM_READ_AHEAD)
        self._lines = lines
        threading.Thread(target=self._read, name="nanovllm-batch-input", daemon=True).start()

    def _read(self) -> None:
        try:
            try:
                for number, line in enumerate(self._lines, 1):
                    self._put((number, line))
                self._put(END)
            except OSError as error:
                self._put(error)
        except (RuntimeError, ValueError):
            pass  # the loop or the file is closed: nobody reads on

    def _put(self, found: tuple[int, bytes] | OSError) -> None:
        self._room.acquire()
        self._loop.call_soon_threadsafe(self._queue.put_nowait, found)

    async def next(self) -> tuple[int, bytes]:
        """END after the last. Raises OSError."""
        found = await self._queue.get()
        self._room.release()
        if isinstance(found, OSError):
            raise found
        return found


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
