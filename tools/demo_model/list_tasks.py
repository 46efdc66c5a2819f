"""Sorting, counting and reversing of short lists, of spelled words and of known words.

Ranges: 3 to 8 numbers of 0..99, 3 to 6 words to sort; lists of 2 to 12 items to count,
2 to 8 to reverse; spelled words of 3 to 10 letters.
"""

from __future__ import annotations

import random

from tools.demo_model.common import Example, ask
from tools.demo_model.words import COMMON, made_up

UP = [
    "Sort these numbers: {x}", "Sort {x}", "Put these numbers in order: {x}",
    "Sort from smallest to largest: {x}", "Sort the numbers {x} in ascending order.",
    "Order these numbers from low to high: {x}", "Please sort {x}.", "Sort the list {x}",
    "Sort these: {x}",
    "给这些数字排序：{x}",
]  # fmt: skip
DOWN = [
    "Sort from largest to smallest: {x}", "Sort the numbers {x} in descending order.",
    "Order these numbers from high to low: {x}", "Sort {x} in descending order.",
]  # fmt: skip
SEPARATORS = [", ", ", ", ", ", ", ", " ", ","]


def _joined(rng: random.Random, items: list[str]) -> str:
    """A list as users write it: with commas, with spaces, with a last "and"."""
    if rng.random() < 0.1:
        return ", ".join(items[:-1]) + " and " + items[-1]
    return rng.choice(SEPARATORS).join(items)


ALPHABET = [
    "Sort these words: {x}", "Sort the words alphabetically: {x}", "Sort {x} alphabetically.",
    "Put these words in alphabetical order: {x}", "Alphabetize: {x}",
    "Please sort these words from A to Z: {x}", "Sort these: {x}", "Sort {x}",
]  # fmt: skip


def sort_numbers(rng: random.Random) -> Example:
    numbers = [rng.randint(0, 99) for _ in range(rng.randint(3, 8))]
    down = rng.random() < 0.3
    text = ", ".join(map(str, numbers))
    answer = ", ".join(map(str, sorted(numbers, reverse=down)))
    question = ask(rng, DOWN if down else UP, x=_joined(rng, list(map(str, numbers))))
    return Example("sort numbers", f"{down} {text}", question, (answer,))


def sort_words(rng: random.Random) -> Example:
    words = rng.sample(COMMON, rng.randint(3, 6))
    text = ", ".join(words)
    return Example(
        "sort words", text, ask(rng, ALPHABET, x=_joined(rng, words)), (", ".join(sorted(words)),)
    )


ITEMS = [
    "How many items are in this list: {x}", "Count the items: {x}", "How many words are there: {x}",
    "Count the words in this list: {x}", "How long is this list: {x}",
    "How many things do I list here: {x}",
]  # fmt: skip
OCCURRENCES = [
    "How many times does {w} appear in: {x}", "Count {w} in this list: {x}",
    "How often does {w} occur here: {x}", "How many {w} are in the list {x}",
]  # fmt: skip
LETTERS = [
    "How many times does the letter {w} appear in {x}?", "Count the letter {w} in {x}.",
    "How many {w} are in {x}?", "How many letters {w} does {x} have?", "How many {w}'s in {x}?",
]  # fmt: skip


def _running(items: list[str], wanted: str | None) -> str:
    """Every item with the count so far; wanted None counts all."""
    total, steps = 0, []
    for item in items:
        total += wanted is None or item == wanted
        steps.append(f"{item} {total}")
    return ", ".join(steps) + f". Answer: {total}"


def counting(rng: random.Random) -> Example:
    kind = rng.randrange(4)
    if kind == 0:
        items = [rng.choice(COMMON) for _ in range(rng.randint(2, 12))]
        text = ", ".join(items)
        return Example(
            "counting", text, ask(rng, ITEMS, x=_joined(rng, items)), (_running(items, None),)
        )
    if kind == 1:
        few = rng.sample(COMMON, rng.randint(2, 4))
        items = [rng.choice(few) for _ in range(rng.randint(3, 12))]
        text, wanted = ", ".join(items), rng.choice(few)
        question = ask(rng, OCCURRENCES, x=text, w=wanted)
        return Example("counting", f"{wanted} {text}", question, (_running(items, wanted),))
    word = rng.choice(COMMON) if kind == 2 else made_up(rng)
    pool = word if rng.random() < 0.8 else "abcdefghijklmnopqrstuvwxyz"
    wanted, spelled = rng.choice(pool), " ".join(word)
    known = rng.choice(["the word {}", "the word {}", "{}", "'{}'"]).format(word)
    shown = known if kind == 2 else spelled
    question = ask(rng, LETTERS, x=shown, w=wanted)
    return Example("counting", f"{wanted} {word} {kind}", question, (_running(list(word), wanted),))


REVERSE = [
    "Reverse this list: {x}", "Reverse the order: {x}", "Write this list backwards: {x}",
    "Reverse {x}", "Turn this list around: {x}", "Please reverse: {x}",
]  # fmt: skip
REVERSE_LETTERS = [
    "Reverse the letters: {x}", "Write these letters backwards: {x}", "Reverse {x}",
    "Reverse the order of the letters {x}",
]  # fmt: skip
REVERSE_WORD = [
    "Reverse the word {x}.", "Spell the word {x} backwards.", "Write the word {x} backwards.",
    "What is the word {x} backwards?", "Can you reverse the word {x}?",
    "Reverse the letters of {x}.", "What is {x} spelled backwards?",
]  # fmt: skip
REVERSE_DIGITS = ["Reverse the digits of {x}.", "Write the number {x} backwards."]


def reversing(rng: random.Random) -> Example:
    kind = rng.randrange(4)
    if kind == 0:
        count = rng.randint(2, 8)
        items = [rng.choice(COMMON) for _ in range(count)]
        if rng.random() < 0.4:
            items = [str(rng.randint(0, 99)) for _ in range(count)]
        text, answer = ", ".join(items), ", ".join(reversed(items))
        return Example("reversing", text, ask(rng, REVERSE, x=_joined(rng, items)), (answer,))
    if kind == 1:
        number = str(rng.randint(100, 99_999_999))
        question = ask(rng, REVERSE_DIGITS, x=number)
        return Example("reversing", number, question, (number[::-1],))
    word = rng.choice(COMMON) if kind == 2 else made_up(rng)
    backwards = " ".join(reversed(word))
    if kind == 2:
        answer = f"{word} is spelled {' '.join(word)}. Backwards: {backwards}"
        return Example("reversing", f"word {word}", ask(rng, REVERSE_WORD, x=word), (answer,))
    spelled = " ".join(word)
    return Example("reversing", spelled, ask(rng, REVERSE_LETTERS, x=spelled), (backwards,))


SPELL = [
    "Spell the word {x}.", "Spell {x}.", "How do you spell {x}?", "How is {x} spelled?",
    "Which letters are in {x}?", "Can you spell {x}?",
]  # fmt: skip


def spelling(rng: random.Random) -> Example:
    """A drill for training alone: a token does not show its letters, so they must be learned."""
    word = made_up(rng) if rng.random() < 0.3 else rng.choice(COMMON)
    answer = f"{word} is spelled {' '.join(word)}."
    return Example("spelling", word, ask(rng, SPELL, x=word), (answer,))
