"""The model cards and the saved results: what was measured, and on what."""

from __future__ import annotations

import datetime
import json
import platform
from pathlib import Path
from typing import Any

import torch
import transformers

CARD = """---
license: mit
language: [en, zh]
---
# {name}

A Qwen3-architecture model of {parameters:,} parameters, trained from nothing on text that a
generator in the nanovllm repository writes (`tools/demo_model/`). {role}

## What it is

It makes the engine usable without any download: short conversation in English, a few dozen common
questions in Chinese, explanations of terms of LLM inference, and small checkable tasks: {tasks}.
It declines what it does not know, and always ends its turn.

Ranges: + and - of 0..999; products of 0..99; integer division of 0..999 by 1..12; 3 to 8 numbers
of 0..99 or 3 to 6 words of a fixed list to sort; 2 to 12 items to count, 2 to 8 to reverse;
spelled words of 3 to 10 letters; dates from 1900 to 2100, weekdays up to 365 days and dates up to
60 days away; unit conversion of 15 pairs, and Celsius 0..100 to Fahrenheit; JSON
objects of up to 4 fields from one sentence; tool calls as `<tool_call>` with JSON
arguments, 1 to 4 tools of 11 known ones.

## What it is not

It is no general assistant. It knows nothing beyond its templates, cannot write code, essays or
translations, follows system prompts only in form, and is wrong or evasive on anything phrased
far from its training text. Chats were at most 1,536 tokens long in training (2,048 positions).

## Measured

Held-out questions (chosen by a hash of their content, never seen in training), temperature 0,
float32 in transformers; the whole answer, written steps included, must match exactly.

| task | questions | exact |
|---|---|---|
{rows}
{agreement}
Trained on {hardware} for {seconds:.0f} s (both models together): {steps:,} steps,
{tokens:,} tokens, seed {seed}. Measured on {date} with torch {torch} and transformers
{transformers}; command: `{command}`.
"""
SPOKEN = ("small talk", "terms", "chinese", "unknown", "memory", "tool result")
ROLES = {
    "demo": "It is the model that runs when no other is named.",
    "demo-draft": "It drafts tokens for `demo` in speculative decoding: same tokenizer, "
    "distilled from it during training.",
}


def environment(device: str) -> dict[str, str]:
    hardware = platform.processor() or platform.machine()
    if device == "cuda":
        hardware = f"one {torch.cuda.get_device_name()}"
    return {
        "hardware": hardware,
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def write_card(directory: Path, name: str, results: dict[str, Any]) -> None:
    table = results["tables"][name]
    rows = "\n".join(
        f"| {task} | {row['questions']} | {row['percent']}% |" for task, row in table.items()
    )
    text = CARD.format(
        name=name,
        role=ROLES[name],
        parameters=results["parameters"][name],
        tasks=", ".join(task for task in table if task not in SPOKEN),
        rows=rows,
        agreement=(
            f"\nGiven the answers of `demo`, its first choice is the same token in "
            f"{100 * results['agreement']:.1f}% of the positions.\n"
            if name == "demo-draft"
            else ""
        ),
        **results["environment"],
        **results["training"],
    )  # fmt: skip
    (directory / "README.md").write_text(text, encoding="utf-8")


def save_results(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
