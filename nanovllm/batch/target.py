"""Who answers a batch: a protocol, and a server by its URL."""

from __future__ import annotations

import json
from typing import Any, Protocol

from nanovllm.client.api import Answer, ApiClient

CONCURRENCY = 64
ENGINE_ENDED = "engine ended"  # the kind of an error that no waiting heals


class Target(Protocol):
    @property
    def concurrency(self) -> int:
        """How many requests at once are useful, where nobody says it."""
        ...

    async def post(self, path: str, body: dict[str, Any]) -> Answer:
        """path begins with /v1. Raises RemoteError where there is no whole answer."""
        ...

    async def close(self) -> None: ...


class ServerTarget:
    """Any server with OpenAI's interface. Raises ConfigError for the URL."""

    concurrency = CONCURRENCY

    def __init__(self, url: str, key: str | None) -> None:
        self._api = ApiClient(url, key)

    async def post(self, path: str, body: dict[str, Any]) -> Answer:
        return await self._api.post(path.removeprefix("/v1"), json.dumps(body).encode())

    async def close(self) -> None:
        await self._api.close()
