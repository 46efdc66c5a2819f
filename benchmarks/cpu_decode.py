"""Decoding alone on a CPU: tokens/s by batch size and context.

    python benchmarks/cpu_decode.py [--shape NAME] [--batches 1,4,16,32] [--context N] [--json FILE]

Random weights. A rate is that of a long answer less a one-token answer to the same prompts, which
the prefix cache then holds. Rates of two versions are only comparable if their runs alternate.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import nanovllm
from nanovllm.bench.offline import generate
from nanovllm.bench.report import as_json, table, write_json
from nanovllm.bench.shapes import write_shape
from nanovllm.bench.workloads import VOCAB, Case, Request


def seconds(llm: nanovllm.LLM, case: Case, max_tokens: int | None = None) -> float:
    begin = time.perf_counter()
    generate(llm, case, max_tokens=max_tokens)
    return time.perf_counter() - begin


def decode_rate(llm: nanovllm.LLM, case: Case, repeats: int) -> float:
    """Median over the repeats, tokens/s of all rows together."""
    generate(llm, case, max_tokens=1)  # the prompts are cached from here on
    steps = case.requests[0].max_tokens - 1
    rates = []
    for _ in range(repeats):
        spent = -seconds(llm, case, max_tokens=1) + seconds(llm, case)
        rates.append(len(case.requests) * steps / spent)
    return statistics.median(rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", default="smollm-135m")
    parser.add_argument("--batches", default="1,4,16,32")
    parser.add_argument("--context", type=int, default=368, help="tokens before the answer")
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rng = random.Random(0)
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        model = str(write_shape(options.shape, Path(directory)))
        with nanovllm.LLM(
            model, device="cpu", load_format="dummy", skip_tokenizer_init=True
        ) as llm:
            for size in map(int, options.batches.split(",")):
                prompts = [
                    [rng.randrange(VOCAB) for _ in range(options.context)] for _ in range(size)
                ]
                requests = tuple(Request(tuple(p), options.output) for p in prompts)
                found[f"batch {size}"] = decode_rate(llm, Case("", requests), options.repeats)
    print(table([("decode", "tokens/s"), *((name, f"{v:.1f}") for name, v in found.items())]))
    if options.json:
        command = [os.path.relpath(sys.argv[0]), *sys.argv[1:]]
        write_json(options.json, as_json(command, None, []) | {"tokens_per_second": found})


if __name__ == "__main__":
    main()
