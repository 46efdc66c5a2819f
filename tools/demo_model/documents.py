"""Training documents: examples rendered as chats or as bare prompts, in trained and other parts.

The rendering equals the chat template's (a test compares them); it is written out here because
the template engine would cost most of the time of the generator.
"""

from __future__ import annotations

import json
import random

from tools.demo_model import chat_tasks, date_tasks, json_tasks, list_tasks, numbers_tasks
from tools.demo_model.common import Example, Maker, draw

# Maker and its share of the training examples.
TASKS: dict[str, tuple[Maker, float]] = {
    "addition": (numbers_tasks.addition, 5),
    "subtraction": (numbers_tasks.subtraction, 8),
    "multiplication": (numbers_tasks.multiplication, 7),
    "division": (numbers_tasks.division, 6),
    "units": (numbers_tasks.units, 7),
    "sort numbers": (list_tasks.sort_numbers, 5),
    "sort words": (list_tasks.sort_words, 6),
    "counting": (list_tasks.counting, 8),
    "reversing": (list_tasks.reversing, 8),
    "dates": (date_tasks.dates, 8),
    "json filling": (json_tasks.json_filling, 7),
    "tool calling": (json_tasks.tool_calling, 7),
    "tool result": (json_tasks.tool_result, 2),
    "small talk": (chat_tasks.small_talk, 8),
    "terms": (chat_tasks.terms, 8),
    "facts": (chat_tasks.facts, 3),
    "chinese": (chat_tasks.chinese, 5),
    "unknown": (chat_tasks.unknown, 7),
    "memory": (chat_tasks.memory, 5),
    "introductions": (chat_tasks.introductions, 2),
    "spelling": (list_tasks.spelling, 4),
}
_EXTRA: list[Maker] = [chat_tasks.never_told]
# Not evaluated, so all of them may be trained on.
_DRILLS: list[Maker] = [list_tasks.spelling, chat_tasks.introductions]
_NAMES = list(TASKS)
_SHARES = [share for _, share in TASKS.values()]
SYSTEM_PROMPTS = [
    "You are a helpful assistant.", "You are Nano, a small demo model.", "You are a friendly bot.",
    "Answer briefly.", "You are a helpful assistant. Answer in short sentences.",
    "You are an assistant for an inference engine.", "Be kind and precise.", "你是一个有用的助手。",
]  # fmt: skip
TOOLS_BEFORE = (
    "# Tools\n\nYou can call these functions, given as JSON within <tools></tools>:\n<tools>"
)
TOOLS_AFTER = (
    "\n</tools>\n\nTo call one, answer with its name and arguments:\n<tool_call>\n"
    '{"name": <name>, "arguments": <JSON object>}\n</tool_call>'
)

# A document is a list of (text, whether the loss counts it).
Document = list[tuple[str, bool]]


def system_text(system: str | None, tools: tuple[dict[str, object], ...]) -> str:
    """The content of the system turn, empty if there is none."""
    if not tools:
        return system or ""
    listed = "".join("\n" + json.dumps(tool, ensure_ascii=False) for tool in tools)
    return (f"{system}\n\n" if system else "") + TOOLS_BEFORE + listed + TOOLS_AFTER


def prompt_text(
    turns: list[tuple[str, str]],
    question: str,
    system: str | None = None,
    tools: tuple[dict[str, object], ...] = (),
) -> str:
    """A chat up to the point where the assistant answers."""
    return "".join(text for text, _ in chat([*turns, (question, "")], system, tools)[:-1])


def chat(
    turns: list[tuple[str, str]],
    system: str | None = None,
    tools: tuple[dict[str, object], ...] = (),
) -> Document:
    """The last part is the last answer with its end token."""
    first = system_text(system, tools)
    parts: Document = []
    before = f"<|im_start|>system\n{first}<|im_end|>\n" if first else ""
    for user, assistant in turns:
        text = f"{before}<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
        parts += [(text, False), (f"{assistant}<|im_end|>", True)]
        before = "\n"
    return parts


def _training_example(rng: random.Random) -> Example:
    maker = TASKS[rng.choices(_NAMES, _SHARES)[0]][0]
    if rng.random() < 0.01:
        maker = rng.choice(_EXTRA)
    if maker in _DRILLS:
        return maker(rng)
    return draw(maker, rng, held_out=False)


def _long_history(rng: random.Random) -> list[tuple[str, str]]:
    turns = []
    for _ in range(rng.choice([1, 1, 2, 2, 3, 5, 8, 12, 24])):
        example = _training_example(rng)
        if not example.history and not example.tools:
            turns.append((example.question, rng.choice(example.answers)))
    return turns


def training_document(rng: random.Random) -> Document:
    """A chat with one question, with several, or a bare prompt and its continuation."""
    example = _training_example(rng)
    answer = rng.choice(example.answers)
    turns = list(example.history)
    if (
        not turns
        and not example.tools
        and rng.random() < (0.4 if example.task == "small talk" else 0.1)
    ):
        return [(example.question, False), (f"{answer}<|im_end|>", True)]
    if not turns and rng.random() < 0.15:
        turns = _long_history(rng)
    system = rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.15 else None
    return chat([*turns, (example.question, answer)], system, example.tools)
