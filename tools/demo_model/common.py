"""What every part of the generator shares: an example, the split, noise in the wording.

Knows nothing of tokens or models. Everything random comes from a `random.Random` passed in.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

HELD_OUT_PERCENT = 8


@dataclass(frozen=True)
class Example:
    """One question and its acceptable answers.

    key       the content of the question, free of wording where the wording carries none;
              the split between training and evaluation is a hash of it
    question  the user's text
    answers   all acceptable answers; training draws one of them
    tools     function signatures for the system turn, as the chat template takes them
    history   earlier turns of the chat, (user, assistant)
    """

    task: str
    key: str
    question: str
    answers: tuple[str, ...]
    tools: tuple[dict[str, Any], ...] = ()
    history: tuple[tuple[str, str], ...] = ()

    def is_held_out(self) -> bool:
        """Whether the question belongs to the evaluation alone."""
        return is_held_out(self.task, self.key)


Maker = Callable[[random.Random], Example]


def is_held_out(task: str, key: str) -> bool:
    """Whether a question belongs to the evaluation alone."""
    digest = hashlib.blake2b(f"{task}|{key}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % 100 < HELD_OUT_PERCENT


def normalized(text: str) -> str:
    """Letters and digits in lower case: what is left of a question without its form."""
    return " ".join(re.findall(r"\w+", text.lower()))


def draw(maker: Maker, rng: random.Random, *, held_out: bool) -> Example:
    """An example from one side of the split."""
    for _ in range(10_000):
        example = maker(rng)
        if example.is_held_out() == held_out:
            return example
    raise RuntimeError("the maker has no question on this side of the split")


def _typo(rng: random.Random, word: str) -> str:
    at = rng.randrange(1, len(word) - 1)
    kind = rng.randrange(3)
    if kind == 0:
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    if kind == 1:
        return word[:at] + word[at + 1 :]
    return word[:at] + word[at] + word[at:]


def _with_typo(rng: random.Random, template: str) -> str:
    parts = re.split(r"(\{[^}]*\}|[A-Za-z]{5,})", template)
    words = [i for i, part in enumerate(parts) if re.fullmatch(r"[A-Za-z]{5,}", part)]
    if words:
        at = rng.choice(words)
        parts[at] = _typo(rng, parts[at])
    return "".join(parts)


def _map_text(template: str, change: Callable[[str], str]) -> str:
    parts = re.split(r"(\{[^}]*\})", template)
    return "".join(part if part.startswith("{") else change(part) for part in parts)


def noisy(rng: random.Random, template: str) -> str:
    """Another spelling of a template: case, lost punctuation, a typo. {fields} stay as they are."""
    kind = rng.random()
    if kind < 0.10:
        template = _map_text(template, str.lower)
    elif kind < 0.14:
        template = _map_text(template, str.upper)
    elif kind < 0.20:
        template = _with_typo(rng, template)
    if rng.random() < 0.12:
        template = template.rstrip("?.!")
    return template


def ask(rng: random.Random, templates: list[str], **values: Any) -> str:
    """A noisy template filled with values."""
    return noisy(rng, rng.choice(templates)).format(**values)
