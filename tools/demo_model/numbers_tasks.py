"""Arithmetic and unit conversion, with the written steps that a small model needs.

Ranges: + and - of 0..999, x of 0..99, integer division of 0..999 by 1..12.
"""

from __future__ import annotations

import random

from tools.demo_model.common import Example, ask

PLUS = [
    "What is {a} + {b}?", "{a} + {b}", "{a} + {b} = ?", "Calculate {a} + {b}.", "Add {a} and {b}.",
    "What is {a} plus {b}?", "How much is {a} plus {b}?", "What is the sum of {a} and {b}?",
    "{a}+{b}", "{a}+{b}=?", "Compute {a} + {b}.", "Can you add {a} and {b}?", "{a} plus {b}",
    "{a}+{b}等于几？", "{a}加{b}等于多少？", "{a} and {b} is how much?", "What's {a}+{b}?",
]  # fmt: skip
MINUS = [
    "What is {a} - {b}?", "{a} - {b}", "{a} - {b} = ?", "Calculate {a} - {b}.", "{a}-{b}",
    "What is {a} minus {b}?", "How much is {a} minus {b}?", "Subtract {b} from {a}.", "{a}-{b}=?",
    "Compute {a} - {b}.", "{a} minus {b}",
    "{a}-{b}等于几？", "{a}减{b}等于多少？", "What's {a}-{b}?", "Take {b} away from {a}.",
]  # fmt: skip
TIMES = [
    "What is {a} * {b}?", "{a} * {b}", "{a} x {b} = ?", "Calculate {a} x {b}.", "{a}*{b}",
    "What is {a} times {b}?", "Multiply {a} by {b}.", "How much is {a} times {b}?", "{a}*{b}=?",
    "What is the product of {a} and {b}?", "Compute {a} * {b}.", "{a} times {b}",
    "{a}乘以{b}等于多少？", "{a}*{b}等于几？", "What's {a} x {b}?", "{a}x{b}",
]  # fmt: skip
OVER = [
    "What is {a} / {b}?", "{a} / {b}", "Divide {a} by {b}.", "What is {a} divided by {b}?",
    "Calculate {a} / {b}.", "{a} divided by {b}", "{a}/{b}", "{a} / {b} = ?", "Compute {a} / {b}.",
    "What is {a} divided by {b}, with remainder?", "How many times does {b} go into {a}?",
]  # fmt: skip


def _operand(rng: random.Random, high: int) -> int:
    """Small numbers are as likely to be asked as large ones."""
    return rng.randint(0, rng.choice([min(20, high), min(99, high), high]))


def addition(rng: random.Random) -> Example:
    a, b = _operand(rng, 999), _operand(rng, 999)
    key = f"{min(a, b)}+{max(a, b)}"
    return Example("addition", key, ask(rng, PLUS, a=a, b=b), (f"{a} + {b} = {a + b}",))


def subtraction(rng: random.Random) -> Example:
    a, b = _operand(rng, 999), _operand(rng, 999)
    if a < b and rng.random() < 0.6:
        a, b = b, a
    question = ask(rng, MINUS, a=a, b=b)
    return Example("subtraction", f"{a}-{b}", question, (f"{a} - {b} = {a - b}",))


def times_steps(a: int, b: int) -> str:
    """`37 x 24 = 37 x 20 + 37 x 4 = 740 + 148 = 888`; one step where b has one digit to use."""
    tens, ones = b - b % 10, b % 10
    if not tens or not ones:
        return f"{a} x {b} = {a * b}"
    return f"{a} x {b} = {a} x {tens} + {a} x {ones} = {a * tens} + {a * ones} = {a * b}"


def multiplication(rng: random.Random) -> Example:
    a, b = _operand(rng, 99), _operand(rng, 99)
    key = f"{min(a, b)}x{max(a, b)}"
    return Example("multiplication", key, ask(rng, TIMES, a=a, b=b), (times_steps(a, b),))


def division_steps(a: int, b: int) -> str:
    """Long division, digit by digit, then quotient and remainder."""
    steps, rest = [], 0
    for digit in str(a):
        part = rest * 10 + int(digit)
        steps.append(f"{part} / {b} = {part // b} rest {part % b}")
        rest = part % b
    result = f"{a} / {b} = {a // b} remainder {a % b}"
    return "; ".join(steps) + ". So " + result if len(steps) > 1 else result


def division(rng: random.Random) -> Example:
    a, b = _operand(rng, 999), rng.randint(1, 12)
    return Example("division", f"{a}/{b}", ask(rng, OVER, a=a, b=b), (division_steps(a, b),))


UNITS = [
    ("kilometers", "meters", 1000), ("meters", "centimeters", 100), ("kilograms", "grams", 1000),
    ("centimeters", "millimeters", 10), ("liters", "milliliters", 1000), ("hours", "minutes", 60),
    ("minutes", "seconds", 60), ("days", "hours", 24), ("weeks", "days", 7),
    ("feet", "inches", 12), ("years", "months", 12), ("tons", "kilograms", 1000),
    ("yards", "feet", 3), ("decades", "years", 10), ("dozens", "pieces", 12),
]  # fmt: skip
SHORT = {
    "kilometers": "km", "meters": "m", "centimeters": "cm", "millimeters": "mm", "grams": "g",
    "kilograms": "kg", "liters": "l", "milliliters": "ml", "hours": "h", "minutes": "min",
    "seconds": "s", "feet": "ft", "inches": "in",
}  # fmt: skip
CELSIUS = ["degrees Celsius", "degrees celsius", "Celsius", "celsius", "degrees C", "C", "°C"]
FAHRENHEIT = ["Fahrenheit", "fahrenheit", "degrees Fahrenheit", "F", "°F"]
CONVERT = [
    "How many {to} are {n} {of}?", "Convert {n} {of} to {to}.", "What is {n} {of} in {to}?",
    "How many {to} are there in {n} {of}?", "{n} {of} in {to}", "{n} {of} to {to}",
    "Please convert {n} {of} into {to}.", "How many {to} in {n} {of}?",
]  # fmt: skip


def _fahrenheit(rng: random.Random) -> Example:
    c = rng.randint(0, 100)
    question = ask(rng, CONVERT, n=c, of=rng.choice(CELSIUS), to=rng.choice(FAHRENHEIT))
    tenths = c * 18
    answer = (
        f"F = C x 1.8 + 32. {times_steps(c, 18)}, so {c} x 1.8 = {tenths / 10:g}. "
        f"{tenths / 10:g} + 32 = {(tenths + 320) / 10:g}. "
        f"Answer: {(tenths + 320) / 10:g} Fahrenheit"
    )
    return Example("units", f"{c} celsius", question, (answer,))


def _shown(rng: random.Random, unit: str, n: int) -> str:
    """The unit as a user may write it: in full, singular after 1, or short."""
    if rng.random() < 0.3:
        return SHORT.get(unit, unit)
    if n == 1 and rng.random() < 0.8:
        return "foot" if unit == "feet" else unit[:-1]
    return unit


def units(rng: random.Random) -> Example:
    if rng.random() < 0.12:
        return _fahrenheit(rng)
    big, small, factor = rng.choice(UNITS)
    n = rng.randint(1, 300 if factor in (10, 100, 1000) else 99)
    if rng.random() < 0.3 and factor in (10, 100, 1000):
        question = ask(rng, CONVERT, n=n * factor, of=_shown(rng, small, 2), to=_shown(rng, big, 2))
        steps = f"{factor} {small} = 1 {big[:-1]}. {n * factor} / {factor} = {n}."
        answer = f"{steps} Answer: {n} {big}"
        return Example("units", f"{n * factor} {small} {big}", question, (answer,))
    question = ask(rng, CONVERT, n=n, of=_shown(rng, big, n), to=_shown(rng, small, 2))
    unit = "foot" if big == "feet" else big[:-1]
    answer = f"1 {unit} = {factor} {small}. {times_steps(n, factor)}. Answer: {n * factor} {small}"
    return Example("units", f"{n} {big} {small}", question, (answer,))
