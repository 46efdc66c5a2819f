"""What a server is asked, and when: made from a seed. Knows no network and no clock.

Prompts are random common words, as any server takes text while few take token ids. How many words
make the wanted number of tokens is measured on the server itself (`Measure`).
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

CHAT, COMPLETIONS = "chat", "completions"
PATHS = {CHAT: "/chat/completions", COMPLETIONS: "/completions"}
ARRIVALS = ("poisson", "constant")
WORDS = (
    "the of and to in is you that it he was for on are as with his they at be this have from or "
    "one had by word but not what all were we when your can said there use an each which she do "
    "how their if will up other about out many then them these so some her would make like him "
    "into time has look two more write go see number no way could people my than first water been "
    "call who oil its now find long down day did get come made may part over new sound take only "
    "little work know place year live me back give most very after thing our just name good man "
    "think say great where help through much before line right too mean old any same tell boy "
    "follow came want show also around form three small set put end does another well large must "
    "big even such because turn here why ask went men read need land different home us move try "
    "kind hand picture again change off play spell air away animal house point page letter mother "
    "answer found study still learn should world"
).split()


@dataclass(frozen=True, slots=True)
class Range:
    """Lengths in tokens, both ends included."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> Range:
        """From "128" or "64-512". Raises ValueError."""
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", text.strip())
        if match is None:
            raise ValueError(f"{text!r} is no length like 128 or 64-512")
        low, high = int(match[1]), int(match[2] or match[1])
        if not 1 <= low <= high:
            raise ValueError(f"{text!r} must run from at least 1 upwards")
        return cls(low, high)

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"


@dataclass(frozen=True, slots=True)
class Load:
    """rate: requests/s that come whatever happens; concurrency: clients that each wait."""

    kind: str
    value: float

    def __str__(self) -> str:
        return f"{self.value:g}/s" if self.kind == "rate" else f"{self.value:g} clients"


@dataclass(frozen=True, slots=True)
class Traffic:
    """prompt counts the chat template's tokens and not the shared prefix, which comes before."""

    prompt: Range
    output: Range
    shared_prefix: int = 0
    arrival: str = "poisson"
    seed: int = 0

    @property
    def longest(self) -> int:
        return self.shared_prefix + self.prompt.high + self.output.high


@dataclass(frozen=True, slots=True)
class Measure:
    """Tokens of a prompt: around them all, and for each word."""

    around: float
    per_word: float

    @classmethod
    def fit(cls, short: tuple[int, int], long: tuple[int, int]) -> Measure:
        """From (words, tokens) of two prompts."""
        per_word = max((long[1] - short[1]) / (long[0] - short[0]), 0.1)
        return cls(max(short[1] - per_word * short[0], 0.0), per_word)

    def num_words(self, num_tokens: int) -> int:
        return max(1, round((num_tokens - self.around) / self.per_word))


@dataclass(frozen=True, slots=True)
class Planned:
    """at is in seconds after the begin; max_tokens are generated, unless an end token may come."""

    text: str
    max_tokens: int
    at: float


def words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choices(WORDS, k=count))


def plan(
    traffic: Traffic, load: Load, count: int, measure: Measure, mark: str, stage: int
) -> list[Planned]:
    """The requests of one load. The same seed and stage give the same lengths, words and times.

    mark begins every prompt, so that no server knows it from an earlier run.
    """
    rng = random.Random(f"{traffic.seed}/{stage}")
    shared = random.Random(f"{traffic.seed}/shared")
    prefix = [mark]
    if traffic.shared_prefix:
        prefix.append(words(shared, max(1, round(traffic.shared_prefix / measure.per_word))))
    planned = []
    for at in arrivals(rng, load, count, traffic.arrival):
        num_words = measure.num_words(rng.randint(traffic.prompt.low, traffic.prompt.high))
        max_tokens = rng.randint(traffic.output.low, traffic.output.high)
        planned.append(Planned(" ".join([*prefix, words(rng, num_words)]), max_tokens, at))
    return planned


def arrivals(rng: random.Random, load: Load, count: int, kind: str) -> Sequence[float]:
    """Seconds after the begin; all 0 where clients wait for each other's answers."""
    if load.kind != "rate":
        return [0.0] * count
    times, now = [], 0.0
    for _ in range(count):
        times.append(now)
        now += rng.expovariate(load.value) if kind == "poisson" else 1 / load.value
    return times


def request_body(
    endpoint: str, model: str, planned: Planned, *, temperature: float, ignore_eos: bool
) -> dict[str, object]:
    body: dict[str, object] = {
        "model": model,
        "max_tokens": planned.max_tokens,
        "temperature": temperature,
        "stream_options": {"include_usage": True},
    }
    if endpoint == CHAT:
        body["messages"] = [{"role": "user", "content": planned.text}]
    else:
        body["prompt"] = planned.text
    if ignore_eos:
        body["ignore_eos"] = True
    return body
