"""The total check of a request: after it, nothing a client sent can raise inside the engine."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanovllm.errors import InvalidRequestError
from nanovllm.sampling_params import MAX_LOGPROBS, MAX_N, SamplingParams
from nanovllm.server.errors import context_overflow, from_engine, invalid, text_overflow
from nanovllm.server.schemas import (
    MAX_BAD_CHARACTERS,
    MAX_BAD_WORDS,
    MAX_PRIORITY,
    MAX_SALT,
    MAX_STOPS,
    ChatRequest,
    CompletionRequest,
    Request,
)

_TOKEN_ID = re.compile(r"\d{1,10}")
_TOKEN_IDS = ("logit_bias", "allowed_token_ids", "stop_token_ids")
_SAME_NAME = (
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "n",
    "stop_token_ids",
    "ignore_eos",
    "include_stop_str_in_output",
    "bad_words",
    "allowed_token_ids",
)


@dataclass(frozen=True, slots=True)
class Limits:
    """What the engine can take.

    defaults are the sampling parameters of requests that bring none; spellings gives the token ids
    by which a bad word may be written. A longer text than max_prompt_chars has too many tokens.
    """

    max_prompt_len: int
    max_prompt_chars: int
    vocab_size: int
    max_sequences: int
    defaults: Mapping[str, Any]
    eos_token_ids: frozenset[int]
    spellings: Callable[[str], list[tuple[int, ...]]]


def chat_params(request: ChatRequest, limits: Limits) -> SamplingParams:
    """Raises ApiError naming the parameter."""
    if request.top_logprobs is not None and not request.logprobs:
        raise invalid("top_logprobs needs logprobs to be true", "top_logprobs")
    num_logprobs = None
    if request.logprobs:
        num_logprobs = _count("top_logprobs", request.top_logprobs or 0, MAX_LOGPROBS)
    max_tokens = request.max_completion_tokens
    for name in ("max_tokens", "max_completion_tokens"):
        if getattr(request, name) is not None and getattr(request, name) < 1:
            raise invalid(f"{name} must be at least 1, got {getattr(request, name)}", name)
    if max_tokens is None:
        max_tokens = request.max_tokens
    return _params(request, limits, max_tokens=max_tokens, logprobs=num_logprobs)


def completion_params(request: CompletionRequest, limits: Limits) -> SamplingParams:
    """Raises ApiError naming the parameter."""
    max_tokens = 16 if request.max_tokens is None else request.max_tokens
    shown = request.logprobs
    if shown is not None:
        _count("logprobs", shown, MAX_LOGPROBS)
    candidates = _num_candidates(request, limits)
    return _params(
        request,
        limits,
        max_tokens=max_tokens,
        logprobs=0 if shown is None and candidates else shown,
        prompt_logprobs=shown if request.echo else None,
        **candidates,
    )


def _num_candidates(request: CompletionRequest, limits: Limits) -> dict[str, int]:
    """n, where more completions are asked for than are answered with; they are compared by
    log-probability."""
    best_of, num = request.best_of, 1 if request.n is None else request.n
    if best_of is None:
        return {}
    high = min(MAX_N, limits.max_sequences)
    if not max(num, 1) <= best_of <= high:
        raise invalid(f"best_of must be in [n, {high}], got {best_of} with n = {num}", "best_of")
    if best_of == num:
        return {}
    if request.stream:
        raise invalid("best_of over n needs complete answers: stream must be false", "best_of")
    return {"n": best_of}


def _params(request: Request, limits: Limits, **derived: Any) -> SamplingParams:
    _check_common(request)
    _check_sizes(request, limits)
    values = dict(limits.defaults)
    for name in _SAME_NAME:
        if getattr(request, name) is not None:
            values[name] = getattr(request, name)
    values |= derived
    _clamp(values, limits)
    values["stop"] = _stop(request.stop)
    values["logit_bias"] = _logit_bias(request.logit_bias)
    try:
        params = SamplingParams(**values)
    except InvalidRequestError as error:
        raise from_engine(error) from None
    if params.n > limits.max_sequences:
        raise invalid(f"n is {params.n}: this server takes {limits.max_sequences} at most", "n")
    for name in _TOKEN_IDS:
        check_token_ids(getattr(params, name) or (), limits.vocab_size, name)
    _check_something_is_possible(params, limits)
    return params


def _check_something_is_possible(params: SamplingParams, limits: Limits) -> None:
    """Raises ApiError if at some step no token at all might be allowed."""
    if params.allowed_token_ids is None:
        return
    forbidden = {ids[-1] for word in params.bad_words or () for ids in limits.spellings(word)}
    if params.min_tokens:
        forbidden |= limits.eos_token_ids.union(params.stop_token_ids or ())
    if forbidden.issuperset(params.allowed_token_ids):
        raise invalid(
            "allowed_token_ids holds only tokens that min_tokens or bad_words forbid",
            "allowed_token_ids",
        )


def _clamp(values: dict[str, Any], limits: Limits) -> None:
    """Numbers that ask for everything, however large, become numbers that the engine can hold."""
    for name, limit in (("max_tokens", limits.max_prompt_len), ("top_k", limits.vocab_size)):
        value = values.get(name)
        if isinstance(value, int) and value > limit:
            values[name] = limit
    if values.get("min_tokens", 0) > limits.max_prompt_len:
        raise invalid(
            f"min_tokens must be within the context of {limits.max_prompt_len} tokens", "min_tokens"
        )


def _check_common(request: Request) -> None:
    if request.stream_options is not None and not request.stream:
        raise invalid("stream_options needs stream to be true", "stream_options")
    if request.priority is not None and abs(request.priority) > MAX_PRIORITY:
        raise invalid(f"priority must be within +-{MAX_PRIORITY}", "priority")
    if request.cache_salt is not None and len(request.cache_salt) > MAX_SALT:
        raise invalid(f"cache_salt must have at most {MAX_SALT} characters", "cache_salt")


def _check_sizes(request: Request, limits: Limits) -> None:
    """Raises ApiError for lists that would take the loop, or every step of the engine, too long."""
    words = request.bad_words or ()
    num_characters = sum(map(len, words))
    if len(words) > MAX_BAD_WORDS or num_characters > MAX_BAD_CHARACTERS:
        raise invalid(
            f"bad_words takes at most {MAX_BAD_WORDS} words of {MAX_BAD_CHARACTERS} characters "
            f"together, got {len(words)} of {num_characters}",
            "bad_words",
        )
    for name in _TOKEN_IDS:
        number = len(getattr(request, name) or ())
        if number > limits.vocab_size:
            raise invalid(
                f"{name} names {number} token ids: the vocabulary has {limits.vocab_size}", name
            )


def _count(name: str, value: int, high: int) -> int:
    if not 0 <= value <= high:
        raise invalid(f"{name} must be an integer in [0, {high}], got {value}", name)
    return value


def _stop(stop: str | list[str] | None) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(strings) > MAX_STOPS:
        raise invalid(f"stop takes at most {MAX_STOPS} strings, got {len(strings)}", "stop")
    if not all(strings):
        raise invalid("stop must not hold an empty string", "stop")
    return strings


def _logit_bias(given: Mapping[str, float] | None) -> dict[int, float] | None:
    if given is None:
        return None
    for key in given:
        if not _TOKEN_ID.fullmatch(key) or not key.isascii():
            raise invalid(f"a key of logit_bias must be a token id, got {key[:50]!r}", "logit_bias")
    return {int(key): bias for key, bias in given.items()}


def check_token_ids(token_ids: Sequence[int] | Mapping[int, Any], size: int, param: str) -> None:
    """Raises ApiError unless all are in [0, size)."""
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < size):
        wrong = next(i for i in token_ids if not 0 <= i < size)
        raise invalid(f"a token id of {param} must be in [0, {size - 1}], got {wrong}", param)


def check_count(wanted: int, limits: Limits) -> None:
    """Raises ApiError if one request asks for more completions than may ever run and wait."""
    if wanted > limits.max_sequences:
        raise invalid(f"{wanted} completions in one request; {limits.max_sequences} fit", "n")


def check_length(num_characters: int, limits: Limits, param: str) -> None:
    """Raises ApiError if a text this long cannot fit: tokenizing it could take minutes."""
    if num_characters > limits.max_prompt_chars:
        raise text_overflow(limits.max_prompt_len, num_characters, param)


def check_prompt(token_ids: Sequence[int], limits: Limits, param: str) -> None:
    """Raises ApiError unless the prompt leaves room for a token in context and KV cache."""
    if not token_ids:
        raise invalid(f"{param} is empty: at least one token is needed", param)
    if len(token_ids) >= limits.max_prompt_len:
        raise context_overflow(limits.max_prompt_len, len(token_ids), param)
    check_token_ids(token_ids, limits.vocab_size, param)


def split_prompts(prompt: str | list[Any]) -> list[str | list[int]]:
    """The prompts of a completion request: one or several, texts or token ids, never mixed."""
    if isinstance(prompt, str):
        return [prompt]
    kinds = {type(item) for item in prompt}
    if len(kinds) > 1:
        raise invalid("prompt must not mix strings, token ids and lists", "prompt")
    if kinds == {int}:
        return [prompt]
    if not prompt:
        raise invalid("prompt is empty: at least one is needed", "prompt")
    return prompt
