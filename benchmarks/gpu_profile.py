"""Where the time of a workload goes on a GPU: host phases, device busy and idle, kernels.

    python benchmarks/gpu_profile.py [--shape qwen3-0.6b] [--case nano] [--rows 256 64 8]

First table: steps by number of rows, in milliseconds a step: the wall clock between results, the
device's time from a step's first launch to its last, its idle time before a step, and what the
host did meanwhile (launching happens on a thread of its own). Second: kernels of steps of single
tokens, in microseconds a step.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.profiler import ProfilerActivity, profile

from nanovllm import LLM, SamplingParams
from nanovllm.bench import offline, workloads
from nanovllm.bench.shapes import write_shape

ROW_CLASSES = (1, 8, 32, 64, 128, 192, 255, 256)
PHASES = ("wall", "device", "idle", "plan", "launch", "wait", "update", "outputs")


class Phases:
    """Wraps the parts of one engine; times are seconds a step."""

    def __init__(self, llm: LLM) -> None:
        self._llm, core = llm, llm._engine.core
        self.steps: list[dict[str, float]] = []
        self._now: dict[str, float] = defaultdict(float)
        self._launched: list[tuple[object, torch.cuda.Event, torch.cuda.Event, float]] = []
        runner = core._executor._runner
        self._execute = runner.execute
        runner.execute = self._timed_execute
        core.scheduler.schedule = self._timed("plan", core.scheduler.schedule)
        core.scheduler.update = self._timed("update", core.scheduler.update)
        core.step = self._timed("step", core.step)
        llm._advance = self._advance
        self._last = time.perf_counter()

    def _timed(self, name, call):
        def timed(*args):
            begin = time.perf_counter()
            try:
                return call(*args)
            finally:
                self._now[name] += time.perf_counter() - begin

        return timed

    def _timed_execute(self, plan):
        begin = time.perf_counter()
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        pending = self._execute(plan)
        last.record()
        self._launched.append((plan, first, last, time.perf_counter() - begin))
        return pending

    def _advance(self):
        begin = time.perf_counter()
        result = LLM._advance(self._llm)
        end = time.perf_counter()
        now = self._now
        now["outputs"] = end - begin - now["step"]
        now["wait"] = now["step"] - now["plan"] - now["update"]
        now["wall"] = end - self._last
        self._last = end
        self.steps.append(dict(now))
        now.clear()
        return result

    def begin(self) -> None:
        while self._llm._engine.core._in_flight:
            self._llm.step()
        self.steps.clear()
        self._launched.clear()
        self._last = time.perf_counter()

    def table(self) -> None:
        torch.cuda.synchronize()
        groups: dict[tuple[int, int], list[dict[str, float]]] = defaultdict(list)
        before = None
        for step, (plan, first, last, launch) in zip(self.steps, self._launched, strict=False):
            step["launch"] = launch
            step["device"] = first.elapsed_time(last) / 1e3
            step["idle"] = before.elapsed_time(first) / 1e3 if before else 0.0
            before = last
            rows = len(plan.rows)
            kind = next(size for size in ROW_CLASSES if rows <= size)
            groups[plan.num_tokens > rows, kind].append(step)
        print("      rows steps  total s " + " ".join(f"{name:>8s}" for name in PHASES))
        for (mixed, kind), steps in sorted(groups.items()):
            means = [1e3 * sum(s.get(name, 0) for s in steps) / len(steps) for name in PHASES]
            total = sum(s["wall"] for s in steps)
            words = " ".join(f"{mean:8.3f}" for mean in means)
            print(
                f"{'mixed' if mixed else 'single'}<={kind:<4d}{len(steps):5d} {total:8.3f} {words}"
            )
        total = {name: sum(s.get(name, 0) for s in self.steps) for name in PHASES}
        print("all, s: " + "  ".join(f"{name} {value:.3f}" for name, value in total.items()))


def add_prompts(llm: LLM, lens: list[int]) -> list[str]:
    generator = torch.Generator().manual_seed(len(lens))
    params = SamplingParams(temperature=0.6, max_tokens=1500, ignore_eos=True, detokenize=False)
    prompts = (torch.randint(0, 9999, (n,), generator=generator).tolist() for n in lens)
    return [llm.add_request(prompt, params) for prompt in prompts]


def profiled_steps(llm: LLM, count: int, title: str) -> None:
    """Kernel times of the next steps, in microseconds a step."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(count):
            llm.step()
        torch.cuda.synchronize()
    events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    totals: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    events.sort(key=lambda e: e.time_range.start)
    busy, end = 0.0, 0.0
    for event in events:
        start, stop = event.time_range.start, event.time_range.end
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
        totals[event.name][0] += 1
        totals[event.name][1] += stop - start
    span = end - events[0].time_range.start
    print(f"\n{title}: about {span / count:.0f} us a step, busy {busy / count:.0f}")
    for name, (number, micros) in sorted(totals.items(), key=lambda item: -item[1][1])[:14]:
        print(
            f"{micros / count:9.1f} us {number / count:6.1f}x {micros / number:8.2f}  {name[:80]}"
        )


def drop(llm: LLM, names: list[str]) -> None:
    for name in names:
        llm.abort(name)
    while not llm.is_finished():
        llm.step()


def kernels_of_steps(llm: LLM, rows: int, context: int) -> None:
    """Steps of single tokens, each row around `context` tokens."""
    lens = torch.randint(context // 2, context * 3 // 2, (rows,)).tolist()
    names = add_prompts(llm, lens)
    while llm._engine.core.scheduler.waiting:
        llm.step()
    for _ in range(6):
        llm.step()
    profiled_steps(llm, 6, f"{rows} rows around {context}, {sum(lens)} keys")
    drop(llm, names)


def kernels_of_prompts(llm: LLM) -> None:
    names = add_prompts(llm, [2048] * 24)
    for _ in range(2):
        llm.step()
    profiled_steps(llm, 2, "steps of 4 prompts of 2048")
    drop(llm, names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="qwen3-0.6b")
    parser.add_argument("--case", default="nano", choices=list(workloads.WORKLOADS))
    parser.add_argument("--rows", type=int, nargs="*", default=[256, 128, 64, 32, 8])
    parser.add_argument("--context", type=int, default=900)
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = str(write_shape(args.shape, Path(directory)))
        with LLM(
            model, load_format="dummy", skip_tokenizer_init=True, max_model_len=4096,
            enable_prefix_caching=False,
        ) as llm:  # fmt: skip
            cases = workloads.WORKLOADS[args.case]()
            for repeat in range(args.repeats + 1):
                for case in cases:
                    begin = time.perf_counter()
                    offline.generate(llm, case.shifted(7 + 1009 * repeat, 151936))
                    seconds = time.perf_counter() - begin
                    print(f"{case.name}: {seconds:.3f} s, {case.num_output_tokens / seconds:.0f}")
            if args.rows:
                kernels_of_prompts(llm)
            for rows in args.rows:
                kernels_of_steps(llm, rows, args.context)
            phases = Phases(llm)
            for case in cases:
                phases.begin()
                begin = time.perf_counter()
                offline.generate(llm, case.shifted(3, 151936))
                print(f"\n{case.name}, measured: {time.perf_counter() - begin:.3f} s")
                phases.table()


if __name__ == "__main__":
    main()
