"""The generator: the same for the same seed, right by independent computation, split cleanly."""

from __future__ import annotations

import datetime
import json
import math
import random
import re

import pytest

from tools.demo_model.common import Example, draw, is_held_out
from tools.demo_model.documents import TASKS, training_document
from tools.demo_model.evaluate import TASK_NAMES, held_out_questions
from tools.demo_model.shards import batches


def _examples(task: str, count: int = 300) -> list[Example]:
    rng = random.Random(f"test {task}")
    return [TASKS[task][0](rng) for _ in range(count)]


def _numbers(text: str) -> list[int]:
    return [int(found) for found in re.findall(r"\d+", text)]


def test_same_seed_same_documents() -> None:
    first, second, other = (random.Random(seed) for seed in (5, 5, 6))
    documents = [training_document(first) for _ in range(50)]
    assert documents == [training_document(second) for _ in range(50)]
    assert documents != [training_document(other) for _ in range(50)]


@pytest.mark.parametrize("task", TASK_NAMES)
def test_training_and_evaluation_share_no_question(task: str) -> None:
    held_out = held_out_questions(task, 200)
    assert len(held_out) >= 200
    assert all(is_held_out(e.task, e.key) for e in held_out)
    rng = random.Random(11)
    trained = {draw(TASKS[task][0], rng, held_out=False).key for _ in range(500)}
    assert not trained & {e.key for e in held_out}


def test_training_documents_hold_no_held_out_sum() -> None:
    rng = random.Random(3)
    text = "".join(part for _ in range(3000) for part, _ in training_document(rng))
    sums = re.findall(r"(?:assistant\n)(\d{1,3}) \+ (\d{1,3}) = (\d+)(?=<\|im_end)", text)
    assert len(sums) > 100
    for a, b, _ in sums:
        assert not is_held_out("addition", f"{min(int(a), int(b))}+{max(int(a), int(b))}")


@pytest.mark.parametrize(
    ("task", "compute"),
    [
        ("addition", lambda a, b: a + b),
        ("subtraction", lambda a, b: a - b),
        ("multiplication", lambda a, b: a * b),
    ],
)
def test_arithmetic_answers(task: str, compute: object) -> None:
    for example in _examples(task):
        answer = example.answers[0]
        a, b = _numbers(answer)[:2]
        assert int(answer.split("= ")[-1]) == compute(a, b)  # type: ignore[operator]
        assert sorted((a, b)) == sorted(_numbers(example.question))


def _product_is_right(answer: str) -> bool:
    """All sides of `a x b = a x c + a x d = e + f = g` are equal."""
    sides = [side.split(" + ") for side in answer.split(" = ")]
    values = {sum(math.prod(map(int, term.split(" x "))) for term in side) for side in sides}
    return len(values) == 1


def test_products_and_divisions_step_by_step() -> None:
    assert all(_product_is_right(e.answers[0]) for e in _examples("multiplication"))
    for example in _examples("division"):
        steps = re.findall(r"(\d+) / (\d+) = (\d+) (?:rest|remainder) (\d+)", example.answers[0])
        assert steps
        assert all(divmod(int(a), int(b)) == (int(q), int(r)) for a, b, q, r in steps)


def test_units() -> None:
    for example in _examples("units"):
        steps, answer = example.answers[0].split("Answer: ")
        if "Fahrenheit" in answer:
            celsius = int(re.findall(r"(\d+) x 18", steps)[0])
            assert float(answer.split()[0]) == pytest.approx(celsius * 9 / 5 + 32)
            continue
        rule, last = steps.split(". ", 1)
        of, to = (int(side.split()[0]) for side in rule.split(" = "))
        asked = _numbers(example.question)[0]
        assert int(answer.split()[0]) * of == asked * to
        assert last.rstrip(". ").endswith(f"= {answer.split()[0]}")


def test_sorting_and_reversing() -> None:
    downs = 0
    for example in _examples("sort numbers"):
        down, asked = example.key.split(" ", 1)
        assert _numbers(example.answers[0]) == sorted(_numbers(asked), reverse=down == "True")
        assert _numbers(example.question) == _numbers(asked)
        downs += down == "True"
    assert 50 < downs < 150
    for example in _examples("sort words"):
        words = example.answers[0].split(", ")
        assert words == sorted(words)
        assert set(words) <= set(re.findall("[a-z]+", example.question))
    for example in _examples("reversing"):
        turned = re.findall(r"\w+", example.answers[0].split("Backwards: ")[-1])[::-1]
        asked = " ".join(turned) if len(turned) > 1 else turned[0][::-1]
        assert re.sub(r"\W+", "", asked) in re.sub(r"\band\b|\W+", "", example.question)


def test_counts() -> None:
    checked = 0
    for example in _examples("counting"):
        answer = example.answers[0]
        steps, total = answer.split(". Answer: ")
        items = [step.rsplit(" ", 1)[0] for step in steps.split(", ")]
        wanted = example.key.split(" ")[0]
        counts = {len(items), items.count(wanted)}
        assert int(total) in counts
        checked += 1
    assert checked == 300


def test_dates() -> None:
    days = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
    monday = datetime.date(2024, 1, 1)
    kinds = set()
    for example in _examples("dates"):
        answer, key = example.answers[0], example.key.split()
        if "Answer: " in answer:
            later = datetime.date.fromisoformat(key[0]) + datetime.timedelta(int(key[1]))
            assert answer.endswith(f"Answer: {later.isoformat()}")
        elif len(key) == 3:
            n = -int(key[2]) if key[0] == "True" else int(key[2])
            assert answer.endswith(days[(monday + datetime.timedelta(int(key[1]) + n)).weekday()])
        else:
            year, month = map(int, key[0].split("-"))
            after = datetime.date(year + month // 12, month % 12 + 1, 1)
            assert f"has {(after - datetime.date(year, month, 1)).days} days" in answer
        kinds.add(len(key))
    assert kinds == {1, 2, 3}


def test_json_answers_hold_the_facts_of_the_sentence() -> None:
    for example in _examples("json filling"):
        values = json.loads(example.answers[0])
        assert all(str(value) in example.question for value in values.values())
        assert all(f'"{key}": ' in example.question for key in values)


def test_tool_calls_fit_their_signature() -> None:
    for example in _examples("tool calling"):
        call = json.loads(
            example.answers[0].removeprefix("<tool_call>\n").removesuffix("\n</tool_call>")
        )
        functions = {tool["function"]["name"]: tool["function"] for tool in example.tools}
        parameters = functions[call["name"]]["parameters"]
        assert list(call["arguments"]) == parameters["required"]
        kinds = {"string": str, "integer": int}
        for key, value in call["arguments"].items():
            assert isinstance(value, kinds[parameters["properties"][key]["type"]])


def test_batches_keep_documents_apart(tmp_path) -> None:  # type: ignore[no-untyped-def]
    import numpy as np

    lengths = np.array([5, 3, 6, 2, 7], np.int32)
    ids = np.arange(23, dtype=np.uint16)
    for number in range(8):
        np.savez(tmp_path / f"00-{number:05}.npz", ids=ids, trained=ids % 2 == 0, lengths=lengths)
    out_ids, positions, labels, cu_lens = next(batches(tmp_path, 15, 0))
    assert cu_lens.tolist() == [0, 5, 8, 14, 15]
    assert out_ids.tolist() == [*range(14), 0]
    assert positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3, 4, 5, 0]
    assert labels.tolist() == [
        -100,
        2,
        -100,
        4,
        -100,
        6,
        -100,
        -100,
        -100,
        10,
        -100,
        12,
        -100,
        -100,
        -100,
    ]
