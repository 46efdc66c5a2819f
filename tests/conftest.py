"""Shared fixtures: directories of small random models, made once a session."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from tiny_models import make_model, make_text_model


def pytest_configure() -> None:
    # A shell ignores Ctrl-C in what it starts in the background, and the programs that the tests
    # start would inherit that.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """models(family) is the directory of a random model without a tokenizer."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = make_model(tmp_path_factory.mktemp("models") / family, family)
        return made[family]

    return get


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a tokenizer and a chat template."""
    return make_text_model(tmp_path_factory.mktemp("models") / "text")
