"""Our CPU speed against `transformers` on the same random weights, in one interleaved run.

    python benchmarks/cpu_vs_transformers.py [--rounds N] [--scale X] [--json FILE]

The model has the shape of SmolLM-135M in bfloat16; the 32 requests are the workload `smollm`
(prompts 64-512, outputs 32-256). Compared are: our continuous batching; `generate` of
`transformers` one request after the other (on a stated subset, as a rate); its static batches,
padded on the left, sorted by output length or in order, where only tokens that were asked for
count; batch-1 decoding of both; and our engine with the prefix cache on and off when all prompts
share 384 tokens. After one exploring pass over the static batches (with a quarter of all lengths),
every round measures everything once in turn; medians over the rounds count, ratios are medians
of each round's ratio.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import startup
import torch
import transformers

import nanovllm
from nanovllm.bench.offline import generate
from nanovllm.bench.report import as_json, table, write_json
from nanovllm.bench.shapes import SMOLLM_135M
from nanovllm.bench.workloads import Case, Request, smollm

SHIFT = 1009
SHARED_PREFIX = 384
BATCH_SIZES = (4, 8, 16, 32)
EXPLORE_SCALE = 0.25  # of all lengths, while the best static batch is looked for
DECODE = Case("batch 1", (Request(tuple(range(1, 65)), 129),))
TARGETS = {
    "ours / one by one": 4.0,
    "ours / best static batch": 1.3,
    "prefix cache on / off": 1.5,
    "batch-1 decode, ours / theirs": 1.0,
}


def make_model(directory: Path) -> transformers.PreTrainedModel:
    """Random weights, saved for us and returned for `transformers`."""
    fields = {k: v for k, v in SMOLLM_135M.items() if k not in ("architectures", "rope_theta")}
    config = transformers.LlamaConfig(**fields, bos_token_id=1)
    config.rope_parameters = {"rope_type": "default", "rope_theta": SMOLLM_135M["rope_theta"]}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(directory)
    del model
    return transformers.LlamaForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()


class Theirs:
    """`transformers` with exact output lengths and greedy tokens."""

    def __init__(self, model: transformers.PreTrainedModel) -> None:
        self._model = model
        self._model.generation_config.eos_token_id = None

    @torch.inference_mode()
    def batch(self, requests: Sequence[Request]) -> float:
        """Seconds of one static batch, as long as its longest output."""
        width = max(len(request.prompt) for request in requests)
        ids = torch.zeros(len(requests), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(requests):
            ids[row, width - len(request.prompt) :] = torch.tensor(request.prompt)
            mask[row, width - len(request.prompt) :] = 1
        num_tokens = max(request.max_tokens for request in requests)
        begin = time.perf_counter()
        out = self._model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        seconds = time.perf_counter() - begin
        assert out.shape[1] == width + num_tokens
        return seconds

    def static(self, requests: Sequence[Request], size: int, is_sorted: bool) -> float:
        """Seconds for all requests in batches of a size."""
        queue = sorted(requests, key=lambda r: -r.max_tokens) if is_sorted else list(requests)
        return sum(self.batch(queue[i : i + size]) for i in range(0, len(queue), size))


def ours(llm: nanovllm.LLM, case: Case) -> float:
    begin = time.perf_counter()
    generate(llm, case)
    return time.perf_counter() - begin


def decode_rate(run: Callable[[Case], float]) -> float:
    """Tokens/s of decoding alone: a long answer less a short one."""
    (request,) = DECODE.requests
    short = Case("short", (Request(request.prompt, 1),))
    return (request.max_tokens - 1) / (run(DECODE) - run(short))


def explore(theirs: Theirs, case: Case) -> dict[tuple[int, bool], float]:
    """Useful tokens/s of each static batch, once."""
    found = {}
    count = len(case.requests)
    for size in [size for size in BATCH_SIZES if size < count] + [count]:
        for is_sorted in (True, False):
            if size < count or is_sorted:  # one batch of all has no order
                seconds = theirs.static(case.requests, size, is_sorted)
                found[size, is_sorted] = case.num_output_tokens / seconds
                say(f"static batch {_name((size, is_sorted))}: {found[size, is_sorted]:.1f} tok/s")
    return found


def _name(static: tuple[int, bool]) -> str:
    return f"{static[0]} {'sorted' if static[1] else 'in order'}"


def measure_round(
    number: int, engines: dict[str, nanovllm.LLM], theirs: Theirs, case: Case, shared: Case,
    static: tuple[int, bool], num_single: int,
) -> dict[str, float]:  # fmt: skip
    """Everything once, tokens/s; other token ids than in any other round."""
    vocab: int = SMOLLM_135M["vocab_size"]
    case, shared = case.shifted(number * SHIFT, vocab), shared.shifted(number * SHIFT, vocab)
    step = len(case.requests) / num_single
    singles = [case.requests[int(i * step)] for i in range(num_single)]
    cached, uncached = engines["cached"], engines["uncached"]
    seconds = {
        "ours": ours(cached, case),
        "static": theirs.static(case.requests, *static),
        "single": sum(theirs.batch([request]) for request in singles),
        "prefix on": ours(cached, shared),
        "prefix off": ours(uncached, shared),
    }
    tokens = dict.fromkeys(seconds, case.num_output_tokens)
    tokens["single"] = sum(request.max_tokens for request in singles)
    rates = {name: tokens[name] / value for name, value in seconds.items()}
    rates["decode ours"] = decode_rate(lambda c: ours(uncached, c))
    rates["decode theirs"] = decode_rate(lambda c: theirs.batch(c.requests))
    return rates


def ratios(rates: dict[str, float]) -> dict[str, float]:
    return {
        "ours / one by one": rates["ours"] / rates["single"],
        "ours / best static batch": rates["ours"] / rates["static"],
        "prefix cache on / off": rates["prefix on"] / rates["prefix off"],
        "batch-1 decode, ours / theirs": rates["decode ours"] / rates["decode theirs"],
    }


def medians(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}


def run(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    theirs = Theirs(make_model(directory))
    common: dict[str, Any] = {"device": "cpu", "dtype": "bfloat16", "skip_tokenizer_init": True}
    engines = {
        name: nanovllm.LLM(str(directory), enable_prefix_caching=name == "cached", **common)
        for name in ("cached", "uncached")
    }
    case = smollm(options.num_requests)[0].shortened(options.scale)
    shared = smollm(options.num_requests, SHARED_PREFIX)[0].shortened(options.scale)
    for engine in engines.values():  # warm up
        generate(engine, case.shifted(-SHIFT, SMOLLM_135M["vocab_size"]), max_tokens=4)
    theirs.batch(case.requests[:2])
    explored = explore(theirs, case.shortened(EXPLORE_SCALE))
    best = max(explored, key=lambda key: explored[key])
    num_single = min(options.single_requests, len(case.requests))
    rounds = []
    for number in range(options.rounds):
        rounds.append(measure_round(number, engines, theirs, case, shared, best, num_single))
        say(f"round {number + 1}: " + ", ".join(f"{k} {v:.1f}" for k, v in rounds[-1].items()))
    for engine in engines.values():
        engine.close()
    return {
        "num_requests": len(case.requests),
        "single_requests": num_single,
        "prompt_tokens": case.num_prompt_tokens,
        "output_tokens": case.num_output_tokens,
        "static_batches": {_name(key): rate for key, rate in explored.items()},
        "best_static_batch": _name(best),
        "rounds": rounds,
        "tokens_per_second": medians(rounds),
        "ratios": medians([ratios(rates) for rates in rounds]),
        "engine": {part: choice.name for part, choice in engines["cached"].info.choices.items()},
    }


def show(found: dict[str, Any]) -> None:
    rates = found["tokens_per_second"]
    print(
        f"{found['num_requests']} requests, {found['prompt_tokens']} tokens in, "
        f"{found['output_tokens']} out; one by one on {found['single_requests']} of them; "
        f"best static batch: {found['best_static_batch']}"
    )
    print(table([("output tokens/s", "median"), *((n, f"{v:.1f}") for n, v in rates.items())]))
    rows = [(n, f"{v:.2f}", f"{TARGETS[n]:.1f}") for n, v in found["ratios"].items()]
    print(table([("ratio", "median", "at least"), *rows]))
    if "seconds" in found:
        rows2 = [(name, f"{value:.3f} s") for name, value in found["seconds"].items()]
        rows2 += [(f"memory: {n}", f"{v:.0f} MiB") for n, v in found["memory_mib"].items()]
        print(table([("start-up and memory", "median"), *rows2]))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="times all lengths")
    parser.add_argument("--num-requests", type=int, default=32)
    parser.add_argument("--single-requests", type=int, default=4, help="run one by one")
    parser.add_argument("--model", default="demo", help="for the row of nanovllm generate")
    parser.add_argument("--no-startup", action="store_true", help="leave times and memory out")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as directory:
        found = run(options, Path(directory))
        if not options.no_startup:
            found["seconds"] = startup.start_up(5, options.model)
            found["memory_mib"] = startup.peak_memory(
                Path(directory), options.num_requests, startup.KV_BYTES, 134_515_008
            )
    show(found)
    if options.json:
        command = [os.path.relpath(sys.argv[0]), *sys.argv[1:]]
        write_json(options.json, as_json(command, None, []) | found)


if __name__ == "__main__":
    main()
