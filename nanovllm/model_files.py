"""Finds a model's directory and reads what is in it, weights excepted.

A model is named by a directory in Hugging Face format, by one of the names that ship inside the
package ("demo", "demo-draft"), or by a name on the Hugging Face hub, which is fetched.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanovllm.errors import ModelLoadError
from nanovllm.records import whole
from nanovllm.text.chat import ChatTemplate
from nanovllm.text.tokenizer import Tokenizer, read_json

ASSETS = Path(__file__).parent / "assets"
EMBEDDED = ("demo", "demo-draft")
HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja"]
HUB_DUPLICATES = ["consolidated*", "original/*"]  # the same weights in another layout


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """config is config.json; generation is generation_config.json, empty if there is none."""

    directory: Path
    config: dict[str, Any]
    generation: dict[str, Any]

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_directory(self.directory)

    def chat_template(self, tokenizer: Tokenizer) -> ChatTemplate:
        return ChatTemplate.from_directory(self.directory, tokenizer)

    def eos_token_ids(self) -> tuple[int, ...]:
        """All token ids that end a text, sorted; ids beyond the vocabulary can never come."""
        return tuple(token_id for token_id in self._end_ids() if self._is_token(token_id))

    def unusable_eos_token_ids(self) -> tuple[int, ...]:
        """Those that are beyond the vocabulary."""
        return tuple(token_id for token_id in self._end_ids() if not self._is_token(token_id))

    def _end_ids(self) -> list[int]:
        found: set[int] = set()
        for name, source in (
            ("config.json", self.config),
            ("generation_config.json", self.generation),
        ):
            value = source.get("eos_token_id")
            ids = value if isinstance(value, list) else [] if value is None else [value]
            if any(whole(token_id) is None for token_id in ids):
                raise ModelLoadError(
                    f"{name}: eos_token_id must be an integer or a list of them, got {value!r:.100}"
                )
            found.update(ids)
        return sorted(found)

    def _is_token(self, token_id: int) -> bool:
        vocab_size = whole(self.config.get("vocab_size"))
        return token_id >= 0 and (vocab_size is None or token_id < vocab_size)


def find_model(name: str) -> ModelFiles:
    """Raises ModelLoadError saying what is missing, or why a hub name could not be fetched."""
    directory = _directory(name)
    config_path = directory / "config.json"
    if not config_path.exists():
        raise ModelLoadError(f"{directory} has no config.json: it is not a model directory")
    generation = read_json(directory / "generation_config.json")
    return ModelFiles(directory, read_json(config_path), generation)


def _directory(name: str) -> Path:
    if name in EMBEDDED:  # whatever the working directory holds; ./demo names a directory there
        return ASSETS / name
    expanded = os.path.expanduser(name)  # it leaves the home of nobody as it is
    path = Path(expanded)
    if path.is_dir():
        return path
    if path.exists():
        raise ModelLoadError(f"{name} is a file; a model is a directory with config.json")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ModelLoadError(f"there is no directory {expanded}")
    return _fetch(name)


def _fetch(name: str) -> Path:
    import huggingface_hub  # slow to import, and needed for hub names alone

    try:
        directory = huggingface_hub.snapshot_download(
            name, allow_patterns=HUB_PATTERNS, ignore_patterns=HUB_DUPLICATES
        )
        return Path(directory)
    except huggingface_hub.errors.RepositoryNotFoundError:
        reason = "there is no such model, or it needs a token (HF_TOKEN) that may read it"
    except Exception as error:  # network, offline mode, full disk: one line for each
        reason = next(iter(str(error.__cause__ or error).splitlines()), type(error).__name__)
    raise ModelLoadError(
        f"{name!r} is no directory here and could not be fetched from the hub: {reason}"
    )
