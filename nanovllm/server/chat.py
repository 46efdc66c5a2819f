"""POST /v1/chat/completions: messages in, a message or its deltas out."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from nanovllm.outputs import CompletionOutput, Delta, Logprob
from nanovllm.server import schemas, validate
from nanovllm.server.answers import Usage
from nanovllm.server.errors import invalid
from nanovllm.server.http import EventStream, event, json_response, read_body, until_gone
from nanovllm.server.output_parser import OutputParser, whole_message
from nanovllm.server.prompts import num_characters
from nanovllm.server.schemas import ChatRequest
from nanovllm.server.service import Service, cached_tokens, timings, usage
from nanovllm.server.streams import Job, Stream
from nanovllm.server.structure import asked_structure
from nanovllm.server.tool_choice import check_tool_choice, with_tools
from nanovllm.text.tokenizer import Tokenizer

MIN_LOGPROB = -9999.0  # JSON has no infinity


@dataclass(slots=True)
class _Chat:
    """One admitted request."""

    service: Service
    request: ChatRequest
    model: str
    stream: Stream
    thinks: bool
    tools: bool
    reply_id: str
    created: int

    def parser(self) -> OutputParser:
        return OutputParser(
            reasoning=self.service.reasons,
            thinks=self.thinks,
            tools=self.service.tool_style if self.tools else None,
            one_call=self.request.parallel_tool_calls is False,
        )

    def head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.reply_id,
            "object": kind,
            "created": self.created,
            "model": self.model,
        }


async def chat_completions(request: Request) -> Response:
    service: Service = request.app.state.service
    chat = await _admit(service, schemas.decode(await read_body(request), ChatRequest))
    if not chat.request.stream:
        try:
            return json_response(await until_gone(request.receive, _whole(chat)))
        finally:
            chat.stream.close()
    pieces = _pieces(chat)
    try:
        first = await until_gone(request.receive, anext(pieces))
    except BaseException:
        chat.stream.close()
        raise
    return EventStream(first, pieces, failed=service.explain, closed=chat.stream.close)


async def _admit(service: Service, request: ChatRequest) -> _Chat:
    model = service.model_name(request.model)
    limits = service.limits()
    params = validate.chat_params(request, limits)
    asked = asked_structure(request)
    if not request.messages:
        raise invalid("messages is empty: at least one is needed", "messages")
    length = sum(map(num_characters, request.messages))
    validate.check_length(length, limits, "messages")
    tools = _tools(service, request)
    generates = request.add_generation_prompt is not False
    prompt = await service.prompts.encode_chat(
        request.messages, tools, request.chat_template_kwargs, add_generation_prompt=generates
    )
    validate.check_prompt(prompt.token_ids, limits, "messages")
    asked = with_tools(asked, request, tools, service.tool_style, service.tokenizer.token_id)
    if asked is not None:
        field, structure = asked
        reasoning = prompt.reasoning if service.reasons else "none"
        params = await service.constrain(params, field, replace(structure, reasoning=reasoning))
    job = Job(
        prompt.token_ids,
        params,
        priority=request.priority or 0,
        salt=request.cache_salt or "",
    )
    stream = service.start([job])
    reply_id = f"chatcmpl-{secrets.token_hex(12)}"
    created = int(time.time())
    thinks = prompt.reasoning == "open"
    return _Chat(service, request, model, stream, thinks, bool(tools), reply_id, created)


def _tools(service: Service, request: ChatRequest) -> Sequence[schemas.ToolSpec] | None:
    """The tools that the model is told of."""
    check_tool_choice(request)
    if not request.tools or request.tool_choice == "none":
        return None
    if service.tool_style is None:
        raise invalid("this model's chat template knows no tools", "tools")
    return request.tools


# --- one answer ---------------------------------------------------------------------------------


async def _whole(chat: _Chat) -> dict[str, Any]:
    try:
        (output,) = await chat.stream.finish()
        for completion in output.outputs:
            chat.service.check(completion)
    except Exception as error:
        raise chat.service.explain(error) from None
    answer = chat.head("chat.completion") | {
        "choices": [_choice(chat, completion) for completion in output.outputs],
        "usage": usage([output], cached_tokens([output])),
    }
    if chat.request.timings:
        answer["timings"] = timings([output])
    return answer


def _choice(chat: _Chat, completion: CompletionOutput) -> dict[str, Any]:
    message, num_calls = whole_message(chat.parser(), completion.text)
    return {
        "index": completion.index,
        "message": message,
        "logprobs": logprobs_record(
            completion.logprobs, chat.request.top_logprobs, chat.service.tokenizer
        ),
        "finish_reason": _reason(completion.finish_reason, num_calls),
    }


def _reason(reason: str | None, num_calls: int) -> str | None:
    return "tool_calls" if reason == "stop" and num_calls else reason


def logprobs_record(
    entries: Sequence[Mapping[int, Logprob]] | None, num_top: int | None, tokenizer: Tokenizer
) -> dict[str, Any] | None:
    """The chat form of log-probabilities; an entry's first token is the chosen one."""
    if entries is None:
        return None
    content = []
    for entry in entries:
        ranked = sorted(entry.items(), key=lambda item: item[1].rank)
        content.append(
            _token(*next(iter(entry.items())), tokenizer)
            | {"top_logprobs": [_token(*item, tokenizer) for item in ranked[: num_top or 0]]}
        )
    return {"content": content}


def _token(token_id: int, logprob: Logprob, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "token": logprob.token or "",
        "logprob": max(logprob.logprob, MIN_LOGPROB),
        "bytes": list(tokenizer.token_bytes(token_id)),
    }


# --- a stream -----------------------------------------------------------------------------------


async def _pieces(chat: _Chat) -> AsyncIterator[bytes]:
    """One piece for all that came since the last one was sent."""
    options = chat.request.stream_options or schemas.StreamOptions()
    writer = _Writer(chat, bool(options.continuous_usage_stats))
    try:
        async for items in chat.stream:
            piece = b"".join(writer.write(delta) for _, delta in items)
            if piece:
                yield piece
        if options.include_usage or chat.request.timings:
            yield writer.last_chunk(bool(options.include_usage))
    except Exception as error:
        raise chat.service.explain(error) from None


class _Writer:
    """Deltas of completions to chunks of events."""

    def __init__(self, chat: _Chat, usage_always: bool) -> None:
        self._chat = chat
        self._usage_always = usage_always
        self._parsers: dict[int, OutputParser] = {}
        self._logprobs: dict[int, list[Mapping[int, Logprob]]] = {}
        self._base = chat.head("chat.completion.chunk")
        self._cached = 0

    def write(self, delta: Delta) -> bytes:
        self._chat.service.check(delta)
        index = delta.index
        chunks = b""
        if index not in self._parsers:
            self._parsers[index] = self._chat.parser()
            self._logprobs[index] = []
            chunks += self._chunk(index, {"role": "assistant", "content": ""})
        parser = self._parsers[index]
        self._logprobs[index] += delta.logprobs or ()
        parts = parser.push(delta.text)
        if delta.finish_reason is None:
            return chunks + b"".join(self._chunk(index, part) for part in parts)
        if delta.metrics is not None and index == 0:
            self._cached = delta.metrics.num_cached_tokens
        parts += parser.finish()
        chunks += b"".join(self._chunk(index, part) for part in parts)
        reason = _reason(delta.finish_reason, parser.num_calls)
        return chunks + self._chunk(index, {}, reason)

    def _chunk(self, index: int, delta: dict[str, Any], reason: str | None = None) -> bytes:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": self._take_logprobs(index) if "role" not in delta else None,
            "finish_reason": reason,
        }
        chunk = self._base | {"choices": [choice]}
        if self._usage_always:
            chunk["usage"] = self._usage()
        return event(chunk)

    def _take_logprobs(self, index: int) -> dict[str, Any] | None:
        entries = self._logprobs[index]
        self._logprobs[index] = []
        num_top = self._chat.request.top_logprobs
        return logprobs_record(entries or None, num_top, self._chat.service.tokenizer)

    def last_chunk(self, with_usage: bool) -> bytes:
        """What belongs to no choice, as far as it was asked for."""
        chunk: dict[str, Any] = self._base | {"choices": []}
        if with_usage:
            chunk["usage"] = self._usage()
        if self._chat.request.timings:
            chunk["timings"] = timings(self._chat.stream.outputs)
        return event(chunk)

    def _usage(self) -> Usage:
        return usage(self._chat.stream.outputs, [self._cached])
