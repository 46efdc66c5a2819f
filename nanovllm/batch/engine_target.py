"""An engine of our own behind the server's own code, without a socket to the outside.

The same checks, answers and errors as those of `nanovllm serve`: it is the same application. The
engine runs in a process of its own, as the server's does, and ends with this one.
"""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any, Self

from nanovllm.batch.target import ENGINE_ENDED
from nanovllm.client.api import Answer, RemoteError
from nanovllm.config import EngineConfig
from nanovllm.errors import NanoVLLMError
from nanovllm.server.app import create_app
from nanovllm.server.launch import END_SECONDS, EngineProcess, make_service
from nanovllm.server.service import ServerConfig, Service
from nanovllm.server.streams import EngineDeadError

logger = logging.getLogger("nanovllm.batch")
MAX_WAITING = 1_000_000  # the batch bounds what waits, not the server's queue
NUM_AT_HAND = 32  # requests beside those that run: the next ones need not be fetched first


class EngineTarget:
    """`start` it; `close` ends its engine."""

    def __init__(self, service: Service, worker: EngineProcess) -> None:
        self._service = service
        self._worker = worker
        self._app = create_app(service)

    @classmethod
    async def start(
        cls,
        engine: EngineConfig,
        *,
        any_model: bool = False,
        chat_template: str | None = None,
    ) -> Self:
        """Loads the model. Raises NanoVLLMError."""
        config = ServerConfig(any_model=any_model, max_waiting=MAX_WAITING)
        service = make_service(config, engine, chat_template)
        target = cls(service, EngineProcess(engine))
        try:
            await service.client.connect(target._worker.sock)
            await service.client.ready()
        except BaseException as error:  # an interrupt, too
            await target.close()
            if isinstance(error, EngineDeadError):
                raise NanoVLLMError(str(error)) from None
            raise
        return target

    @property
    def concurrency(self) -> int:
        info = self._service.client.info
        assert info is not None, "it is ready"
        return info.max_num_seqs + NUM_AT_HAND

    async def post(self, path: str, body: dict[str, Any]) -> Answer:
        self._check_alive()
        call = _Call(path, json.dumps(body).encode())
        try:
            await self._app(call.scope, call.receive, call.send)
        except Exception as error:  # raised for the log, after the answer, which is a 500
            if not call.is_answered:
                raise
            logger.exception("a request failed: %r", error)
        answer = call.answer()
        if answer.status >= 500:
            self._check_alive()  # what the engine's end broke is no answer
        return answer

    def _check_alive(self) -> None:
        if self._service.client.death is not None:
            raise RemoteError(self._service.client.death, kind=ENGINE_ENDED)

    async def close(self) -> None:
        await self._service.client.close(END_SECONDS)
        self._service.close()
        self._worker.sock.close()
        started = self._service.client.info is not None
        await asyncio.to_thread(self._worker.end, started=started)


class _Call:
    """One request to an ASGI application, and its answer."""

    def __init__(self, path: str, body: bytes) -> None:
        self.scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
            ],
            "client": None,
            "server": None,
        }
        self._to_send: bytes | None = body
        self._status = 0
        self._headers: dict[bytes, bytes] = {}
        self._content = bytearray()
        self.is_answered = False

    async def receive(self) -> dict[str, Any]:
        if self._to_send is None:
            await asyncio.Event().wait()  # nothing more comes, and nobody leaves
        body, self._to_send = self._to_send, None
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            self._headers = dict(message["headers"])
        else:
            self._content += message.get("body", b"")
            self.is_answered = not message.get("more_body", False)

    def answer(self) -> Answer:
        request_id = self._headers.get(b"x-request-id", b"").decode("latin-1")
        return Answer(self._status, request_id or None, json.loads(self._content))
