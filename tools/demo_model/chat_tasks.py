"""Conversation: small talk, terms, facts, Chinese, what the models do not know, and memory."""

from __future__ import annotations

import random

from tools.demo_model import (
    chat_text,
    chinese_text,
    date_tasks,
    list_tasks,
    numbers_tasks,
    words,
)
from tools.demo_model.common import Example, noisy, normalized
from tools.demo_model.terms_text import DIFFERENCES, TERMS

WHAT = [
    "What is {t}?", "What's {t}?", "What does {t} mean?", "Define {t}.",
    "What do you know about {t}?",
    "Can you tell me what {t} is?", "Tell me what {t} is.", "What is meant by {t}?", "{t}?",
]  # fmt: skip
EXPLAIN = [
    "Explain {t}.", "Can you explain {t}?", "Please explain {t}.", "Explain {t} to me.",
    "Tell me about {t}.", "Describe {t}.", "How does {t} work?", "Explain {t} in simple words.",
    "What is {t} and why does it matter?", "Explain {t} like I am five.", "Explain {t} briefly.",
]  # fmt: skip
WHY = [
    "Why does {t} matter?", "Why is {t} important?", "Why is {t} useful?", "What is {t} good for?",
    "Why do we need {t}?", "What is the use of {t}?", "Why would I want {t}?",
]  # fmt: skip
DIFFERENCE = [
    "What is the difference between {a} and {b}?", "Compare {a} and {b}.", "{a} vs {b}",
    "How does {a} differ from {b}?", "What's the difference between {a} and {b}?",
    "Explain the difference between {a} and {b}.", "{a} or {b}: what is the difference?",
]  # fmt: skip


def _prefixed(rng: random.Random, question: str) -> str:
    prefix = rng.choice(chat_text.PREFIXES)
    return prefix + question if rng.random() < 0.6 else question


def small_talk(rng: random.Random) -> Example:
    questions, answers = rng.choice(chat_text.INTENTS)
    question = _prefixed(rng, rng.choice(questions))
    return Example("small talk", normalized(question), noisy(rng, question), tuple(answers))


def terms(rng: random.Random) -> Example:
    if rng.random() < 0.2:
        a, b, answer = rng.choice(DIFFERENCES)
        if rng.random() < 0.5:
            a, b = b, a
        question = rng.choice(DIFFERENCE).format(a=a, b=b)
    else:
        names, definition, why = rng.choice(TERMS)
        name = rng.choice(names)
        kind = rng.randrange(3)
        question = rng.choice([WHAT, EXPLAIN, WHY][kind]).format(t=name)
        answer = [definition, f"{definition} {why}", why][kind]
    question = _prefixed(rng, question)
    return Example("terms", normalized(question), noisy(rng, question), (answer,))


def facts(rng: random.Random) -> Example:
    if rng.random() < 0.5:
        country = rng.choice(list(chat_text.CAPITALS))
        question = rng.choice(chat_text.CAPITAL_QUESTIONS).format(c=country)
        answer = f"The capital of {country} is {chat_text.CAPITALS[country]}."
    else:
        questions, answer = rng.choice(chat_text.FACTS)
        question = rng.choice(questions)
    question = _prefixed(rng, question)
    return Example("facts", normalized(question), noisy(rng, question), (answer,))


def chinese(rng: random.Random) -> Example:
    questions, answer = rng.choice(chinese_text.INTENTS)
    question = rng.choice(chinese_text.PREFIXES) + rng.choice(questions)
    ending = rng.choice(["", "", "？", "?", "。", "！"])
    cased = question.lower() if rng.random() < 0.2 else question
    return Example("chinese", normalized(question), cased + ending, (answer,))


def _unknown_word(rng: random.Random) -> tuple[str, str, str]:
    word = words.made_up(rng)
    question = noisy(rng, rng.choice(chat_text.UNKNOWN_WORD_QUESTIONS))
    return word, question.format(m=word), chat_text.UNKNOWN_WORD.format(m=word)


def _too_large(rng: random.Random) -> tuple[str, str, str]:
    a, b = rng.randint(10_000, 9_999_999), rng.randint(1_000, 9_999_999)
    question = rng.choice(chat_text.TOO_LARGE_QUESTIONS).format(a=a, b=b)
    return f"{a} {b}", question, chat_text.TOO_LARGE


def _nonsense(rng: random.Random) -> tuple[str, str, str]:
    letters = "abcdefghijklmnopqrstuvwxyz"
    text = "".join(rng.choice(letters) for _ in range(rng.randint(4, 12)))
    return text, text, chat_text.NONSENSE


def unknown(rng: random.Random) -> Example:
    """Questions that the models shall decline: obscure facts, unknown words, large numbers."""
    kind = rng.random()
    if kind < 0.05:
        key, question, answer = _nonsense(rng)
    elif kind < 0.22:
        key, question, answer = _unknown_word(rng)
    elif kind < 0.35:
        key, question, answer = _too_large(rng)
    else:
        template = noisy(rng, rng.choice(chat_text.UNKNOWN_QUESTIONS))
        key = question = template.format(
            c=words.city(rng), d=words.city(rng), n=words.name(rng),
            m=words.made_up(rng).capitalize(),
            w=rng.choice(words.EVERYDAY), v=rng.choice(words.EVERYDAY), y=rng.randint(1000, 2100),
            a=rng.randint(0, 99), b=rng.randint(0, 99), k=rng.randint(0, 99),
        )  # fmt: skip
        answer = chat_text.UNKNOWN
    return Example("unknown", normalized(key), question, (answer,))


# What a user may tell about himself: telling, reply, asking, answer, answer if never told.
PERSONAL = {
    "name": (
        ["My name is {x}.", "I am {x}.", "I'm {x}.", "Call me {x}.", "Hi, I am {x}.",
         "Hello, my name is {x}.", "You can call me {x}.",
         "Hello, my name is {x}. How are you?", "My name is {x}. Who are you?"],
        "Nice to meet you, {x}!",
        ["What is my name?", "What's my name?", "Do you know my name?", "Who am I?",
         "Do you remember my name?", "Tell me my name."],
        "Your name is {x}.", "You have not told me your name."),
    "color": (
        ["My favorite color is {x}.", "I like the color {x} best.", "I love the color {x}."],
        "I see: your favorite color is {x}.",
        ["What is my favorite color?", "Which color do I like best?",
         "Do you know my favorite color?"],
        "Your favorite color is {x}.", "You have not told me your favorite color."),
    "city": (
        ["I live in {x}.", "My home is in {x}.", "I am living in {x}."],
        "I see: you live in {x}.",
        ["Where do I live?", "In which city do I live?", "Do you know where I live?"],
        "You live in {x}.", "You have not told me where you live."),
    "chinese name": (
        ["我叫{x}", "我的名字是{x}", "你好，我叫{x}", "我是{x}"], "你好，{x}！很高兴认识你。",
        ["我叫什么名字", "我叫什么", "你知道我的名字吗", "你记得我的名字吗", "我是谁"],
        "你叫{x}。", "你还没有告诉我你的名字。"),
}  # fmt: skip
_CHINESE_NAMES = (
    "小明 小红 小王 李雷 韩梅梅 张伟 王芳 李娜 刘洋 陈晨 小李 小张 老王 赵敏 小华".split()
)


def _value(rng: random.Random, kind: str) -> str:
    if kind == "name":
        return words.name(rng)
    if kind == "color":
        return rng.choice(words.COLORS)
    return rng.choice(_CHINESE_NAMES) if kind == "chinese name" else words.city(rng)


_FILLERS = [
    small_talk, terms, facts, unknown, chinese, numbers_tasks.addition, numbers_tasks.subtraction,
    numbers_tasks.multiplication, numbers_tasks.division, numbers_tasks.units,
    list_tasks.sort_numbers, list_tasks.sort_words, list_tasks.counting, list_tasks.reversing,
    date_tasks.dates,
]  # fmt: skip


def _filler(rng: random.Random) -> tuple[str, str]:
    maker = rng.choice(_FILLERS)
    while True:
        example = maker(rng)
        if not example.is_held_out():
            return example.question, rng.choice(example.answers)


def memory(rng: random.Random) -> Example:
    """A chat in which the user tells something, talks of other things, then asks for it."""
    told = {kind: _value(rng, kind) for kind in rng.sample(list(PERSONAL), rng.randint(1, 2))}
    if "chinese name" in told:
        told.pop("name", None)
    history = []
    for kind, value in told.items():
        history += [_filler(rng) for _ in range(rng.choice([0, 0, 1, 2]))]
        say, reply = rng.choice(PERSONAL[kind][0]), PERSONAL[kind][1]
        history.append((noisy(rng, say).format(x=value), reply.format(x=value)))
    history += [_filler(rng) for _ in range(rng.choice([0, 0, 1, 2, 4, 8]))]
    kind = rng.choice(list(told))
    if rng.random() < 0.15:
        kind = rng.choice([k for k in PERSONAL if k not in told and "name" not in k] or [kind])
    _, _, asking, answer, never = PERSONAL[kind]
    question = noisy(rng, rng.choice(asking))
    final = answer.format(x=told[kind]) if kind in told else never
    key = f"{kind} {told} {normalized(question)} {len(history)}"
    return Example("memory", key, question, (final,), (), tuple(history))


def never_told(rng: random.Random) -> Example:
    """Asking for something personal at the start of a chat."""
    kind = rng.choice(list(PERSONAL))
    history = tuple(_filler(rng) for _ in range(rng.choice([0, 0, 1, 3])))
    question = noisy(rng, rng.choice(PERSONAL[kind][2]))
    key = f"never {normalized(question)} {history}"
    return Example("memory", key, question, (PERSONAL[kind][4],), (), history)


def introductions(rng: random.Random) -> Example:
    kind = rng.choice(list(PERSONAL))
    value = _value(rng, kind)
    question = noisy(rng, rng.choice(PERSONAL[kind][0])).format(x=value)
    answer = PERSONAL[kind][1].format(x=value)
    return Example("introductions", normalized(question), question, (answer,))
