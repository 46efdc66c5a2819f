"""What HTTP adds: the server, streaming to clients on the same machine, against the engine alone.

    python benchmarks/server_overhead.py [--clients 64] [--rounds 3] [--json FILE]

Both serve the same numbers of tokens with as many rows: `nanovllm bench serve` drives a server of
its own with that many clients at once, and an `LLM` in another process completes the same number
of prompts in one call. Rounds alternate; a round's result is the ratio of output tokens a second.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from nanovllm.bench.report import as_json, write_json

PROMPT, ANSWER, PER_CLIENT = 64, 128, 4
OFFLINE = """
import random, sys, time
from nanovllm import LLM, SamplingParams
rows, count, prompt, answer, model = *map(int, sys.argv[1:5]), sys.argv[5]
llm = LLM(model, max_num_seqs=rows)
draw = random.Random(0)
params = SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True)
def run(number):
    prompts = [[draw.randrange(300, 4000) for _ in range(prompt)] for _ in range(number)]
    began = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - began
    return sum(len(output.token_ids) for output in outputs) / seconds
run(rows)
print(run(count))
"""


def offline(clients: int, model: str) -> float:
    """Output tokens a second of one `generate` call."""
    sizes = [str(n) for n in (clients, clients * PER_CLIENT, PROMPT, ANSWER)]
    command = [sys.executable, "-c", OFFLINE, *sizes, model]
    return float(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


def served(clients: int, model: str, folder: str) -> dict[str, Any]:
    """What `nanovllm bench serve` found."""
    path = Path(folder, "served.json")
    command = [sys.executable, "-m", "nanovllm.cli.main", "bench", "serve", "--model", model]
    command += ["--endpoint", "completions", "--concurrency", str(clients)]
    command += ["--num-requests", str(clients * PER_CLIENT), "--warm-up", str(clients)]
    command += ["--input-len", str(PROMPT), "--output-len", str(ANSWER)]
    command += ["--max-num-seqs", str(clients), "--json", str(path)]
    subprocess.run(command, capture_output=True, check=True)
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(1, args.rounds + 1):
            alone = offline(args.clients, args.model)
            (point,) = served(args.clients, args.model, folder)["points"]
            through = point["summary"]["output_rate"]
            rows.append({"round": number, "offline": alone, "served": through})
            print(f"round {number}: offline {alone:.0f}, served {through:.0f} tok/s", flush=True)
    ratio = statistics.median(row["served"] / row["offline"] for row in rows)
    print(f"\nserved / offline, median of {args.rounds} rounds: {ratio:.2f}")
    if args.json:
        extra = {"clients": args.clients, "rounds": rows, "served / offline": ratio}
        write_json(
            args.json, as_json(["benchmarks/server_overhead.py", *sys.argv[1:]], None, []) | extra
        )


if __name__ == "__main__":
    main()
