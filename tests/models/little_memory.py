"""A process of its own with little GPU memory: prints answers, warnings or the error as JSON.

python little_memory.py MODEL SPARE WHEN OPTIONS: torch may take SPARE MiB more than it holds WHEN
the engine is there ("after") or before it is built ("before"); SPARE 0 is no limit. Of its own, so
that no memory which earlier work left in the allocator counts as spare.
"""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

import torch

from nanovllm import LLM, OutOfMemoryError, SamplingParams

PROMPTS = [[5 + (7 * i * j + i) % 20000 for j in range(400)] for i in range(30)]
PARAMS = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=1)


class Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def limit_memory(spare: int) -> None:
    torch.cuda.empty_cache()
    limit = torch.cuda.memory_reserved() + spare * (1 << 20)
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.mem_get_info()[1])


def run(model: str, spare: int, when: str, options: dict[str, Any]) -> dict[str, Any]:
    log = Lines()
    logging.getLogger("nanovllm").addHandler(log)
    if spare and when == "before":
        limit_memory(spare)
    try:
        llm = LLM(model, **options)
    except OutOfMemoryError as error:
        return {"error": str(error)}
    if spare and when == "after":
        limit_memory(spare)
    outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    llm.close()
    answers = [
        [(t, entry[t].logprob) for t, entry in zip(o.token_ids, o.logprobs or [], strict=True)]
        for o in outputs
    ]
    errors = [o.outputs[0].error for o in outputs if o.outputs[0].error]
    return {"answers": answers, "errors": errors, "log": log.lines}


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4]))))
