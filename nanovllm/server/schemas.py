"""The bodies of requests: which fields there are, and of which type.

Fields that nobody here knows are ignored and named once in the log. Fields that we know and do
not support are refused by name, unless they hold a value that asks for nothing.
"""

from __future__ import annotations

import logging
import re
from typing import Any, TypeVar

import msgspec

from nanovllm.server.errors import invalid

logger = logging.getLogger("nanovllm.server")

Number = float

NEUTRAL: tuple[Any, ...] = (None, False, [], {}, "")
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    # field: the values that ask for nothing, beside NEUTRAL
    "audio": (),
    "best_of": (1,),
    "chat_template": (),
    "continue_final_message": (),
    "documents": (),
    "function_call": ("none",),
    "functions": (),
    "grammar": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "json_schema": (),
    "length_penalty": (1, 1.0),
    "modalities": (["text"],),
    "prediction": (),
    "regex": (),
    "response_format": ({"type": "text"},),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": (),
    "suffix": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (),
    "web_search_options": (),
}
_MUST_BE_TRUE = ("skip_special_tokens", "spaces_between_special_tokens")
# Known to OpenAI's interface, without meaning for a server of one's own.
IGNORED = {
    "metadata",
    "prompt_cache_key",
    "prompt_cache_retention",
    "reasoning_effort",
    "safety_identifier",
    "service_tier",
    "skip_special_tokens",
    "store",
    "user",
    "verbosity",
}


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class Request(msgspec.Struct, kw_only=True):
    """What chat and text completions have in common."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: int | None = None
    min_p: Number | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    repetition_penalty: Number | None = None
    seed: int | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    logit_bias: dict[str, Number] | None = None
    priority: int | None = None
    cache_salt: str | None = None
    timings: bool | None = None


class ContentPart(msgspec.Struct, kw_only=True):
    type: str
    text: str | None = None
    refusal: str | None = None


class FunctionCall(msgspec.Struct, kw_only=True):
    name: str
    arguments: str | dict[str, Any] | None = None


class ToolCall(msgspec.Struct, kw_only=True):
    function: FunctionCall
    id: str | None = None
    type: str | None = None


class ChatMessage(msgspec.Struct, kw_only=True):
    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class FunctionSpec(msgspec.Struct, kw_only=True):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolSpec(msgspec.Struct, kw_only=True):
    type: str
    function: FunctionSpec | None = None


class ChatRequest(Request, kw_only=True):
    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[ToolSpec] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None


class CompletionRequest(Request, kw_only=True):
    prompt: str | list[str | int | list[int]]
    echo: bool | None = None
    logprobs: int | None = None
    add_special_tokens: bool | None = None


class TokenizeRequest(msgspec.Struct, kw_only=True):
    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    tools: list[ToolSpec] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    model: str | None = None
    tokens: list[int]


_named_once: set[str] = set()
_AT = re.compile(r" - at `(?:key in )?\$\.?(.*)`$")
_MISSING = re.compile(r"missing required field `(\w+)`")
Body = TypeVar("Body", bound=msgspec.Struct)


def decode(body: bytes, kind: type[Body]) -> Body:
    """The body as a record of this kind. Raises ApiError naming the field that is wrong."""
    raw = _decode_object(body)
    try:
        record = msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        raise _explain(error) from None
    except RecursionError:
        raise invalid("The body is nested too deeply.") from None
    _check_unsupported(raw, kind.__struct_fields__)
    return record


def _decode_object(body: bytes) -> dict[str, Any]:
    if not body.strip():
        raise invalid("The body is empty: a JSON object is needed.")
    try:
        raw = msgspec.json.decode(body)
    except UnicodeDecodeError:
        raise invalid("The body is not UTF-8.") from None
    except RecursionError:
        raise invalid("The body is nested too deeply.") from None
    except msgspec.MsgspecError as error:
        raise invalid(f"The body is not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise invalid("The body must be a JSON object.")
    return raw


def _explain(error: msgspec.ValidationError) -> Exception:
    text = str(error)
    at = _AT.search(text)
    missing = _MISSING.search(text)
    path = at[1] if at else ""
    if missing:
        path = f"{path}.{missing[1]}".lstrip(".")
    reason = _AT.sub("", text)
    return invalid(f"{reason} (in {path})" if path else reason, path or None)


def _check_unsupported(raw: dict[str, Any], known: tuple[str, ...]) -> None:
    for name, value in raw.items():
        if name in known:
            continue
        if name in UNSUPPORTED and not _is_one_of(value, NEUTRAL + UNSUPPORTED[name]):
            raise invalid(f"{name} is not supported by this server", name, "unsupported_parameter")
        if name in _MUST_BE_TRUE and value is False:
            raise invalid(f"{name} can only be true here", name, "unsupported_parameter")
        unknown = name not in UNSUPPORTED and name not in IGNORED and name not in _named_once
        if unknown and len(_named_once) < 1000:
            _named_once.add(name)
            logger.warning("ignoring the unknown field %.100r of a request", name)


def _is_one_of(value: Any, allowed: tuple[Any, ...]) -> bool:
    """By type and value: 0 is not False."""
    return any(type(value) is type(other) and value == other for other in allowed)
