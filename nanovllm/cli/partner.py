"""Whom a chat talks to: a protocol, and the model in this process as one implementation.

The other is in `remote.py`: a server somewhere. A partner gets the conversation and gives a Reply;
it knows nothing of commands and files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from nanovllm.cli.conversation import Conversation
from nanovllm.cli.session import Session, answer, speed_words

Show = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Reply:
    """What came of one message. Times in seconds after the question; None is what nobody told."""

    text: str
    num_tokens: int
    seconds: float
    first_token: float | None = None
    num_prompt_tokens: int | None = None
    num_cached_tokens: int | None = None
    finish_reason: str | None = None
    error: str | None = None
    interrupted: bool = False

    def speed(self) -> str:
        return speed_words(self.num_tokens, 1, self.first_token, self.seconds)


class Partner(Protocol):
    """context is its limit in tokens, None if unknown."""

    @property
    def context(self) -> int | None: ...

    def headline(self) -> str:
        """Name and place in one line."""
        ...

    def reply(self, chat: Conversation, show: Show, tell: Show) -> Reply:
        """Answers the last message; forgets the oldest ones where they do not fit.

        show gets the answer's text as it comes, tell what is beside it. Ctrl-C ends the answer.
        Raises ChatError or NanoVLLMError if there is no answer.
        """
        ...

    def facts(self) -> dict[str, str]:
        """What /stats says of it."""
        ...

    def close(self) -> None: ...


def forgotten(num_dropped: int) -> str:
    return f"[the context is full: {num_dropped} oldest messages forgotten]"


class LocalPartner:
    """A model in this process."""

    def __init__(self, session: Session) -> None:
        self._llm = session.llm
        self._name = session.name

    @property
    def context(self) -> int | None:
        return self._llm.info.max_model_len

    def headline(self) -> str:
        info = self._llm.info
        return f"{self._name} · {info.device}, {info.dtype} · context {info.max_model_len} tokens"

    def reply(self, chat: Conversation, show: Show, tell: Show) -> Reply:
        llm = self._llm
        tokens, num_dropped = chat.fit(llm.render_chat, llm.info.max_model_len)
        if num_dropped:
            tell(forgotten(num_dropped))
        output, interrupted = answer(llm, list(tokens), chat.params, show)
        metrics = output.metrics
        assert metrics is not None, "a finished answer has metrics"
        return Reply(
            text=output.text,
            num_tokens=len(output.token_ids),
            seconds=metrics.total_time,
            first_token=metrics.time_to_first_token,
            num_prompt_tokens=len(output.prompt_token_ids),
            num_cached_tokens=metrics.num_cached_tokens,
            finish_reason=output.finish_reason,
            error=output.outputs[0].error,
            interrupted=interrupted,
        )

    def facts(self) -> dict[str, str]:
        info = self._llm.info
        backends = ", ".join(f"{part}: {choice.name}" for part, choice in info.choices.items())
        return {
            "engine": f"{info.device}, {info.dtype}, {backends}",
            "KV cache": f"{info.num_blocks} blocks of {info.block_size} slots",
        }

    def close(self) -> None:
        self._llm.close()
