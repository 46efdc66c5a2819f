"""A model directory's tokenizer: text to ids and back. Immutable, safe to share."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from nanovllm.errors import InvalidRequestError, ModelLoadError

LONG_TEXT = 4000  # characters; about a millisecond


REPLACEMENT = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """The character by which byte-level BPE writes each byte (Radford et al. 2019): itself where
    it can be printed in Latin-1, else the next free one from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + n): byte for n, byte in enumerate(others)
    }


_BYTE_OF = _byte_alphabet()


class Tokenizer:
    """Wraps tokenizer.json; special tokens by name come from tokenizer_config.json."""

    def __init__(self, fast: FastTokenizer, config: dict[str, Any]) -> None:
        fast.no_padding()
        fast.no_truncation()
        self._fast = fast
        self.config = config
        added = fast.get_added_tokens_decoder().items()
        self.special_ids = frozenset(token_id for token_id, token in added if token.special)

    @classmethod
    def from_directory(cls, directory: Path) -> Tokenizer:
        """Raises ModelLoadError if the directory has no usable tokenizer.json."""
        path = directory / "tokenizer.json"
        if not path.exists():
            raise ModelLoadError(
                f"{directory} has no tokenizer.json; with skip_tokenizer_init=True prompts and "
                "outputs are token ids"
            )
        try:
            fast = FastTokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise ModelLoadError(f"{path} cannot be read: {error}") from None
        return cls(fast, read_json(directory / "tokenizer_config.json"))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Raises InvalidRequestError if text is not valid Unicode (a lone surrogate)."""
        try:
            if len(text) < LONG_TEXT:
                return self._fast.encode(text, add_special_tokens=add_special_tokens).ids
            # `encode` holds the interpreter lock until it is done; the form for batches does not.
            (found,) = self._fast.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            return found.ids
        except (UnicodeEncodeError, TypeError):  # the library's ways to refuse it
            raise InvalidRequestError(_what_is_wrong(text)) from None

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self._fast.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """One token as it is reported beside its log-probability, special tokens included."""
        return self._fast.decode([token_id], skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        """What one token adds to a text in UTF-8; may be a part of a character."""
        token = self._fast.id_to_token(token_id)
        if token is None:
            return b""
        fallback = _BYTE_TOKEN.fullmatch(token)
        if fallback:
            return bytes([int(fallback[1], 16)])
        if REPLACEMENT in self.token_text(token_id) and all(char in _BYTE_OF for char in token):
            return bytes(_BYTE_OF[char] for char in token)
        return self.token_text(token_id).encode()

    def spellings(self, word: str) -> list[tuple[int, ...]]:
        """The token ids of a word at the start of a text and after a space."""
        found = [tuple(self.encode(w, add_special_tokens=False)) for w in (word, " " + word)]
        return [ids for ids in dict.fromkeys(found) if ids]

    def token_id(self, token: str) -> int | None:
        return self._fast.token_to_id(token)

    def showing(self, names: Collection[str]) -> Tokenizer:
        """The same tokenizer, except that decoding shows these special tokens."""
        if not any(special and name in names for name, special in self.added_tokens().items()):
            return self
        state = json.loads(self.to_json())
        for token in state["added_tokens"]:
            token["special"] = token["special"] and token["content"] not in names
        return Tokenizer(FastTokenizer.from_str(json.dumps(state)), self.config)

    def most_characters(self) -> int:
        """No token stands for more characters of a text than this, but of spaces that are cut."""
        longest = max(map(len, self._fast.get_vocab(with_added_tokens=True)), default=1)
        # Normal forms compose: of Korean three characters become one, of Greek four.
        return longest if self._fast.normalizer is None else 4 * longest

    def to_json(self) -> str:
        """The whole tokenizer in the format of tokenizer.json."""
        return self._fast.to_str()

    def __len__(self) -> int:
        return self._fast.get_vocab_size(with_added_tokens=True)

    def added_tokens(self) -> dict[str, bool]:
        """Tokens that are found in a text before it is split, and whether each is special."""
        added = self._fast.get_added_tokens_decoder().values()
        return {token.content: token.special for token in added}

    def special_tokens(self) -> dict[str, str]:
        """bos_token, eos_token, ... as templates use them."""
        found = {}
        for name, value in self.config.items():
            if name.endswith("_token") and value is not None:
                found[name] = value["content"] if isinstance(value, dict) else value
        return {name: value for name, value in found.items() if isinstance(value, str)}


def _what_is_wrong(text: object) -> str:
    if not isinstance(text, str):
        return f"a text must be a string, got {type(text).__name__}"
    at = next(at for at, char in enumerate(text) if "\ud800" <= char <= "\udfff")
    return (
        f"the text is not valid Unicode: {text[at]!a} after {text[max(0, at - 20) : at]!r} is "
        "half of a surrogate pair or a byte that is not UTF-8"
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty if there is none. Raises ModelLoadError if it is broken."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelLoadError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} must hold a JSON object")
    return value
