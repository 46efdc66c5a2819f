"""The bodies of answers: closed records, for those that make them and for the OpenAPI document.

A field that is UNSET is absent, never null: clients break on keys that they do not expect.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

Count = Annotated[int, Meta(ge=0)]
Seconds = Annotated[float, Meta(ge=0)]


class Answer(msgspec.Struct, forbid_unknown_fields=True):
    """Base of all records here."""


class ErrorDetail(Answer):
    """param names the field of the request that is wrong, code the kind of error; null if none."""

    message: str
    type: Literal[
        "invalid_request_error",
        "authentication_error",
        "not_found_error",
        "rate_limit_error",
        "server_error",
    ]
    param: str | None
    code: str | None


class Error(Answer):
    error: ErrorDetail


# --- small endpoints ----------------------------------------------------------------------------


class Status(Answer):
    """ "ok", or why not."""

    status: str


class Version(Answer):
    version: str


class Load(Answer):
    """Requests and KV blocks now, tokens since the start."""

    server_load: Count
    num_requests_running: Count
    num_requests_waiting: Count
    num_blocks: Count
    num_free_blocks: Count
    prompt_tokens: Count
    generation_tokens: Count
    cached_tokens: Count


class Model(Answer):
    """max_model_len counts prompt and answer; null while the model loads."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int | None


class ModelList(Answer):
    object: Literal["list"]
    data: list[Model]


class Tokens(Answer):
    count: Count
    max_model_len: Count
    tokens: list[Count]


class Prompt(Answer):
    prompt: str


# --- what both kinds of completions have ----------------------------------------------------------


class PromptTokensDetails(Answer):
    cached_tokens: Count


class Usage(Answer):
    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count
    prompt_tokens_details: PromptTokensDetails


class Timings(Answer):
    """Of the first completion, in llama.cpp's names; times in milliseconds."""

    prompt_n: Count
    prompt_ms: Seconds
    predicted_n: Count
    predicted_ms: Seconds
    predicted_per_second: float
    cache_n: Count


FinishReason = Literal["stop", "length"]
ChatFinishReason = Literal["stop", "length", "tool_calls"]


# --- chat -----------------------------------------------------------------------------------------


class TokenLogprob(Answer):
    token: str
    logprob: float
    bytes: list[Annotated[int, Meta(ge=0, le=255)]]


class ChosenLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(Answer):
    content: list[ChosenLogprob]


class CalledFunction(Answer):
    """arguments is JSON as the model wrote it."""

    name: str
    arguments: str


class CalledTool(Answer):
    id: str
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(Answer):
    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[CalledTool] | UnsetType = UNSET


class ChatChoice(Answer):
    index: Count
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason


class ChatCompletion(Answer):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    timings: Timings | UnsetType = UNSET


class FunctionDelta(Answer, kw_only=True):
    """The first one of a call has the name; arguments are pieces to join."""

    name: str | UnsetType = UNSET
    arguments: str


class ToolCallDelta(Answer, kw_only=True):
    """id and type come with the first delta of a call alone."""

    index: Count
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET
    function: FunctionDelta


class MessageDelta(Answer):
    """Pieces to join; the first delta of a choice has the role."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class ChunkChoice(Answer):
    index: Count
    delta: MessageDelta
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason | None


class ChatCompletionChunk(Answer):
    """One event of a stream. choices is empty in the one with the usage, which was asked for."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | UnsetType = UNSET
    timings: Timings | UnsetType = UNSET


# --- text -----------------------------------------------------------------------------------------


class TextLogprobs(Answer):
    """One entry a token in each list; nothing predicts the first token of an echoed prompt."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[Count]


class TextChoice(Answer):
    index: Count
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | int | None


class TextCompletion(Answer):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage
    timings: Timings | UnsetType = UNSET


class TextChunkChoice(Answer):
    index: Count
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None


class TextCompletionChunk(Answer):
    """One event of a stream. choices is empty in the one with the usage, which was asked for."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChunkChoice]
    usage: Usage | UnsetType = UNSET
    timings: Timings | UnsetType = UNSET
