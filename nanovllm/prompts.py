"""What users give, prompts and sampling options in several forms, as the engine takes it.

Knows no engine: whether a request can be served is checked there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

from nanovllm.errors import InvalidRequestError
from nanovllm.records import unpacked, whole
from nanovllm.sampling_params import SamplingParams
from nanovllm.text.tokenizer import Tokenizer

Prompt = str | Sequence[int]
EncodedPrompt = tuple[str | None, list[int]]  # text if there was one, token ids


def encode_prompt(
    tokenizer: Tokenizer | None, prompt: Prompt, params: SamplingParams
) -> EncodedPrompt:
    """Raises InvalidRequestError if prompt is neither text nor token ids, or more than one."""
    if tokenizer is None and (params.stop or params.bad_words):
        raise InvalidRequestError("stop strings and bad_words need a tokenizer")
    if isinstance(prompt, str):
        if tokenizer is None:
            raise InvalidRequestError("a text prompt needs a tokenizer: pass token ids")
        return prompt, tokenizer.encode(prompt)
    items = unpacked(prompt)
    if not isinstance(items, Sequence) or isinstance(items, (bytes, bytearray)):
        raise InvalidRequestError(f"a prompt must be a string or a list of token ids: {prompt!r}")
    if set(map(type, items)) == {int}:
        return None, list(items)  # as nearly always, and hundreds of thousands of tokens
    if items and all(isinstance(unpacked(item), Sequence) for item in items):
        raise InvalidRequestError(
            "a prompt must be a string or a list of token ids, got a list of prompts: "
            "only generate() of LLM and LLMEngine takes several, as one flat list"
        )
    if items and all(isinstance(item, Mapping) for item in items):
        raise InvalidRequestError(
            "a prompt must be a string or a list of token ids, got a list of messages: "
            "LLM.chat() answers them, render_chat() makes token ids of them"
        )
    plain = [whole(item) for item in items]
    # What is no integer stays as it is: the engine names it.
    return None, [item if n is None else n for n, item in zip(plain, items, strict=True)]


def split_batch(prompts: Prompt | Sequence[Prompt]) -> tuple[list[Prompt], bool]:
    """(all prompts, whether there was a single one instead of a list of them)."""
    batch: Any = unpacked(prompts)
    if not isinstance(batch, Sequence):
        raise InvalidRequestError(f"prompts must be a prompt or a list of them: {prompts!r}")
    single = isinstance(batch, str) or (bool(batch) and isinstance(batch[0], Integral))
    return ([batch], True) if single else (list(batch), False)


def encode_salt(cache_salt: str) -> bytes:
    """Raises InvalidRequestError if cache_salt is not text."""
    if not isinstance(cache_salt, str):
        raise InvalidRequestError(f"cache_salt must be a string, got {cache_salt!r}")
    return cache_salt.encode(errors="surrogatepass")


def params_for(
    num_prompts: int,
    given: SamplingParams | Sequence[SamplingParams] | None,
    sampling: Mapping[str, Any],
) -> list[SamplingParams]:
    """One for each prompt, from params for all, one each, or keywords.

    Raises InvalidRequestError if they are something else or their number differs.
    """
    if given is not None and sampling:
        raise InvalidRequestError(
            f"give SamplingParams or keywords, not both (keywords: {', '.join(sampling)})"
        )
    if given is None:
        given = SamplingParams(**sampling)
    if isinstance(given, SamplingParams):
        return [given] * num_prompts
    params = list(given) if isinstance(given, Sequence) else [given]
    for p in params:
        if not isinstance(p, SamplingParams):
            raise InvalidRequestError(f"sampling_params must be SamplingParams, got {given!r}")
    if len(params) != num_prompts:
        raise InvalidRequestError(f"{num_prompts} prompts but {len(params)} sampling_params")
    return params
