"""How to choose tokens for one request: frozen values, checked once, here.

Knows no tensors and no tokenizer, so a value that depends on the vocabulary (a token id out of
range) is checked by the engine when the request is added.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any, NoReturn

from nanovllm.errors import InvalidRequestError

MAX_N = 128
MAX_LOGPROBS = 20
SEED_LIMIT = 2**63


def _fail(name: str, value: object, allowed: str) -> NoReturn:
    raise InvalidRequestError(f"{name} must be {allowed}, got {value!r}")


def _check_float(name: str, value: object, low: float, high: float, allowed: str) -> None:
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not ok or not low <= value <= high:  # type: ignore[operator]
        _fail(name, value, allowed)


def _check_int(name: str, value: object, low: int, high: int | None = None) -> None:
    allowed = f"an integer of at least {low}" if high is None else f"an integer in [{low}, {high}]"
    ok = isinstance(value, int) and not isinstance(value, bool)
    if not ok or value < low or (high is not None and value > high):  # type: ignore[operator]
        _fail(name, value, allowed)


def _strings(name: str, value: object) -> tuple[str, ...]:
    items = (value,) if isinstance(value, str) else value
    if items is None:
        return ()
    if not isinstance(items, Iterable):
        _fail(name, value, "a string or a list of strings")
    strings = tuple(items)
    if not all(isinstance(item, str) and item for item in strings):
        _fail(name, value, "a string or a list of strings, none of them empty")
    return strings


def _token_ids(name: str, value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        _fail(name, value, "a list of token ids")
    items = tuple(value)
    for item in items:
        if not isinstance(item, int) or isinstance(item, bool) or item < 0:
            _fail(name, item, "a list of token ids (integers of at least 0)")
    return items


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
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

    Raises InvalidRequestError naming the range when a value is outside of it.
    """

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
    include_stop_str_in_output: bool = field(default=False)

    def __post_init__(self) -> None:
        self._check_ranges()
        self._check_lengths()
        for name, read in (("stop", _strings), ("bad_words", _strings)):
            object.__setattr__(self, name, read(name, getattr(self, name)))
        object.__setattr__(
            self, "stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids)
        )
        self._check_vocabulary_limits()
        for name in ("ignore_eos", "detokenize", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                _fail(name, getattr(self, name), "True or False")
        if self.stop and not self.detokenize:
            raise InvalidRequestError("stop strings need detokenize=True")

    def _check_ranges(self) -> None:
        _check_float("temperature", self.temperature, 0.0, 100.0, "a number in [0, 100]")
        _check_float("top_p", self.top_p, 5e-324, 1.0, "a number in (0, 1]")
        _check_float("min_p", self.min_p, 0.0, 1.0, "a number in [0, 1]")
        _check_int("top_k", self.top_k, -1)
        for name in ("presence_penalty", "frequency_penalty"):
            _check_float(name, getattr(self, name), -2.0, 2.0, "a number in [-2, 2]")
        penalty = self.repetition_penalty
        _check_float("repetition_penalty", penalty, 1e-6, 100.0, "a number in (0, 100]")

    def _check_lengths(self) -> None:
        if self.seed is not None:
            _check_int("seed", self.seed, -SEED_LIMIT, SEED_LIMIT - 1)
        _check_int("n", self.n, 1, MAX_N)
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1)
        _check_int("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError(
                f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens})"
            )
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 0, MAX_LOGPROBS)

    def _check_vocabulary_limits(self) -> None:
        if self.allowed_token_ids is not None:
            ids = _token_ids("allowed_token_ids", self.allowed_token_ids)
            if not ids:
                raise InvalidRequestError("allowed_token_ids must name at least one token id")
            object.__setattr__(self, "allowed_token_ids", ids)
        if self.logit_bias is None:
            return
        if not isinstance(self.logit_bias, Mapping):
            _fail("logit_bias", self.logit_bias, "a mapping from token id to a number")
        for token_id, bias in self.logit_bias.items():
            _check_int("a key of logit_bias", token_id, 0)
            _check_float("a value of logit_bias", bias, -100.0, 100.0, "a number in [-100, 100]")
        object.__setattr__(self, "logit_bias", dict(self.logit_bias) or None)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def restricted(self) -> bool:
        """Whether a cut drops some tokens before one is drawn."""
        return not self.greedy and (self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0)

    @classmethod
    def from_kwargs(cls, **kwargs: Any) -> SamplingParams:
        """The same as the constructor, but an unknown name is answered with the nearest one."""
        known = [f.name for f in fields(cls)]
        for name in kwargs:
            if name not in known:
                near = get_close_matches(name, known, 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise InvalidRequestError(f"unknown sampling parameter {name!r}{hint}")
        return cls(**kwargs)
