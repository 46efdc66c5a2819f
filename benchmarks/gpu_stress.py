"""Two minutes of everything at once on a GPU: nothing may fail, leak or change.

python benchmarks/gpu_stress.py [--seconds 120] [--shape qwen3-0.6b] [--batch-invariant]

Random weights and requests: prompts of 1 to 2000 ids, chunks, shared prefixes, preemption for
want of blocks, penalties, biases, log-probabilities, top-k and top-p, aborts. One request comes
back every round and must answer the same where the mode promises it. Prints memory as it goes.
"""

from __future__ import annotations

import argparse
import random
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from nanovllm import LLM, SamplingParams
from nanovllm.bench.shapes import write_shape

MIB = 1 << 20
WISHES: list[dict[str, Any]] = [
    {},
    {},
    {},
    {"top_k": 20, "top_p": 0.9},
    {"min_p": 0.05},
    {"repetition_penalty": 1.2, "presence_penalty": 0.5},
    {"logit_bias": {7: 2.0}, "min_tokens": 1},
    {"allowed_token_ids": list(range(100, 400))},
    {"logprobs": 5},
    {"prompt_logprobs": 1},
    {"temperature": 0.0},
    {"n": 3},
]


def requests(rng: random.Random, shared: list[int]) -> tuple[list[list[int]], list[SamplingParams]]:
    prompts, params = [], []
    for _ in range(rng.randint(1, 120)):
        size = rng.choice((1, 5, 60, 300, 2000))
        start = shared[: rng.choice((0, 0, 500))]
        prompts.append(start + [rng.randrange(9000) for _ in range(rng.randint(1, size))])
        wish = {"temperature": 0.8} | rng.choice(WISHES)
        params.append(
            SamplingParams(
                max_tokens=rng.randint(1, 120), ignore_eos=True, detokenize=False, **wish
            )
        )
    return prompts, params


def round_of(llm: LLM, rng: random.Random, shared: list[int], probe: list[int]) -> list[Any]:
    """Queues a round, aborts some of it, and returns the answers."""
    prompts, params = requests(rng, shared)
    names = [llm.add_request(p, s) for p, s in zip(prompts, params, strict=True)]
    want = SamplingParams(temperature=0.7, seed=3, max_tokens=40, ignore_eos=True, logprobs=0)
    asked = llm.add_request(probe, want)
    gone = set(rng.sample(names, len(names) // 10))
    answers, steps = [], 0
    while not llm.is_finished():
        answers += [output for output in llm.step() if output.finished]
        steps += 1
        if steps == 10:
            for name in gone:
                llm.abort(name)
    failed = [o.outputs[0].error for o in answers if o.finish_reason == "error"]
    assert not failed, failed[0]
    assert {o.request_id for o in answers} >= set(names) - gone
    return [o for o in answers if o.request_id == asked]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--shape", default="qwen3-0.6b")
    parser.add_argument("--batch-invariant", action="store_true")
    arguments = parser.parse_args()
    rng = random.Random(0)
    shared = [rng.randrange(9000) for _ in range(500)]
    probe = [rng.randrange(9000) for _ in range(333)]
    with tempfile.TemporaryDirectory() as directory:
        llm = LLM(
            model=str(write_shape(arguments.shape, Path(directory))),
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=4096,
            num_kv_blocks=900,  # of 64 slots: too few for everything at once
            batch_invariant=arguments.batch_invariant,
        )
    answers, rounds, begin, told = set(), 0, time.monotonic(), 0.0
    while time.monotonic() - begin < arguments.seconds:
        (output,) = round_of(llm, rng, shared, probe)
        lps = [e[t].logprob for t, e in zip(output.token_ids, output.logprobs, strict=True)]
        answers.add((tuple(output.token_ids), tuple(lps)))
        rounds += 1
        if time.monotonic() - told > 10:
            told = time.monotonic()
            used, held = torch.cuda.memory_allocated() / MIB, torch.cuda.memory_reserved() / MIB
            rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(f"round {rounds}: GPU {used:.0f} MiB used, {held:.0f} held, host peak {rss:.0f}")
    print(f"{rounds} rounds, {len(answers)} different answers of the request that came back")
    assert not arguments.batch_invariant or len(answers) == 1
    llm.close()


if __name__ == "__main__":
    main()
