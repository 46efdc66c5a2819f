"""POST /v1/completions: prompts as text or token ids in, texts or their deltas out."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from nanovllm.outputs import CompletionOutput, Delta, Logprob, RequestOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.server import schemas, validate
from nanovllm.server.answers import Usage
from nanovllm.server.chat import MIN_LOGPROB
from nanovllm.server.http import EventStream, event, json_response, read_body, until_gone
from nanovllm.server.schemas import CompletionRequest
from nanovllm.server.service import Service, cached_tokens, timings, usage
from nanovllm.server.streams import Job, Stream
from nanovllm.server.structure import asked_structure

Entries = Sequence[Mapping[int, Logprob] | None]


@dataclass(slots=True)
class _Completion:
    """One admitted request."""

    service: Service
    request: CompletionRequest
    model: str
    stream: Stream
    prompts: list[str]  # as echo shows them
    reply_id: str
    created: int

    def head(self) -> dict[str, Any]:
        return {
            "id": self.reply_id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
        }


async def completions(request: Request) -> Response:
    service: Service = request.app.state.service
    body = schemas.decode(await read_body(request), CompletionRequest)
    completion = await _admit(service, body)
    if not body.stream:
        try:
            return json_response(await until_gone(request.receive, _whole(completion)))
        finally:
            completion.stream.close()
    pieces = _pieces(completion)
    try:
        first = await until_gone(request.receive, anext(pieces))
    except BaseException:
        completion.stream.close()
        raise
    return EventStream(first, pieces, failed=service.explain, closed=completion.stream.close)


async def _admit(service: Service, request: CompletionRequest) -> _Completion:
    """All prompts are checked before any is queued."""
    model = service.model_name(request.model)
    limits = service.limits()
    params = validate.completion_params(request, limits)
    asked = asked_structure(request)
    if asked is not None:
        params = await service.constrain(params, *asked)
    prompts = validate.split_prompts(request.prompt)
    validate.check_count(len(prompts) * params.n, limits)
    for prompt in prompts:
        if isinstance(prompt, str):
            validate.check_length(len(prompt), limits, "prompt")
    jobs = await _jobs(service, request, params, prompts)
    for job in jobs:
        validate.check_prompt(job.token_ids, limits, "prompt")
    decode = service.tokenizer.decode
    shown = [
        (job.text if job.text is not None else decode(job.token_ids)) if request.echo else ""
        for job in jobs
    ]
    stream = service.start(jobs)
    reply_id = f"cmpl-{secrets.token_hex(12)}"
    return _Completion(service, request, model, stream, shown, reply_id, int(time.time()))


async def _jobs(
    service: Service,
    request: CompletionRequest,
    params: SamplingParams,
    prompts: list[str | list[int]],
) -> list[Job]:
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    special = request.add_special_tokens is not False
    encoded = iter(await service.prompts.encode_all(texts, add_special_tokens=special))
    priority, salt = request.priority or 0, request.cache_salt or ""
    return [
        Job(next(encoded), params, prompt, priority, salt)
        if isinstance(prompt, str)
        else Job(prompt, params, None, priority, salt)
        for prompt in prompts
    ]


# --- one answer ---------------------------------------------------------------------------------


async def _whole(completion: _Completion) -> dict[str, Any]:
    service = completion.service
    try:
        outputs = await completion.stream.finish()
        for output in outputs:
            for choice in output.outputs:
                service.check(choice)
    except Exception as error:
        raise service.explain(error) from None
    num = completion.request.n or 1
    answer = completion.head() | {
        "choices": [
            _choice(completion, job, output, choice) | {"index": job * num + rank}
            for job, output in enumerate(outputs)
            for rank, choice in enumerate(_best(output.outputs, num))
        ],
        "usage": usage(outputs, cached_tokens(outputs)),
    }
    if completion.request.timings:
        answer["timings"] = timings(outputs)
    return answer


def _best(candidates: list[CompletionOutput], num: int) -> list[CompletionOutput]:
    """Those with the highest log-probability a token, if there are more than asked for."""
    if len(candidates) == num:
        return candidates

    def mean_logprob(output: CompletionOutput) -> float:
        assert output.cumulative_logprob is not None, "log-probabilities were asked for"
        return output.cumulative_logprob / max(len(output.token_ids), 1)

    return sorted(candidates, key=mean_logprob, reverse=True)[:num]


def _choice(
    completion: _Completion, job: int, output: RequestOutput, choice: CompletionOutput
) -> dict[str, Any]:
    echo = completion.prompts[job]
    entries: Entries | None = None if completion.request.logprobs is None else choice.logprobs
    if entries is not None and output.prompt_logprobs is not None:
        entries = [*output.prompt_logprobs, *entries]
    ids = [*output.prompt_token_ids, *choice.token_ids]
    first = [completion.service.tokenizer.token_text(ids[0])]
    return {
        "index": choice.index,
        "text": echo + choice.text,
        "logprobs": _logprobs(entries, completion.request.logprobs, 0, first)[0],
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.stop_reason,
    }


def _logprobs(
    entries: Entries | None, num_top: int | None, offset: int, unknown: Sequence[str]
) -> tuple[dict[str, Any] | None, int]:
    """(the legacy form of log-probabilities, the text offset behind them).

    A None entry is the prompt's first token, which nothing predicts; unknown names it.
    """
    if entries is None:
        return None, offset
    tokens: list[str] = []
    values: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    offsets: list[int] = []
    names = iter(unknown)
    for entry in entries:
        chosen = None if entry is None else next(iter(entry.values()))
        tokens.append(next(names) if chosen is None else chosen.token or "")
        values.append(None if chosen is None else max(chosen.logprob, MIN_LOGPROB))
        tops.append(None if entry is None else _top(entry, num_top or 0))
        offsets.append(offset)
        offset += len(tokens[-1])
    record = {
        "tokens": tokens,
        "token_logprobs": values,
        "top_logprobs": tops,
        "text_offset": offsets,
    }
    return record, offset


def _top(entry: Mapping[int, Logprob], num_top: int) -> dict[str, float]:
    """The most likely tokens by text; of several with one text the most likely stays."""
    top: dict[str, float] = {}
    for logprob in sorted(entry.values(), key=lambda logprob: logprob.rank)[:num_top]:
        top.setdefault(logprob.token or "", max(logprob.logprob, MIN_LOGPROB))
    return top


# --- a stream -----------------------------------------------------------------------------------


async def _pieces(completion: _Completion) -> AsyncIterator[bytes]:
    options = completion.request.stream_options or schemas.StreamOptions()
    writer = _Writer(completion, bool(options.continuous_usage_stats))
    try:
        async for items in completion.stream:
            piece = b"".join(writer.write(job, delta) for job, delta in items)
            if piece:
                yield piece
        if options.include_usage or completion.request.timings:
            yield writer.last_chunk(bool(options.include_usage))
    except Exception as error:
        raise completion.service.explain(error) from None


class _Writer:
    """Deltas of completions to events; a choice's first one holds the echoed prompt."""

    def __init__(self, completion: _Completion, usage_always: bool) -> None:
        self._completion = completion
        self._usage_always = usage_always
        self._base = completion.head()
        self._offsets: dict[int, int] = {}  # text offset of each choice that has begun
        self._held: dict[int, list[Mapping[int, Logprob] | None]] = {}
        self._cached = [0] * len(completion.stream.outputs)

    def write(self, job: int, delta: Delta) -> bytes:
        self._completion.service.check(delta)
        output = self._completion.stream.outputs[job]
        index = job * len(output.outputs) + delta.index
        text = delta.text
        held = self._held.setdefault(index, [])
        first = index not in self._offsets
        if first:
            self._offsets[index] = 0
            text = self._completion.prompts[job] + text
            held += output.prompt_logprobs or ()
        held += delta.logprobs or ()
        if delta.metrics is not None and delta.index == 0:
            self._cached[job] = delta.metrics.num_cached_tokens
        if not text and delta.finish_reason is None:
            return b""
        return self._chunk(index, text, delta, output)

    def _chunk(self, index: int, text: str, delta: Delta, output: RequestOutput) -> bytes:
        entries, self._held[index] = self._held[index], []
        unknown = [self._completion.service.tokenizer.token_text(output.prompt_token_ids[0])]
        record, self._offsets[index] = _logprobs(
            entries or None, self._completion.request.logprobs, self._offsets[index], unknown
        )
        choice = {
            "index": index,
            "text": text,
            "logprobs": record,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        chunk = self._base | {"choices": [choice]}
        if self._usage_always:
            chunk["usage"] = self._usage()
        return event(chunk)

    def last_chunk(self, with_usage: bool) -> bytes:
        """What belongs to no choice, as far as it was asked for."""
        chunk: dict[str, Any] = self._base | {"choices": []}
        if with_usage:
            chunk["usage"] = self._usage()
        if self._completion.request.timings:
            chunk["timings"] = timings(self._completion.stream.outputs)
        return event(chunk)

    def _usage(self) -> Usage:
        return usage(self._completion.stream.outputs, self._cached)
