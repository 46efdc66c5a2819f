"""The state of a chat: messages, system message, sampling; fitted to the context, saved, loaded.

Knows neither terminal nor engine: rendering is a function that it is given.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from nanovllm import InvalidRequestError, SamplingParams
from nanovllm.cli.flags import convert

Message = dict[str, str]
Render = Callable[[list[Message]], Sequence[int]]
# Sampling options that are no field of a chat request, or one that means something else there.
NOT_SENT = ("detokenize", "logprobs", "prompt_logprobs")
ANSWER_ROOM = 256  # tokens kept free for an answer when max_tokens says nothing smaller


class ChatError(Exception):
    """Something that the user asked for cannot be done; the message says why."""


@dataclass(slots=True)
class Conversation:
    """messages alternate between user and assistant; the system message stands apart.

    refused are sampling options that whoever answers does not have.
    """

    sampling: dict[str, Any]
    system: str | None = None
    messages: list[Message] = field(default_factory=list)
    refused: Sequence[str] = ()

    @property
    def params(self) -> SamplingParams:
        return SamplingParams.from_kwargs(**self.sampling)

    def all_messages(self) -> list[Message]:
        head = [] if self.system is None else [{"role": "system", "content": self.system}]
        return head + self.messages

    def set(self, name: str, text: str) -> None:
        """Changes one sampling option. Raises ChatError, changing nothing."""
        known = [f.name for f in fields(SamplingParams) if f.name not in self.refused]
        if name not in known:
            near = [k for k in known if name and k.startswith(name)]
            near = near or get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise ChatError(f"there is no sampling option {name!r}; {hint}")
        try:
            changed = self.sampling | {name: convert(SamplingParams, name, text)}
            self._check_sampling(changed)
        except (InvalidRequestError, ValueError, argparse.ArgumentTypeError) as error:
            raise ChatError(str(error)) from None
        self.sampling = changed

    def fit(self, render: Render, max_model_len: int) -> tuple[Sequence[int], int]:
        """(prompt token ids, messages dropped): the oldest turns go until an answer has room.

        The last message always stays. Raises ChatError if it alone does not fit.
        """
        room = min(self.sampling.get("max_tokens") or ANSWER_ROOM, max_model_len // 4)
        dropped = 0
        tokens = render(self.all_messages())
        while len(tokens) + room > max_model_len and len(self.messages) > 1:
            dropped += self.drop_oldest()
            tokens = render(self.all_messages())
        if len(tokens) >= max_model_len:
            raise ChatError(
                f"the message does not fit: {len(tokens)} tokens with its template, "
                f"the context has {max_model_len}"
            )
        return tokens, dropped

    def drop_oldest(self) -> int:
        """Forgets the oldest turn; the messages that went."""
        num_messages = 2 if len(self.messages) > 2 else 1
        del self.messages[:num_messages]
        return num_messages

    def save(self, path: Path) -> None:
        """Writes JSON; a regular file whole or not at all.

        Raises OSError, which names path, and ChatError for what is not valid Unicode.
        """
        state = {
            "system": self.system,
            "messages": self.messages,
            "sampling": self.sampling,
        }
        text = json.dumps(state, ensure_ascii=False, indent=2)
        try:
            if path.is_symlink() or (path.exists() and not path.is_file()):
                path.write_text(text, encoding="utf-8")  # it stays the link or device that it is
            else:
                _replace(path, text)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None
        except UnicodeEncodeError as error:
            raise ChatError(f"the chat is not valid Unicode: {error}") from None

    def load(self, path: Path) -> None:
        """Replaces everything by what `save` wrote. Raises ChatError, changing nothing."""
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            messages = [{"role": m["role"], "content": m["content"]} for m in state["messages"]]
            if not all(isinstance(text, str) for m in messages for text in m.values()):
                raise ValueError("a message is no text")
            system = state.get("system")
            if not (system is None or isinstance(system, str)):
                raise ValueError("the system message is no text")
            sampling = dict(state["sampling"])
            if sampling.get("logit_bias"):  # JSON keys are strings
                biases = dict(sampling["logit_bias"])
                sampling["logit_bias"] = {int(i): bias for i, bias in biases.items()}
            self._check_sampling(sampling)
        except (ValueError, KeyError, TypeError) as error:
            raise ChatError(f"{path} holds no saved chat: {error}") from None
        self.system, self.messages, self.sampling = system, messages, sampling

    def _check_sampling(self, sampling: dict[str, Any]) -> None:
        """Raises InvalidRequestError for what this chat cannot have."""
        if sampling.get("n", 1) != 1:
            raise InvalidRequestError("a chat has one answer: n stays 1")
        for name in self.refused:
            if name in sampling:
                raise InvalidRequestError(f"{name} has no meaning for a server")
        SamplingParams.from_kwargs(**sampling)


def _replace(path: Path, text: str) -> None:
    """Writes a regular file in one go; leaves nothing behind when it fails."""
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=path.name, delete=False
    ) as file:
        try:
            file.write(text)
            file.close()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
