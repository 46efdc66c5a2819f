"""Shared fixtures: directories of small random models, made once a session."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_models import make_model, make_text_model


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
