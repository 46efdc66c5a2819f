"""The bodies of requests: which fields there are, and of which type.

Ranges stand here for the OpenAPI document; `SamplingParams` and validate.py enforce them, in better
words than a schema has.

Fields that nobody here knows are ignored and named once in the log. Fields that we know and do
not support are refused by name, unless they hold a value that asks for nothing.
"""

from __future__ import annotations

import logging
import re
from typing import Annotated, Any, TypeVar

import msgspec

from nanovllm.sampling_params import MAX_LOGPROBS, MAX_N, SEED_LIMIT
from nanovllm.server.errors import invalid

logger = logging.getLogger("nanovllm.server")
ROLES = ("system", "developer", "user", "assistant", "tool")
TEXT_PARTS = ("text", "input_text", "output_text", "refusal")
TOOL_CHOICES = ("none", "auto", "required")
MAX_STOPS = 4
MAX_BAD_WORDS, MAX_BAD_CHARACTERS = 1000, 1 << 16  # each step looks at each of them
MAX_PRIORITY = 2**31
MAX_SALT = 1024


def _shown(**keywords: Any) -> msgspec.Meta:
    """Keywords of JSON Schema that are told and not enforced here."""
    return msgspec.Meta(extra_json_schema=keywords)


def _range(low: float, high: float) -> msgspec.Meta:
    return _shown(minimum=low, maximum=high)


Positive = Annotated[int, _shown(minimum=1)]
Penalty = Annotated[float, _range(-2, 2)]
TokenId = Annotated[int, _shown(minimum=0)]
NumLogprobs = Annotated[int, _range(0, MAX_LOGPROBS)]
NumChoices = Annotated[int, _range(1, MAX_N)]
Words = Annotated[str, _shown(minLength=1)]
LogitBias = Annotated[
    dict[str, Annotated[float, _range(-100, 100)]],
    _shown(propertyNames={"pattern": "^[0-9]{1,10}$"}),
]

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
    "json_schema": (),
    "length_penalty": (1, 1.0),
    "modalities": (["text"],),
    "prediction": (),
    "prompt_logprobs": (),
    "regex": (),
    "spaces_between_special_tokens": (True,),
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


Schema = dict[str, Any] | bool


class JsonSchema(msgspec.Struct, kw_only=True):
    """strict is taken as true: the answer always satisfies the schema."""

    name: str | None = None
    description: str | None = None
    schema: Schema | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, kw_only=True):
    type: Annotated[str, _shown(enum=("text", "json_object", "json_schema"))]
    json_schema: JsonSchema | None = None


class StructuredOutputs(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Exactly one of them, in vLLM's names."""

    json: Schema | str | None = None
    json_object: bool | None = None
    regex: Words | None = None
    grammar: Words | None = None
    choice: Annotated[list[Words], _shown(minItems=1)] | None = None


class Request(msgspec.Struct, kw_only=True):
    """What chat and text completions have in common."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Positive | None = None
    min_tokens: Annotated[int, _shown(minimum=0)] | None = None
    temperature: Annotated[float, _range(0, 100)] | None = None
    top_p: Annotated[float, _shown(exclusiveMinimum=0, maximum=1)] | None = None
    top_k: Annotated[int, _shown(minimum=-1)] | None = None
    min_p: Annotated[float, _range(0, 1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, _range(1e-6, 100)] | None = None
    seed: Annotated[int, _range(-SEED_LIMIT, SEED_LIMIT - 1)] | None = None
    n: NumChoices | None = None
    stop: Words | Annotated[list[Words], _shown(maxItems=MAX_STOPS)] | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    bad_words: Annotated[list[Words], _shown(maxItems=MAX_BAD_WORDS)] | None = None
    allowed_token_ids: Annotated[list[TokenId], _shown(minItems=1)] | None = None
    logit_bias: LogitBias | None = None
    priority: Annotated[int, _range(-MAX_PRIORITY, MAX_PRIORITY)] | None = None
    cache_salt: Annotated[str, _shown(maxLength=MAX_SALT)] | None = None
    timings: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | str | None = None
    guided_regex: Words | None = None
    guided_grammar: Words | None = None
    guided_choice: Annotated[list[Words], _shown(minItems=1)] | None = None


class FunctionName(msgspec.Struct, kw_only=True):
    name: str


class ToolChoice(msgspec.Struct, kw_only=True):
    """The one function that is to be called."""

    type: Annotated[str, _shown(const="function")]
    function: FunctionName


class ContentPart(msgspec.Struct, kw_only=True):
    type: Annotated[str, _shown(enum=TEXT_PARTS)]
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
    role: Annotated[str, _shown(enum=ROLES)]
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
    type: Annotated[str, _shown(const="function")]
    function: FunctionSpec


class ChatRequest(Request, kw_only=True):
    messages: Annotated[list[ChatMessage], _shown(minItems=1)]
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: NumLogprobs | None = None
    tools: list[ToolSpec] | None = None
    tool_choice: Annotated[str, _shown(enum=TOOL_CHOICES)] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None


class CompletionRequest(Request, kw_only=True):
    prompt: Words | Annotated[list[Words | TokenId | list[TokenId]], _shown(minItems=1)]
    best_of: NumChoices | None = None
    echo: bool | None = None
    logprobs: NumLogprobs | None = None
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
    tokens: list[TokenId]


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
