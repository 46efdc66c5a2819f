"""Structures compiled for tokenizers of several kinds: what they allow, and what is refused."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import numpy as np
import pytest

from nanovllm.errors import InvalidRequestError
from nanovllm.grammar.compiler import GrammarCompiler, GrammarConstraint
from nanovllm.model_files import find_model
from nanovllm.structured_output import MAX_CHARACTERS, StructuredOutput


@pytest.fixture(scope="module")
def demo() -> Any:
    return find_model("demo").tokenizer()


@pytest.fixture(scope="module")
def compiler(demo: Any) -> GrammarCompiler:
    return GrammarCompiler(demo, len(demo), find_model("demo").eos_token_ids())


def allowed(constraint: GrammarConstraint, size: int) -> set[int]:
    row = np.zeros((size + 31) // 32, np.int32)
    constraint.fill_mask(row)
    return set(np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist())


def matches(compiler: GrammarCompiler, tokenizer: Any, text: str, **structure: Any) -> bool:
    """Whether text, token by token, is allowed and may end."""
    constraint = compiler(StructuredOutput(**structure))
    for token in tokenizer.encode(text, add_special_tokens=False):
        if token not in allowed(constraint, len(tokenizer)):
            return False
        constraint.accept([token])
    ends = set(find_model("demo").eos_token_ids())
    return ends <= allowed(constraint, len(tokenizer))


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("structure", "good", "bad"),
    [
        ({"json": PERSON}, '{"name": "Ann", "age": 5}', '{"name": "Ann"}'),
        ({"json": json.dumps(PERSON)}, '{"name":"Ann","age":5}', '{"age": 5, "name": "Ann"}'),
        ({"json": PERSON}, '{\n  "name": "é",\n  "age": -7\n}', '{"name": "é", "age": 1.5}'),
        ({"json": PERSON}, '{"name": "a \\" b", "age": 0}', '{"name": "a " b", "age": 0}'),
        ({"json": True}, "[1, 2]", "[1, 2"),
        ({"json_object": True}, '{"a": [null, {}]}', "[1]"),
        ({"regex": r"[a-c]{2}/\d"}, "ab/7", "ab7"),
        ({"regex": r"a\/b"}, "a/b", "a\\/b"),
        ({"regex": "^yes|no$"}, "no", "noo"),
        ({"regex": "a\nb"}, "a\nb", "a b"),
        ({"choice": ["red", "deep blue"]}, "deep blue", "deep red"),
        ({"choice": ['say "hi"\n', "\\"]}, 'say "hi"\n', "say"),
        ({"choice": ["你好", "再见"]}, "再见", "再你"),
        ({"choice": ["a", "ab"]}, "ab", "abb"),
        ({"choice": [f"{i:04}" for i in range(9000)]}, "8999", "9000"),
        ({"json": {"enum": [f"{i:04}" for i in range(9000)]}}, '"8999"', '"9000"'),
        ({"grammar": 'start: "a" start "b" | "c"'}, "aacbb", "aacb"),
        ({"grammar": 'root ::= "x" digit+\ndigit ::= [0-9]'}, "x42", "x"),
        ({"json": PERSON, "reasoning": "open"}, 'so\nit is</think>\n\n{"name":"","age":1}', "{}"),
        ({"json": PERSON, "reasoning": "optional"}, '{"name":"","age":1}', "<think>a"),
        (
            {"choice": ["a"], "reasoning": "optional"},
            "<think>\nhm, a or b?\n</think>\n\na",
            "<think>b</think>b",
        ),
    ],
)
def test_what_is_allowed(
    compiler: GrammarCompiler, demo: Any, structure: dict[str, Any], good: str, bad: str
) -> None:
    assert matches(compiler, demo, good, **structure)
    assert not matches(compiler, demo, bad, **structure)


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def doubling(depth: int) -> dict[str, Any]:
    """References of references: 2 ** depth places once they are written out."""
    defs: dict[str, Any] = {"d0": {"type": "string"}}
    for i in range(1, depth + 1):
        below = {"$ref": f"#/$defs/d{i - 1}"}
        defs[f"d{i}"] = {"anyOf": [{"allOf": [below]}, {"allOf": [below, {"minLength": i}]}]}
    return {"$ref": f"#/$defs/d{depth}", "$defs": defs}


HOSTILE: dict[str, dict[str, Any]] = {
    "deep": {"json": nested(300)},
    "deep text": {"json": '{"type":"array","items":' * 3000 + "{}" + "}" * 3000},
    "exponential references": {"json": doubling(18)},
    "exponential regex": {"regex": r"((a{1000}){1000}){1000}"},
    "hidden exponential regex": {"regex": r"xy?((a{1000}){1000}){1000}"},
    "long repetition": {"json": {"type": "string", "pattern": "^((a{1000}){1000}){1000}$"}},
    "unknown rule": {"grammar": "start: missing"},
    "bad regex": {"regex": "(a"},
    "look-around": {"regex": "(?=a)b"},
    "bad EBNF": {"grammar": 'root ::= "a'},
    "deep EBNF": {"grammar": "root ::= " + "(" * 4000 + '"a"' + ")" * 4000},
    "not in the subset": {"json": {"type": "array", "uniqueItems": True}},
    "unsatisfiable": {"json": {"allOf": [{"type": "string"}, {"type": "integer"}]}},
    "never": {"json": False},
    "fetches": {"json": {"$ref": "http://127.0.0.1:9/schema"}},
    "reads files": {"json": {"$ref": "file:///etc/passwd"}},
    "wrong type": {"json": {"type": 5}},
    "wrong properties": {"json": {"type": "object", "properties": [1]}},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_structures_are_refused_with_a_reason(compiler: GrammarCompiler, name: str) -> None:
    began = time.thread_time()
    with pytest.raises(InvalidRequestError) as refused:
        compiler(StructuredOutput(**HOSTILE[name]))
    assert time.thread_time() - began < 20  # far above the limit: this machine may be slow
    assert len(str(refused.value)) < 1000
    with pytest.raises(InvalidRequestError) as again:
        compiler(StructuredOutput(**HOSTILE[name]))
    assert str(again.value) == str(refused.value)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({}, "exactly one"),
        ({"json": {}, "regex": "a"}, "exactly one"),
        ({"json_object": 1}, "json_object"),
        ({"json": "{"}, "not a JSON schema"),
        ({"json": "[1]"}, "must be an object"),
        ({"json": "[" * 100_000}, "deeply"),
        ({"json": {"a": float("nan")}}, "not a JSON schema"),
        ({"regex": ""}, "regex"),
        ({"regex": 5}, "regex"),
        ({"grammar": ["a"]}, "grammar"),
        ({"choice": []}, "choice"),
        ({"choice": "abc"}, "choice"),
        ({"choice": ["a", 5]}, "choice"),
        ({"choice": [""]}, "choice"),
        ({"regex": "a" * (MAX_CHARACTERS + 1)}, str(MAX_CHARACTERS)),
        ({"choice": ["ab"] * MAX_CHARACTERS}, str(MAX_CHARACTERS)),
        ({"regex": "a", "reasoning": "yes"}, "reasoning"),
        ({"regx": "a"}, "'regex'"),
    ],
)
def test_wrong_fields(fields: dict[str, Any], word: str) -> None:
    with pytest.raises(InvalidRequestError, match=word):
        StructuredOutput(**fields)


def test_equal_schemas_are_one() -> None:
    one = StructuredOutput(json={"type": "object", "properties": {"a": {}}})
    other = StructuredOutput(json='{ "type":"object","properties":{"a":{}} }')
    assert one == other
    assert hash(one) == hash(other)


def test_a_tokenizer_without_an_end(demo: Any) -> None:
    with pytest.raises(InvalidRequestError, match="end token"):
        GrammarCompiler(demo, len(demo), ())(StructuredOutput(regex="a"))


def test_a_vocabulary_that_is_too_small(demo: Any) -> None:
    with pytest.raises(InvalidRequestError, match="tokenizer"):
        GrammarCompiler(demo, 100, (0,))(StructuredOutput(regex="a"))


def test_a_vocabulary_larger_than_the_tokenizer(demo: Any) -> None:
    size = len(demo) + 77
    constraint = GrammarCompiler(demo, size, (0,))(StructuredOutput(regex="(.|\n)*"))
    ids = allowed(constraint, size)
    assert len(ids) > 1000
    assert max(ids) < len(demo)


def test_many_threads_compile_at_once(compiler: GrammarCompiler, demo: Any) -> None:
    found: list[bool] = []

    def work(number: int) -> None:
        for i in range(8):
            schema = {"type": "object", "properties": {f"k{i}": {"type": "integer"}}}
            found.append(matches(compiler, demo, f'{{"k{i}": {number}}}', json=schema))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 32
