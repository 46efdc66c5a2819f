"""A chat's partner behind HTTP: any server with OpenAI's chat completions. Loads no torch.

The server counts tokens, not we: what does not fit is noticed from its last usage record, and
where that was too hopeful, from its refusal.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from nanovllm import NanoVLLMError
from nanovllm.cli.conversation import Conversation, Message
from nanovllm.cli.partner import Reply, Show, forgotten
from nanovllm.cli.terminal import say
from nanovllm.client.api import CONTEXT_CODE, ApiClient, RemoteError


@dataclass(slots=True)
class _Heard:
    """What a stream has told so far."""

    begin: float
    text: list[str] = field(default_factory=list)
    thoughts: int = 0
    num_chunks: int = 0
    first: float | None = None
    finish_reason: str | None = None
    usage: Mapping[str, Any] = field(default_factory=dict)
    interrupted: bool = False

    def reply(self) -> Reply:
        details = self.usage.get("prompt_tokens_details")
        return Reply(
            text="".join(self.text),
            num_tokens=self.usage.get("completion_tokens") or self.num_chunks,
            seconds=time.perf_counter() - self.begin,
            first_token=None if self.first is None else self.first - self.begin,
            num_prompt_tokens=self.usage.get("prompt_tokens"),
            num_cached_tokens=(details or {}).get("cached_tokens"),
            finish_reason=self.finish_reason,
            interrupted=self.interrupted,
        )


class RemotePartner:
    """Asks the server for its models at once. Raises RemoteError, or ConfigError for the URL."""

    def __init__(self, url: str, key: str | None, model: str | None) -> None:
        self._api = ApiClient(url, key)
        self._runner = asyncio.Runner()
        self._tokens_per_char = 0.0
        try:
            models = self._runner.run(self._api.models())
            if model is None and not models:
                raise NanoVLLMError(f"{self._api.url} serves no model: name one (--model)")
        except BaseException:
            self.close()
            raise
        self._model = model if model is not None else models[0].name
        self.context = next((m.max_model_len for m in models if m.name == self._model), None)

    def headline(self) -> str:
        context = "" if self.context is None else f" · context {self.context} tokens"
        return f"{self._model} · {self._api.url}{context}"

    def reply(self, chat: Conversation, show: Show, tell: Show) -> Reply:
        dropped = self._fit(chat)
        while True:
            try:
                reply = self._runner.run(self._ask(chat, show))
                break
            except RemoteError as error:
                if error.code != CONTEXT_CODE or len(chat.messages) == 1:
                    raise
            dropped += chat.drop_oldest()
        if dropped:
            tell(forgotten(dropped))
        if reply.num_prompt_tokens is not None and reply.text:
            num_chars = _num_chars(chat.all_messages()) + len(reply.text)
            self._tokens_per_char = (reply.num_prompt_tokens + reply.num_tokens) / num_chars
        return reply

    def _fit(self, chat: Conversation) -> int:
        """Messages dropped, going by what the last answer said of tokens per character."""
        limit = self.context
        if limit is None or not self._tokens_per_char:
            return 0

        def guess(messages: list[Message]) -> range:
            return range(min(int(_num_chars(messages) * self._tokens_per_char), limit - 1))

        return chat.fit(guess, limit)[1]

    async def _ask(self, chat: Conversation, show: Show) -> Reply:
        heard = _Heard(time.perf_counter())
        body = {
            "model": self._model,
            "messages": chat.all_messages(),
            "stream_options": {"include_usage": True},
            **as_request(chat.sampling),
        }
        try:
            # Leaving it early closes the connection, and the server aborts.
            async with aclosing(self._api.stream("/chat/completions", body)) as chunks:
                async for chunk in chunks:
                    _hear(heard, chunk, show)
        except asyncio.CancelledError:  # the runner's answer to Ctrl-C
            heard.interrupted = True
        except RemoteError:
            if heard.text:
                show("\n")
            raise
        return heard.reply()

    def facts(self) -> dict[str, str]:
        return {"server": self.headline()}

    def close(self) -> None:
        self._runner.run(self._api.close())
        self._runner.close()


def _hear(heard: _Heard, chunk: Mapping[str, Any], show: Show) -> None:
    heard.usage = chunk.get("usage") or heard.usage
    for choice in (chunk.get("choices") or ())[:1]:
        delta = choice.get("delta") or {}
        text = delta.get("content") or ""
        thought = delta.get("reasoning_content") or delta.get("reasoning") or ""
        heard.finish_reason = choice.get("finish_reason") or heard.finish_reason
        if not (text or thought):
            continue
        heard.num_chunks += 1
        heard.first = heard.first or time.perf_counter()
        if thought:
            say(thought, end="")  # beside the answer, and no part of the conversation
            heard.thoughts += len(thought)
        if text:
            if heard.thoughts and not heard.text:
                say("\n")
            heard.text.append(text)
            show(text)


def as_request(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling options as fields of a request; None is the server's default, which is not sent."""
    body = {name: value for name, value in sampling.items() if value is not None}
    if "logit_bias" in body:
        body["logit_bias"] = {str(i): bias for i, bias in body["logit_bias"].items()}
    if "structured_output" in body:  # servers use the plural
        body["structured_outputs"] = body.pop("structured_output")
    return body


def _num_chars(messages: list[Message]) -> int:
    return sum(len(message["content"]) for message in messages)
