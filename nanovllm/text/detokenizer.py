"""Token ids to text, piece by piece: a pure state machine.

Two promises: the pieces joined are the text of all ids decoded at once, and no piece shows a
character that later tokens complete, or any part of a stop string.
"""

from __future__ import annotations

from collections.abc import Sequence

from nanovllm.text.tokenizer import REPLACEMENT, Tokenizer


class IncrementalDetokenizer:
    """Decodes a window that starts at the last place where a character was complete.

    The window holds the tokens of the piece before as well, because some tokenizers treat the
    first token of a text differently; what that piece says is cut off again.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = tokenizer.special_ids
        self._ids: list[int] = []
        self._shown = ""  # text of the first _num_shown ids of the window
        self._num_shown = 0

    def push(self, token_ids: Sequence[int]) -> str:
        """Adds tokens; returns the text that is now certain."""
        pieces = []
        for token_id in token_ids:
            if token_id in self._special:
                continue  # decoded as nothing; a run of them must not make the window grow
            self._ids.append(token_id)
            text = self._tokenizer.decode(self._ids)
            if len(text) > len(self._shown) and not text.endswith(REPLACEMENT):
                pieces.append(text[len(self._shown) :])
                self._advance()
        return "".join(pieces)

    def flush(self) -> str:
        """The rest, as a decoder shows it that knows that nothing follows."""
        text = self._tokenizer.decode(self._ids)
        rest = text[len(self._shown) :]
        self._advance()
        return rest

    def _advance(self) -> None:
        del self._ids[: self._num_shown]
        self._num_shown = len(self._ids)
        self._shown = self._tokenizer.decode(self._ids)


class StopStrings:
    """Finds the first stop string in a growing text, and holds back what may become one."""

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._longest = max((len(stop) for stop in stops), default=0)
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """(text that can be shown, the stop string that was found or None).

        Of several matches the one that begins first wins, then the longest.
        """
        if not self._stops:
            return text, None
        text = self._held + text
        found = [(at, -len(stop), stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            at, _, stop = min(found)
            self._held = ""
            return text[: at + len(stop)] if self._include else text[:at], stop
        keep = self._possible_start(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def skip(self, text: str) -> str:
        """Shows text without looking for stop strings in it (before min_tokens is reached)."""
        held, self._held = self._held, ""
        return held + text

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _possible_start(self, text: str) -> int:
        """The length of the longest end of text that some stop string starts with."""
        for size in range(min(self._longest - 1, len(text)), 0, -1):
            end = text[-size:]
            if any(stop.startswith(end) for stop in self._stops):
                return size
        return 0
