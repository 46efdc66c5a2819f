"""A small random model with a tokenizer of its own, and live servers in front of it.

Most tests share one server that runs inside the test process; those that send signals start the
real command.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .live_server import Gate, Live, make_model


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("server") / "tiny"
    directory.mkdir()
    make_model(directory)
    return directory


@pytest.fixture(scope="session")
def live(model_dir: Path) -> Iterator[Live]:
    server = Live(model_dir)
    yield server
    server.close()


@pytest.fixture
def start(model_dir: Path) -> Iterator[Callable[..., Live]]:
    """start(server={...}, **engine) is a server of one's own, closed after the test."""
    servers: list[Live] = []

    def make(server: dict[str, Any] | None = None, **engine: Any) -> Live:
        servers.append(Live(engine.pop("model", model_dir), server, **engine))
        return servers[-1]

    yield make
    for server in servers:
        server.close()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)
