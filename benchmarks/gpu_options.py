"""What single options cost on a GPU: tokens/s of a batch with and without them, in one process.

python benchmarks/gpu_options.py [--shape qwen3-0.6b] [--rows 1,32,256] [--nano] [--json FILE]

Random weights, prompts of 128 ids, --tokens each; the median of --repeats calls after one to
warm up. Rows: everything plain; one row, then all rows, with penalties, with a bias, with logprobs;
then batch_invariant, with the nano workload of `nanovllm bench` in both modes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from nanovllm import LLM, SamplingParams
from nanovllm.bench.machine import machine
from nanovllm.bench.offline import generate
from nanovllm.bench.shapes import write_shape
from nanovllm.bench.workloads import WORKLOADS

PROMPT = 128
SPECIAL: dict[str, dict[str, Any]] = {
    "penalties": {"repetition_penalty": 1.1, "frequency_penalty": 0.2},
    "bias": {"logit_bias": {17: 2.0, 99: -3.0}, "min_tokens": 40},
    "logprobs": {"logprobs": 5},
}


def rate(
    llm: LLM, rows: int, special: dict[str, Any], num_special: int, *, tokens: int, repeats: int
) -> float:
    """Output tokens/s of `rows` requests, of which the first num_special are special."""
    common = {"temperature": 1.0, "max_tokens": tokens, "ignore_eos": True, "detokenize": False}
    params = [SamplingParams(**common, **(special if i < num_special else {})) for i in range(rows)]
    seconds = []
    for repeat in range(repeats + 1):
        prompts = [
            [(31 * i + 7 * j + 1009 * repeat) % 9000 for j in range(PROMPT)] for i in range(rows)
        ]
        begin = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds.append(time.perf_counter() - begin)
        failed = [o.outputs[0].error for o in outputs if o.finish_reason == "error"]
        if failed:
            raise SystemExit(failed[0])
    return rows * tokens / statistics.median(seconds[1:])


def nano_rate(llm: LLM) -> float:
    (case,) = WORKLOADS["nano"]()
    seconds = []
    for repeat in range(3):
        begin = time.perf_counter()
        generate(llm, case.shifted(1009 * repeat, llm.info.vocab_size))
        seconds.append(time.perf_counter() - begin)
    return case.num_output_tokens / min(seconds[1:])


def measure(
    options: dict[str, Any], rows: list[int], *, special: bool, nano: bool, **times: int
) -> dict[str, float]:
    found: dict[str, float] = {}
    with LLM(**options) as llm:
        for n in rows:
            found[f"{n} rows, plain"] = rate(llm, n, {}, 0, **times)
            for name, params in SPECIAL.items() if special else ():
                for count in sorted({1, n}):
                    found[f"{n} rows, {count} with {name}"] = rate(llm, n, params, count, **times)
        if nano:
            found["nano"] = nano_rate(llm)
    for name, value in found.items():
        print(f"{name:<32} {value:10.0f} tok/s", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="qwen3-0.6b")
    parser.add_argument("--rows", default="1,32,256")
    parser.add_argument("--nano", action="store_true")
    parser.add_argument("--only", choices=["special", "invariant"])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = [int(n) for n in arguments.rows.split(",")]
    times = {"tokens": arguments.tokens, "repeats": arguments.repeats}
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        options: dict[str, Any] = {
            "model": str(write_shape(arguments.shape, Path(directory))),
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "max_model_len": 4096,
            "enable_prefix_caching": False,
        }
        special = arguments.only != "invariant"
        print(f"{arguments.shape}, default")
        found["default"] = measure(options, rows, special=special, nano=arguments.nano, **times)
        if arguments.only != "special":
            print(f"{arguments.shape}, batch_invariant")
            changed = options | {"batch_invariant": True}
            found["batch_invariant"] = measure(
                changed, rows, special=False, nano=arguments.nano, **times
            )
    if arguments.json:
        report = {"shape": arguments.shape, "machine": machine(), "tokens_per_second": found}
        arguments.json.write_text(json.dumps(report, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
