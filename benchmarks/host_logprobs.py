"""What log-probabilities cost the host, without a model: microseconds a step, from made-up results.

    python benchmarks/host_logprobs.py [--rows 256] [--count 5] [--tokens 128] [--profile]

The steps of a batch go through scheduler, download, update and outputs as those of a GPU do, and in
`wire` through the messages between engine and HTTP process as well; `read` is what the first look
at all entries costs, divided by the steps. The median of --repeats batches; garbage collection as
Python does it.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import pstats
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.core import EngineCore
from nanovllm.engine.plan import StepPlan, StepResult
from nanovllm.engine.scheduler import Scheduler, SequenceUpdate
from nanovllm.model_files import find_model
from nanovllm.requests import RequestTracker
from nanovllm.runner.gpu_results import Extras, GpuPending, LogprobDownload
from nanovllm.sampling_params import SamplingParams
from nanovllm.server import messages
from nanovllm.server.engine_process import _pack
from nanovllm.text.tokenizer import Tokenizer

PROMPT, VOCAB, BLOCK = 16, 4096, 16


class Copied:
    """A copy that has arrived: a download of tokens, and the event of another."""

    def __init__(self, words: list[int]) -> None:
        self._words = words

    def take(self) -> list[int]:
        return self._words

    def synchronize(self) -> None:
        pass


class MadeUp:
    """An executor whose steps choose the same tokens whatever they compute."""

    def __init__(self, rows: int, num_blocks: int, count: int | None) -> None:
        self.num_blocks = num_blocks
        best = 1 << max(1, ((count or 1) - 1).bit_length())
        ids = torch.randint(0, VOCAB, (rows, 1 + best))
        values = torch.randn(rows, 1 + best).log_softmax(-1)
        ranks = torch.randint(1, 9, (rows, 1))
        columns = (ids[:, :1], values[:, :1], ranks, values[:, 1:], ids[:, 1:])
        self._found = torch.cat([column.double() for column in columns], 1)
        self._tokens: list[int] = ids[:, 0].tolist()
        self._count = count

    def submit(self, plan: StepPlan) -> Step:
        lines, num_lines = [], 0
        for row in plan.rows:
            lines.append(num_lines if row.sample else -1)
            num_lines += row.sample
        words = Copied(self._tokens[:num_lines] + [0] * num_lines)
        extras = Extras()
        if self._count is not None and num_lines:
            download = LogprobDownload.__new__(LogprobDownload)  # its __init__ wants a GPU
            download._host, download._event = self._found[:num_lines], words  # type: ignore[assignment]
            download._lines, download._counts = range(num_lines), [self._count] * num_lines
            extras = Extras(download)
        return Step(GpuPending(plan, words, num_lines, lines, extras))  # type: ignore[arg-type]

    def close(self) -> None:
        pass


class Step:
    def __init__(self, pending: GpuPending) -> None:
        self.result: Callable[[], StepResult] = pending.wait


def over_the_wire(sequences: dict[tuple[str, int], Any]) -> Callable[[Any], list[SequenceUpdate]]:
    decoder = messages.decoder(messages.Report)

    def cross(updates: list[SequenceUpdate]) -> list[SequenceUpdate]:
        step = messages.Step([_pack(update) for update in updates], [], messages.Load())
        (body,) = messages.Frames().feed(messages.encode(step))
        return [
            SequenceUpdate(
                sequences[str(u.handle), u.index], u.token_ids, u.logprobs, u.prompt_logprobs,
                u.prompt_start, u.finish_reason, u.stop_token_id, u.error,
            )
            for u in decoder.decode(body).updates
        ]  # fmt: skip

    return cross


def batch(
    rows: int, count: int | None, tokens: int, tokenizer: Tokenizer | None, wire: bool
) -> tuple[float, float]:
    """Seconds of (all steps, the first look at all entries)."""
    blocks = rows * (-(-(PROMPT + tokens) // BLOCK) + 1)
    manager = BlockManager(blocks, BLOCK, enable_prefix_caching=False)
    scheduler = Scheduler(
        manager, max_num_seqs=rows, max_num_batched_tokens=rows * PROMPT, max_model_len=1 << 20
    )
    executor = MadeUp(rows, blocks, count)
    core = EngineCore(scheduler, executor, vocab_size=VOCAB, clock=time.monotonic)
    tracker = RequestTracker(tokenizer, stop=lambda seq: core.stop(seq, "stop"))
    params = SamplingParams(max_tokens=tokens, ignore_eos=True, logprobs=count, detokenize=False)
    outputs, sequences = [], {}
    for number in range(rows):
        prompt = [(7 * number + i) % VOCAB for i in range(PROMPT)]
        group = core.add(str(number), prompt, params)
        sequences[str(number), 0] = group[0]
        outputs.append(tracker.add(str(number), None, prompt, params, group))
    cross = over_the_wire(sequences) if wire else list
    gc.collect()  # what the batch before left is not this one's
    begin = time.perf_counter()
    while not core.is_finished:
        for update in cross(core.step()):
            tracker.apply(update)
    end = time.perf_counter()
    for output in outputs:
        assert output.logprobs is None or len(output.logprobs) == tokens
    return end - begin, time.perf_counter() - end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--count", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    rows, tokens = arguments.rows, arguments.tokens
    tokenizer = Tokenizer.from_directory(find_model("demo").directory)
    if arguments.profile:
        profile = cProfile.Profile()
        profile.runcall(batch, rows, arguments.count, tokens, None, False)
        pstats.Stats(profile).sort_stats("tottime").print_stats(18)
        return
    for name, wanted, tokenizer_, wire in (
        ("plain", None, None, False),
        ("log-probabilities", arguments.count, None, False),
        ("log-probabilities, with text", arguments.count, tokenizer, False),
        ("plain, wire", None, None, True),
        ("log-probabilities, wire", arguments.count, None, True),
    ):
        found = [batch(rows, wanted, tokens, tokenizer_, wire) for _ in range(arguments.repeats)]
        step, read = (
            1e6 * statistics.median(column) / tokens for column in zip(*found, strict=True)
        )
        print(f"{name:<30} {step:8.0f} us a step {read:8.0f} us to read", flush=True)


if __name__ == "__main__":
    main()
