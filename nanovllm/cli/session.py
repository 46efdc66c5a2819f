"""A model opened for a person: its default sampling, and answers that stream and can be stopped.

Shared by `generate` and `chat`. Loads torch only when a model is opened.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nanovllm import EngineConfig, RequestOutput, SamplingParams
from nanovllm.cli.flags import given
from nanovllm.cli.terminal import InterruptFlag, Status
from nanovllm.sampling_params import recommended

if TYPE_CHECKING:
    from nanovllm import LLM

SAMPLING_KEYS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
TRUNCATIONS = ("top_k", "top_p", "min_p")


@dataclass(frozen=True, slots=True)
class Session:
    """sampling holds the model's defaults under what the command line said."""

    llm: LLM
    name: str
    sampling: dict[str, Any]


def open_session(options: argparse.Namespace) -> Session:
    """Loads the model that the flags ask for. Raises NanoVLLMError."""
    wanted = given(options, SamplingParams)
    SamplingParams.from_kwargs(**wanted)  # wrong values are told before anything is loaded
    engine = given(options, EngineConfig)
    EngineConfig.from_kwargs(**engine)
    name = engine.get("model", "demo")
    with Status(f"loading {name} ..."):
        with InterruptFlag(raise_at_end=True):
            # Here because it imports torch: flags are checked first, at once.
            from nanovllm import LLM
            from nanovllm.model_files import find_model

        files = find_model(name)
        sampling = sampling_defaults(files.generation, wanted)
        llm = LLM(**(engine | {"model": str(files.directory)}))
    return Session(llm, name, sampling)


def sampling_defaults(generation: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling options where the command line was silent.

    A model whose generation_config.json says do_sample gets the values written there; any other
    is greedy, as in transformers. Naming a truncation (top_k, top_p, min_p) without a temperature
    asks for sampling, so it is then at temperature 1. The length is bounded by the context alone.
    Raises ModelLoadError if the values written there are not allowed.
    """
    defaults: dict[str, Any] = {"max_tokens": None, "temperature": 0.0}
    if generation.get("do_sample"):
        defaults["temperature"] = 1.0
        defaults |= recommended(generation, SAMPLING_KEYS)
    elif any(key in wanted for key in TRUNCATIONS):
        defaults["temperature"] = 1.0
    return defaults | dict(wanted)


def answer(
    llm: LLM, prompt: str | list[int], params: SamplingParams, show: Callable[[str], None]
) -> tuple[RequestOutput, bool]:
    """(output, whether Ctrl-C ended it); show gets the first completion's text as it comes.

    Raises InvalidRequestError if the prompt cannot be served.
    """
    request_id = llm.add_request(prompt, params)
    output: RequestOutput | None = None
    shown = 0
    with InterruptFlag() as interrupt:
        try:
            # Until nothing is unreported: an abort is reported by the step after it.
            while output is None or not llm.is_finished():
                for changed in llm.step():
                    if changed.request_id == request_id:  # not one that an error left behind
                        output = changed
                        show(output.text[shown:])
                        shown = len(output.text)
                if interrupt.is_set:
                    llm.abort(request_id)
        finally:
            llm.abort(request_id)  # when show failed: the reader has gone
    return output, interrupt.is_set and output.finish_reason == "abort"


def speed(output: RequestOutput) -> str:
    """One line on how fast it was."""
    metrics = output.metrics
    if metrics is None:
        return ""
    num_tokens = sum(len(completion.token_ids) for completion in output.outputs)
    first, total = metrics.time_to_first_token, metrics.total_time
    return speed_words(num_tokens, len(output.outputs), first, total)


def speed_words(num_tokens: int, num_answers: int, first: float | None, total: float) -> str:
    """Tokens, tokens/s and seconds to the first token; decode speed counts from there on."""
    parts = [f"{num_tokens} token{'' if num_tokens == 1 else 's'}"]
    if first is not None:
        decoded, seconds = num_tokens - num_answers, total - first
        if decoded > 0 and seconds > 0:
            parts.append(f"{decoded / seconds:.1f} tok/s")
        parts.append(f"first token {first:.2f} s")
    return " · ".join(parts)
