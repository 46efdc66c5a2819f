"""Runs cases through the public API and times them; and a cold start, in a process of its own."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import nanovllm
from nanovllm.bench.roofline import Ceilings, measure_ceilings, work_of
from nanovllm.bench.workloads import Case
from nanovllm.build import EngineInfo
from nanovllm.config import EngineConfig
from nanovllm.errors import ConfigError, StepError
from nanovllm.llm import LLM
from nanovllm.model_files import find_model
from nanovllm.models import registry
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams

SHIFT = 1009  # a run's ids: coprime to everything here, so that prompts differ from the start
WARM_UP_TOKENS = 4
DEFAULT_CONTEXT = 4096
COLD_START = (
    "import json, sys, time, nanovllm;"
    "from nanovllm.trace.startup import line_of;"
    "llm = nanovllm.LLM(**json.loads(sys.argv[1]));"
    "ready = time.monotonic();"
    "next(llm.stream([1, 2, 3], max_tokens=2, temperature=0, ignore_eos=True));"
    "print('token', flush=True);"
    "print(line_of(llm.info.startup, time.monotonic() - ready), file=sys.stderr)"
)


@dataclass(frozen=True, slots=True)
class Result:
    """Medians over the repeats. Rates are tokens/s of the whole call; seconds holds each repeat.

    roof is the metric's value that the ceilings would allow, share the part of it that was
    reached; both None where there is no model of it.
    """

    case: str
    metric: str
    value: float
    seconds: tuple[float, ...]
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    first_token: float
    roof: float | None
    share: float | None


@dataclass(frozen=True, slots=True)
class Report:
    info: EngineInfo
    ceilings: Ceilings
    results: list[Result]


@contextlib.contextmanager
def _startup_left_uncollected() -> Iterator[None]:
    """Full garbage collections do not look at what was loaded before: as in the server's engine."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def run_cases(
    cases: Sequence[Case],
    options: dict[str, Any],
    *,
    repeats: int,
    tell: Callable[[str], None] = lambda text: None,
) -> Report:
    """Times every case on one engine. Raises ConfigError if a request does not fit the context."""
    model = registry.read_config(find_model(options["model"]).config)
    options = {"max_model_len": min(DEFAULT_CONTEXT, model.max_position)} | options
    prefix_caching = EngineConfig.from_kwargs(**options).enable_prefix_caching
    with LLM(**options) as llm, _startup_left_uncollected():
        _check_lengths(cases, llm.info.max_model_len)
        dtype: torch.dtype = getattr(torch, llm.info.dtype)
        tell("measuring the machine's ceilings ...")
        ceilings = measure_ceilings(torch.device(llm.info.device), dtype)
        results = []
        shifts = itertools.count(0, SHIFT)  # cases may share prompts: no run finds another's cached
        for case in cases:
            tell(f"{case.name} ...")
            work = work_of(
                case,
                model,
                llm.info.max_num_seqs,
                weight_bytes=dtype.itemsize,
                cache_bytes=getattr(torch, llm.info.kv_cache_dtype).itemsize,
                prefix_caching=prefix_caching,
            )
            results.append(_time_case(llm, case, repeats, shifts, work.seconds(ceilings)))
        return Report(llm.info, ceilings, results)


def _check_lengths(cases: Sequence[Case], limit: int) -> None:
    longest = max(len(r.prompt) + r.max_tokens for case in cases for r in case.requests)
    if longest > limit:
        raise ConfigError(
            f"a request of {longest} tokens does not fit the context of {limit}: a smaller --scale "
            "or another workload would"
        )


def _time_case(llm: LLM, case: Case, repeats: int, shifts: Iterator[int], least: float) -> Result:
    vocab = llm.info.vocab_size
    warm_up = case.shifted(next(shifts), vocab)
    generate(llm, warm_up, max_tokens=WARM_UP_TOKENS)
    seconds, outputs = [], []
    for _ in range(repeats):
        shifted = case.shifted(next(shifts), vocab)
        begin = time.perf_counter()
        outputs = generate(llm, shifted)
        seconds.append(time.perf_counter() - begin)
    metrics = [output.metrics for output in outputs if output.metrics is not None]
    first_token = statistics.median(m.time_to_first_token for m in metrics)
    median = statistics.median(seconds)
    amount = {"output": case.num_output_tokens, "prompt": case.num_prompt_tokens}
    rate = case.metric in amount
    value = amount[case.metric] / median if rate else median
    roof = amount[case.metric] / least if rate else least
    return Result(
        case=case.name,
        metric=case.metric,
        value=value,
        seconds=tuple(seconds),
        num_prompt_tokens=case.num_prompt_tokens,
        num_output_tokens=case.num_output_tokens,
        num_cached_tokens=sum(m.num_cached_tokens for m in metrics),
        first_token=first_token,
        roof=roof,
        share=least / median,
    )


def generate(llm: LLM, case: Case, max_tokens: int | None = None) -> list[RequestOutput]:
    params = [
        SamplingParams(
            temperature=case.temperature,
            max_tokens=min(r.max_tokens, max_tokens or r.max_tokens),
            ignore_eos=True,
            detokenize=False,
        )
        for r in case.requests
    ]
    prompts = [list(request.prompt) for request in case.requests]
    outputs: list[RequestOutput] = llm.generate(prompts, params, use_tqdm=False)
    failed = [output.outputs[0].error for output in outputs if output.finish_reason == "error"]
    if failed:
        raise StepError(f"{len(failed)} of {len(outputs)} requests failed: {failed[0]}")
    return outputs


def cold_start(
    options: dict[str, Any], repeats: int, tell: Callable[[str], None] = lambda text: None
) -> Result:
    """From the start of a process to its first token, the interpreter and torch included.

    tell gets a line for each repeat: where its time went.
    """
    seconds = []
    command = [sys.executable, "-c", COLD_START, json.dumps(options)]
    for _ in range(repeats):
        begin = time.perf_counter()
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            first = process.stdout.readline()
            seconds.append(time.perf_counter() - begin)
            _, errors = process.communicate()
        if first != "token\n":
            reason = (errors.strip().splitlines() or ["no reason given"])[-1]
            raise nanovllm.NanoVLLMError(f"the cold start failed: {reason}")
        tell(errors.strip().splitlines()[-1])
    median = statistics.median(seconds)
    return Result(
        case="cold start",
        metric="first token",
        value=median,
        seconds=tuple(seconds),
        num_prompt_tokens=3,
        num_output_tokens=2,
        num_cached_tokens=0,
        first_token=median,
        roof=None,
        share=None,
    )
