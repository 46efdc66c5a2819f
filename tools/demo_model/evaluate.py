"""Held-out evaluation through transformers in float32: whole answers, exact, at temperature 0.

The answers hold their written steps, so an answer with a wrong step counts as wrong.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tools.demo_model.common import Example
from tools.demo_model.documents import TASKS, prompt_text

TASK_NAMES = [name for name in TASKS if name not in ("introductions", "spelling")]


def held_out_questions(task: str, count: int, seed: int = 1) -> list[Example]:
    """Up to `count` different questions that training never saw."""
    rng = random.Random(f"evaluation {task} {seed}")
    found: dict[str, Example] = {}
    for _ in range(count * 400):
        example = TASKS[task][0](rng)
        if example.is_held_out():
            found.setdefault(example.key, example)
        if len(found) == count:
            break
    return list(found.values())


def prompt_of(example: Example) -> str:
    return prompt_text(list(example.history), example.question, None, example.tools)


class Answerer:
    """Greedy answers of a saved model, many prompts at once."""

    def __init__(self, directory: Path, device: str = "cpu") -> None:
        self.device = device
        self.tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        self.model = model.to(device).eval()

    @torch.inference_mode()
    def token_ids(self, prompts: list[str], max_tokens: int = 192) -> list[list[int]]:
        """Output ids including the end token, without what follows it."""
        inputs = self.tokenizer(prompts, return_tensors="pt", padding=True).to(self.device)
        inputs.pop("token_type_ids", None)
        rows = self.model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
        end = self.tokenizer.eos_token_id
        new = rows[:, inputs["input_ids"].shape[1] :].tolist()
        return [row[: row.index(end) + 1] if end in row else row for row in new]

    def texts(self, prompts: list[str], batch_size: int = 1000) -> list[str]:
        """Answers; one that did not end is marked, so that it can equal no right answer."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        texts = [""] * len(prompts)
        for at in range(0, len(order), batch_size):
            part = order[at : at + batch_size]
            for i, ids in zip(part, self.token_ids([prompts[i] for i in part]), strict=True):
                ended = ids[-1] == self.tokenizer.eos_token_id
                body = self.tokenizer.decode(ids[:-1] if ended else ids)
                texts[i] = body if ended else body + " (no end)"
        return texts


def evaluate(answerer: Answerer, count: int, show: int = 3) -> dict[str, dict[str, Any]]:
    """Per task: number of questions, share of exact answers, some of the wrong ones."""
    examples = [e for task in TASK_NAMES for e in held_out_questions(task, count)]
    texts = answerer.texts([prompt_of(example) for example in examples])
    table: dict[str, dict[str, Any]] = {
        t: {"questions": 0, "exact": 0, "wrong": []} for t in TASK_NAMES
    }
    for example, text in zip(examples, texts, strict=True):
        row = table[example.task]
        row["questions"] += 1
        row["exact"] += text in example.answers
        if text not in example.answers and len(row["wrong"]) < show:
            row["wrong"].append(
                {"question": example.question, "answer": text, "right": example.answers[0]}
            )
    for row in table.values():
        row["percent"] = round(100 * row["exact"] / max(1, row["questions"]), 1)
    return table


@torch.inference_mode()
def agreement(demo: Answerer, draft: Answerer, count: int) -> float:
    """Share of the demo's own answer tokens that the draft would have chosen too."""
    same = total = 0
    for task in TASK_NAMES:
        prompts = [prompt_of(example) for example in held_out_questions(task, count)]
        outputs = demo.token_ids(prompts)
        for prompt, output in zip(prompts, outputs, strict=True):
            ids = demo.tokenizer(prompt)["input_ids"]
            row = torch.tensor([ids + output], device=draft.device)
            guesses = draft.model(row).logits[0, len(ids) - 1 : -1].argmax(-1).tolist()
            same += sum(a == b for a, b in zip(guesses, output, strict=True))
            total += len(output)
    return round(same / total, 4)
