"""Start-up times and peak memory, each measured in a process of its own.

    python benchmarks/startup.py [--model DIR] [--repeats N] [--json FILE]

Times are medians of whole processes (interpreter start included) unless the row says otherwise.
Peak memory is VmHWM: what weights, the KV cache, and a bare `import torch` do not explain is ours.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from nanovllm.bench.report import as_json, table, write_json
from nanovllm.bench.shapes import write_shape

CLI = [sys.executable, "-m", "nanovllm.cli.main"]
IMPORT = (
    "import sys, time; t = time.perf_counter(); import nanovllm;"
    "assert 'torch' not in sys.modules; print(time.perf_counter() - t)"
)
PEAK = "print(next(l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM')))"
# A small product first, so that the libraries' own start-up counts for both.
BARE = "import torch; torch.ones(64, 64) @ torch.ones(64, 64);" + PEAK
ENGINE = """
import json, sys, nanovllm
from nanovllm.bench.offline import generate
from nanovllm.bench.workloads import smollm
from nanovllm.runner.memory import block_bytes
from nanovllm.model_files import find_model
from nanovllm.models.registry import read_config
import torch
options = json.loads(sys.argv[1])
llm = nanovllm.LLM(**options)
model, dtype = read_config(find_model(options["model"]).config), getattr(torch, llm.info.dtype)
generate(llm, smollm(int(sys.argv[2]))[0])
print(llm.info.num_blocks * block_bytes(model, llm.info.block_size, dtype))
print(dtype.itemsize)
"""
MIB = 1 << 20
KV_BYTES = 256 * MIB  # less than the 32 requests hold, so that every page of it is touched


def run_python(code: str, *arguments: str) -> list[str]:
    """The lines that a fresh interpreter prints."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()


def wall(command: list[str], repeats: int) -> float:
    """Median seconds of a process, from its start to its end."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def start_up(repeats: int, model: str) -> dict[str, float]:
    """Seconds; generate runs from process start to the full answer."""
    generate = [*CLI, "generate", "--model", model]
    inside = [float(run_python(IMPORT)[0]) for _ in range(repeats)]
    return {
        "python -c pass": wall([sys.executable, "-c", "pass"], repeats),
        "python -c 'import torch'": wall([sys.executable, "-c", "import torch"], repeats),
        "import nanovllm, inside": statistics.median(inside),
        "nanovllm --help": wall([*CLI, "--help"], repeats),
        f"nanovllm generate ({Path(model).name})": wall(generate, repeats),
    }


def peak_memory(
    model: Path, num_requests: int, kv_bytes: int, num_weights: int
) -> dict[str, float]:
    """MiB of a process that serves the smollm requests; model may be a shape without weights."""
    options: dict[str, Any] = {
        "model": str(model),
        "skip_tokenizer_init": True,
        "device": "cpu",
        "kv_cache_memory_bytes": kv_bytes,
    }
    if not any(model.glob("*.safetensors")):
        options["load_format"] = "dummy"
    bare = int(run_python(BARE)[0]) << 10
    lines = run_python(ENGINE + PEAK, json.dumps(options), str(num_requests))
    kv, itemsize, peak = int(lines[0]), int(lines[1]), int(lines[2]) << 10
    weights = num_weights * itemsize
    found = {
        "peak": peak,
        "bare torch": bare,
        "weights": weights,
        "KV cache": kv,
        "beyond these": peak - bare - weights - kv,
    }
    return {name: value / MIB for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="demo", help="for the row of nanovllm generate")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--num-requests", type=int, default=32, help="for the memory rows")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    seconds = start_up(options.repeats, options.model)
    with tempfile.TemporaryDirectory() as directory:
        shape = write_shape("smollm-135m", Path(directory))
        memory = peak_memory(shape, options.num_requests, KV_BYTES, 134_515_008)
    rows = [(name, f"{value:.3f} s") for name, value in seconds.items()]
    rows += [(f"memory: {name}", f"{value:.0f} MiB") for name, value in memory.items()]
    print(table([("measure", "median"), *rows]))
    if options.json:
        content = as_json([os.path.relpath(sys.argv[0]), *sys.argv[1:]], None, [])
        write_json(options.json, content | {"seconds": seconds, "memory_mib": memory})


if __name__ == "__main__":
    main()
