"""Dates: weekdays up to 365 days away, the length of a month, a date up to 60 days later.

Years 1900 to 2100 of the Gregorian calendar.
"""

from __future__ import annotations

import calendar
import random

from tools.demo_model.common import Example, ask

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = list(calendar.month_name)[1:]
AFTER = [
    "Today is {d}. What day is it in {n} days?", "What day of the week is {n} days after {d}?",
    "What day comes {n} days after {d}?", "If today is {d}, what day will it be in {n} days?",
    "It is {d}. Which weekday is it {n} days later?", "{n} days after {d}",
]  # fmt: skip
BEFORE = [
    "What day of the week is {n} days before {d}?", "What day was {n} days before {d}?",
    "Today is {d}. What day was it {n} days ago?",
]  # fmt: skip
LENGTH = [
    "How many days does {m} {y} have?", "How many days are in {m} {y}?",
    "How many days are there in {m} of {y}?", "Days in {m} {y}",
]  # fmt: skip
LATER = [
    "What date is {n} days after {d}?", "What is the date {n} days after {d}?", "{d} plus {n} days",
    "Add {n} days to {d}.", "Which date comes {n} days after {d}?",
]  # fmt: skip


def _weekday(rng: random.Random) -> Example:
    day, n = rng.randrange(7), rng.randint(0, rng.choice([14, 60, 365]))
    back = rng.random() < 0.3
    question = ask(rng, BEFORE if back else AFTER, d=DAYS[day], n=n)
    weeks, rest = divmod(n, 7)
    result = DAYS[(day - rest if back else day + rest) % 7]
    side = "before" if back else "after"
    steps = f"{n} = {weeks} x 7 + {rest}. {rest} days {side} {DAYS[day]}: {result}"
    return Example("dates", f"{back} {day} {n}", question, (steps,))


def _month_length(rng: random.Random) -> Example:
    month = rng.choice([2, rng.randint(1, 12)])
    year = rng.randint(1900, 2100)
    days = calendar.monthrange(year, month)[1]
    note = ""
    if month == 2:
        note = f" {year} is {'' if days == 29 else 'not '}a leap year."
    question = ask(rng, LENGTH, m=MONTHS[month - 1], y=year)
    answer = f"{MONTHS[month - 1]} {year} has {days} days.{note}"
    return Example("dates", f"{year}-{month}", question, (answer,))


def later_steps(year: int, month: int, day: int, n: int) -> str:
    """Adds the days to the day of the month, then takes whole months off."""
    total = day + n
    steps = [f"{day} + {n} = {total}."]
    while total > (length := calendar.monthrange(year, month)[1]):
        steps.append(f"{MONTHS[month - 1]} {year} has {length} days: {total} - {length} = ")
        total -= length
        steps[-1] += f"{total}."
        year, month = (year + 1, 1) if month == 12 else (year, month + 1)
    return " ".join(steps) + f" Answer: {year}-{month:02}-{total:02}"


def _date_later(rng: random.Random) -> Example:
    year, month = rng.randint(1900, 2100), rng.randint(1, 12)
    day = rng.randint(1, calendar.monthrange(year, month)[1])
    n = rng.randint(1, 60)
    start = f"{year}-{month:02}-{day:02}"
    question = ask(rng, LATER, d=start, n=n)
    return Example("dates", f"{start} {n}", question, (later_steps(year, month, day, n),))


def dates(rng: random.Random) -> Example:
    return rng.choice([_weekday, _month_length, _date_later])(rng)
