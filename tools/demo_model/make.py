"""One command from nothing to both model directories: tokenizer, data, training, evaluation.

python -m tools.demo_model.make --out build/demo_model
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import sys
import tarfile
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from tools.demo_model.card import environment, save_results, write_card
from tools.demo_model.evaluate import Answerer, agreement, evaluate
from tools.demo_model.model import DEMO, DRAFT, Shape, export, num_parameters
from tools.demo_model.shards import start_workers
from tools.demo_model.tokenizer import END_OF_TEXT, TURN_END, save_tokenizer, train_tokenizer
from tools.demo_model.train import Plan, Trainer

NAMES = ("demo", "demo-draft")
PART_BYTES = 15_000_000
TINY = Shape(hidden=32, intermediate=48, layers=1, heads=2, kv_heads=1, head_dim=16)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where the directories go")
    parser.add_argument("--seconds", type=float, default=400, help="time spent in training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 6))
    parser.add_argument("--tokens", type=int, default=65_536, help="per step")
    parser.add_argument("--questions", type=int, default=300, help="evaluated for each task")
    parser.add_argument("--documents", type=int, default=60_000, help="for the tokenizer")
    parser.add_argument("--initial", type=Path, help="go on from the models in this directory")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try the pipeline")
    parser.add_argument("--parts", type=Path, help="also a tar there, in parts of 15 MB")
    return parser.parse_args()


def write_parts(out: Path, target: Path) -> None:
    """All of `out` as target/assets.tar.0, .1, ... for transports that limit a file's size."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.add(out, ".")
    data = buffer.getvalue()
    for number, at in enumerate(range(0, len(data), PART_BYTES)):
        (target / f"assets.tar.{number}").write_bytes(data[at : at + PART_BYTES])


def save_models(trainer: Trainer, tokenizer: Any, out: Path, parts: Path | None) -> None:
    ends = tokenizer.token_to_id(TURN_END), tokenizer.token_to_id(END_OF_TEXT)
    for name, model in zip(NAMES, (trainer.demo, trainer.draft), strict=True):
        export(model, out / name, *ends)
        save_tokenizer(tokenizer, out / name)
    if parts:
        write_parts(out, parts)


def _evaluate(out: Path, device: str, count: int) -> tuple[dict[str, Any], float]:
    answerers = {name: Answerer(out / name, device) for name in NAMES}
    tables = {name: evaluate(answerer, count) for name, answerer in answerers.items()}
    for name, table in tables.items():
        print(f"{name}:")
        for task, row in table.items():
            print(f"  {task:15} {row['questions']:4} questions {row['percent']:6.1f}% exact")
    for row in tables["demo"].values():
        for wrong in row["wrong"]:
            print(wrong)
    return tables, agreement(*answerers.values(), count=max(2, count // 15))


def main() -> int:
    arguments, began = _arguments(), time.perf_counter()
    out: Path = arguments.out
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - began:6.1f} s] {text}", flush=True)

    if arguments.initial:
        tokenizer = Tokenizer.from_file(str(arguments.initial / "demo" / "tokenizer.json"))
    else:
        tokenizer = train_tokenizer(arguments.seed, arguments.documents)
    save_tokenizer(tokenizer, out / "demo")
    say(f"tokenizer of {tokenizer.get_vocab_size()} tokens")
    shards = Path(tempfile.mkdtemp(prefix="shards"))
    workers = start_workers(
        out / "demo" / "tokenizer.json", shards, arguments.seed, arguments.workers, 6000
    )
    try:
        plan = Plan(arguments.seconds, arguments.tokens, arguments.seed)
        if arguments.initial:
            plan = replace(plan, rates=(5.0e-4, 1.0e-3))
        trainer = Trainer((TINY, TINY) if arguments.tiny else (DEMO, DRAFT), plan, device)
        if arguments.initial:
            trainer.demo.load(arguments.initial / "demo")
            trainer.draft.load(arguments.initial / "demo-draft")
        training = trainer.run(
            shards, lambda _: save_models(trainer, tokenizer, out, arguments.parts)
        )
    finally:
        for worker in workers:
            worker.terminate()
        shutil.rmtree(shards, ignore_errors=True)
    save_models(trainer, tokenizer, out, arguments.parts)
    say(f"trained: {training}")
    tables, agree = _evaluate(out, device, arguments.questions)
    say(f"evaluated; the draft agrees with the demo in {100 * agree:.1f}% of the positions")
    models = (trainer.demo, trainer.draft)
    results = {
        "environment": environment(device),
        "training": training
        | {
            "seed": arguments.seed,
            "command": " ".join(["python -m tools.demo_model.make", *sys.argv[1:]]),
        },
        "parameters": {n: num_parameters(m) for n, m in zip(NAMES, models, strict=True)},
        "agreement": agree,
        "tables": tables,
    }  # fmt: skip
    save_results(out / "demo_model.json", results)
    for name in NAMES:
        write_card(out / name, name, results)
    if arguments.parts:
        write_parts(out, arguments.parts)
    say("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
