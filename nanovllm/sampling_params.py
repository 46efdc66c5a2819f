"""How to choose tokens for one request: frozen values, checked once, here.

Knows no tensors and no tokenizer, so a value that depends on the vocabulary (a token id out of
range) is checked by the engine when the request is added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, NoReturn

from nanovllm.errors import InvalidRequestError, ModelLoadError
from nanovllm.records import Record, real, unpacked, whole
from nanovllm.structured_output import StructuredOutput, read_structure

MAX_N = 128
MAX_LOGPROBS = 20
SEED_LIMIT = 2**63
Reader = Callable[[str, Any], Any]  # (name of a parameter, what was given) -> its plain value


def _fail(name: str, value: object, allowed: str) -> NoReturn:
    raise InvalidRequestError(f"{name} must be {allowed}, got {value!r}")


def _number(low: float, high: float, allowed: str) -> Reader:
    def read(name: str, value: Any) -> float:
        number = real(value)
        if number is None or not low <= number <= high:  # no number is in a range that NaN is in
            _fail(name, value, f"a number in {allowed}")
        return number

    return read


def _integer(low: int, high: int | None = None) -> Reader:
    allowed = f"an integer of at least {low}" if high is None else f"an integer in [{low}, {high}]"

    def read(name: str, value: Any) -> int:
        number = whole(value)
        if number is None or number < low or (high is not None and number > high):
            _fail(name, value, allowed)
        return number

    return read


def _optional(read: Reader) -> Reader:
    return lambda name, value: None if value is None else read(name, value)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        _fail(name, value, "True or False")
    return value


def _strings(name: str, value: Any) -> tuple[str, ...]:
    items = (value,) if isinstance(value, str) else () if value is None else value
    if not isinstance(items, Iterable):
        _fail(name, value, "a string or a list of strings")
    strings = tuple(items)
    if not all(isinstance(item, str) and item for item in strings):
        _fail(name, value, "a string or a list of strings, none of them empty")
    for string in strings:
        try:
            string.encode()
        except UnicodeEncodeError:
            _fail(name, string, "valid Unicode, without lone surrogates")
    return strings


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    items = () if value is None else unpacked(value)
    if isinstance(items, (str, bytes)) or not isinstance(items, Iterable):
        _fail(name, value, "a list of token ids")
    ids = []
    for item in items:
        token_id = whole(item)
        if token_id is None or token_id < 0:
            _fail(name, item, "a list of token ids (integers of at least 0)")
        ids.append(token_id)
    return tuple(ids)


def _some_token_ids(name: str, value: Any) -> tuple[int, ...]:
    ids = _token_ids(name, value)
    if not ids:
        raise InvalidRequestError(f"{name} must name at least one token id")
    return ids


def _biases(name: str, value: Any) -> dict[int, float] | None:
    if not isinstance(value, Mapping):
        _fail(name, value, "a mapping from token id to a number")
    key, bias = _integer(0), _number(-100.0, 100.0, "[-100, 100]")
    read = {key(f"a key of {name}", k): bias(f"a value of {name}", v) for k, v in value.items()}
    return read or None


_READERS: dict[str, Reader] = {
    "temperature": _number(0.0, 100.0, "[0, 100]"),
    "top_k": _integer(-1),
    "top_p": _number(5e-324, 1.0, "(0, 1]"),
    "min_p": _number(0.0, 1.0, "[0, 1]"),
    "presence_penalty": _number(-2.0, 2.0, "[-2, 2]"),
    "frequency_penalty": _number(-2.0, 2.0, "[-2, 2]"),
    "repetition_penalty": _number(1e-6, 100.0, "(0, 100]"),
    "seed": _optional(_integer(-SEED_LIMIT, SEED_LIMIT - 1)),
    "n": _integer(1, MAX_N),
    "max_tokens": _optional(_integer(1)),
    "min_tokens": _integer(0),
    "stop": _strings,
    "stop_token_ids": _token_ids,
    "ignore_eos": _flag,
    "logprobs": _optional(_integer(0, MAX_LOGPROBS)),
    "prompt_logprobs": _optional(_integer(0, MAX_LOGPROBS)),
    "logit_bias": _optional(_biases),
    "allowed_token_ids": _optional(_some_token_ids),
    "bad_words": _strings,
    "detokenize": _flag,
    "include_stop_str_in_output": _flag,
    "structured_output": _optional(read_structure),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams(Record):
    """Sampling parameters of one request.

    temperature  0 is greedy; otherwise logits are divided by it
    top_k        keep the k most likely tokens; 0 or -1 keeps all
    top_p        keep the smallest set of tokens whose probability reaches top_p (nucleus
                 sampling, Holtzman et al. 2019)
    min_p        drop tokens less likely than min_p times the most likely one
    presence_penalty, frequency_penalty   subtracted once, or per occurrence, for generated tokens
    repetition_penalty                    divides positive and multiplies negative logits of
                 tokens seen in prompt or output (CTRL, Keskar et al. 2019)
    seed         fixes the tokens whatever shares the batch; None draws a fresh seed
    n            completions of the same prompt; they share the prompt's KV blocks
    max_tokens   tokens to generate at most; None generates up to the end of the context
    min_tokens   tokens to generate before an end token or stop token may come
    stop         strings that end the completion; they are not part of its text
    stop_token_ids   ids that end the completion, beside the model's own
    ignore_eos   go on past the model's end tokens
    logprobs     report this many most likely tokens (and the chosen one) at each position
    prompt_logprobs  the same for the prompt's positions
    logit_bias   added to the logits of the given token ids
    allowed_token_ids    only these can be chosen
    bad_words    strings that must not be produced (tokenized with and without a leading space)
    detokenize   False skips text; outputs carry token ids only
    include_stop_str_in_output   keep the stop string in the text
    structured_output    the form that the text must have: JSON of a schema, a regular expression,
                 a grammar, or one of some choices; the text ends where the form is complete

    Numbers of any library are accepted, and stored as plain ones. Raises InvalidRequestError
    naming the range when a value is outside of it, or the nearest name for an unknown one.
    """

    _unknown = (InvalidRequestError, "sampling parameter")

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: tuple[str, ...] | list[str] | str | None = ()
    stop_token_ids: tuple[int, ...] | list[int] | None = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: tuple[int, ...] | list[int] | None = None
    bad_words: tuple[str, ...] | list[str] | str | None = ()
    detokenize: bool = True
    include_stop_str_in_output: bool = False
    structured_output: StructuredOutput | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in _READERS}
        self._set(**{n: _READERS[n](n, v) for n, v in given.items() if v is not _DEFAULTS[n]})
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError(
                f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens})"
            )
        if self.stop and not self.detokenize:
            raise InvalidRequestError("stop strings need detokenize=True")
        for name in ("ignore_eos", "allowed_token_ids"):
            if self.structured_output is not None and getattr(self, name):
                raise InvalidRequestError(
                    f"{name} contradicts structured_output, which says what may come and where "
                    "the text ends"
                )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def restricted(self) -> bool:
        """Whether a cut drops some tokens before one is drawn."""
        return not self.greedy and (self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0)


_DEFAULTS = {field.name: field.default for field in fields(SamplingParams)}  # need no reading


def recommended(generation: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The options of these names that a model's generation_config.json sets.

    Raises ModelLoadError if one of them is not allowed.
    """
    named = {name: generation.get(name) for name in names}
    found = {name: value for name, value in named.items() if value is not None}
    try:
        SamplingParams(**found)
    except InvalidRequestError as error:
        raise ModelLoadError(f"generation_config.json: {error}") from None
    return found
