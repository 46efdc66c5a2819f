"""The contract of a TokenConstraint: what the runner relies on, for tokenizers of both kinds."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nanovllm.engine.plan import NewRow, RowStep, StepPlan
from nanovllm.errors import InvalidRequestError
from nanovllm.grammar.compiler import GrammarCompiler
from nanovllm.runner.constraints import RowConstraints, TokenConstraint
from nanovllm.sampling_params import SamplingParams
from nanovllm.structured_output import STRUCTURE_FAILED, StructuredOutput

sys.path.append(str(Path(__file__).parents[1] / "text"))
from tokenizers_of_all_kinds import byte_fallback, byte_level

TEXT = '{"a": [1, 22], "b": "é 你 x"}'
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "array", "items": {"type": "integer"}}, "b": {"type": "string"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
END = 3


@pytest.fixture(params=[byte_level, byte_fallback], ids=["byte-level", "byte-fallback"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.param()


@pytest.fixture
def compiler(tokenizer: Any) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, len(tokenizer), [END])


def mask(constraint: TokenConstraint, size: int) -> set[int]:
    row = np.full((size + 31) // 32, -1, np.int32)
    constraint.fill_mask(row)
    return set(np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist())


def pieces(tokenizer: Any, compiler: GrammarCompiler, text: str) -> Iterator[int]:
    """Tokens that are allowed and spell text, the longest first."""
    constraint = compiler(StructuredOutput(json=SCHEMA))
    rest = text.encode()
    while rest:
        allowed = mask(constraint, len(tokenizer))
        fitting = [
            t for t in allowed if t != END and rest.startswith(spelled(tokenizer, t) or b"?")
        ]
        token = max(fitting, key=lambda t: len(spelled(tokenizer, t)))
        constraint.accept([token])
        rest = rest[len(spelled(tokenizer, token)) :]
        yield token


def spelled(tokenizer: Any, token: int) -> bytes:
    """What a token adds in the middle of a text."""
    name = tokenizer._fast.id_to_token(token)
    return b" " + name[1:].encode() if name.startswith("▁") else tokenizer.token_bytes(token)


def test_every_prefix_can_go_on_and_be_taken_back(
    tokenizer: Any, compiler: GrammarCompiler
) -> None:
    tokens = list(pieces(tokenizer, compiler, TEXT))
    constraint = compiler(StructuredOutput(json=SCHEMA))
    seen = []
    for token in tokens:
        seen.append(mask(constraint, len(tokenizer)))
        assert token in seen[-1]
        assert END not in seen[-1], "the form is not complete"
        constraint.accept([token])
    assert mask(constraint, len(tokenizer)) == {END}
    for count in (1, 2, 3):
        constraint.rewind(count)
        assert mask(constraint, len(tokenizer)) == seen[len(tokens) - count]
        constraint.accept(tokens[len(tokens) - count :])
        assert mask(constraint, len(tokenizer)) == {END}
    constraint.rewind(len(tokens))
    assert mask(constraint, len(tokenizer)) == seen[0]


def test_accepting_at_once_is_accepting_one_by_one(
    tokenizer: Any, compiler: GrammarCompiler
) -> None:
    tokens = list(pieces(tokenizer, compiler, TEXT))
    for cut in range(len(tokens)):
        one, other = (compiler(StructuredOutput(json=SCHEMA)) for _ in range(2))
        one.accept(tokens[:cut])
        for token in tokens[:cut]:
            other.accept([token])
        assert mask(one, len(tokenizer)) == mask(other, len(tokenizer))


def test_sequences_are_independent(tokenizer: Any, compiler: GrammarCompiler) -> None:
    one, other = (compiler(StructuredOutput(json=SCHEMA)) for _ in range(2))
    before = mask(other, len(tokenizer))
    one.accept(list(pieces(tokenizer, compiler, TEXT))[:2])
    assert mask(one, len(tokenizer)) != before
    assert mask(other, len(tokenizer)) == before


def test_after_the_end_masks_stay_usable(tokenizer: Any, compiler: GrammarCompiler) -> None:
    """A row that has ended may be computed once more, in vain."""
    constraint = compiler(StructuredOutput(json=SCHEMA))
    constraint.accept([*pieces(tokenizer, compiler, TEXT), END])
    assert END in mask(constraint, len(tokenizer))


def test_a_token_that_was_not_allowed(tokenizer: Any, compiler: GrammarCompiler) -> None:
    constraint = compiler(StructuredOutput(json=SCHEMA))
    wrong = next(t for t in range(4, len(tokenizer)) if t not in mask(constraint, len(tokenizer)))
    constraint.accept([wrong])
    with pytest.raises(InvalidRequestError):
        mask(constraint, len(tokenizer))


# --- what the runner makes of constraints --------------------------------------------------------


class Letters:
    """Allows token n after n tokens, however many there are."""

    def __init__(self) -> None:
        self.accepted: list[int] = []

    def fill_mask(self, row: np.ndarray) -> None:
        if 99 in self.accepted:
            raise InvalidRequestError("99 is too much")
        row[:] = 0
        row[0] = 1 << len(self.accepted)

    def accept(self, token_ids: Sequence[int]) -> None:
        self.accepted += token_ids

    def rewind(self, num_tokens: int) -> None:
        del self.accepted[-num_tokens:]


def plan(new: Sequence[tuple[int, tuple[int, ...], bool]], freed: Sequence[int] = ()) -> StepPlan:
    rows = [
        NewRow(
            row=row,
            token_ids=tokens,
            num_prompt_tokens=2,
            num_computed=0,
            block_ids=(),
            params=SamplingParams(structured_output={"regex": "a"} if formed else None),
            seed=0,
        )
        for row, tokens, formed in new
    ]
    return StepPlan(0, tuple(RowStep(n.row, 1, True) for n in rows), tuple(rows), tuple(freed))


def allowed_lines(rows: RowConstraints, ids: list[int], known: dict[int, list[int]]) -> Any:
    """Of each line the tokens of 40 that are left, and the errors."""
    counts = np.zeros(8, np.int64)
    for row, tokens in known.items():
        counts[row] = len(tokens)
    future = rows.begin(np.array(ids), counts, lambda row, a, b: known[row][a:b])
    logits = torch.zeros(len(ids), 40)
    errors = future.result().apply(logits) if future is not None else {}
    return [row.isfinite().nonzero().flatten().tolist() for row in logits], errors


def test_rows_follow_the_plan() -> None:
    made: list[Letters] = []

    def make(structure: StructuredOutput) -> Letters:
        made.append(Letters())
        return made[-1]

    rows = RowConstraints(make, 40)
    everything = list(range(40))
    rows.apply(plan([(0, (5, 6), True), (1, (5, 6), False), (2, (5, 6, 7, 8), True)]))
    known = {0: [5, 6], 1: [5, 6], 2: [5, 6, 7, 8]}
    assert allowed_lines(rows, [0, 1, 2], known) == ([[0], everything, [2]], {})
    assert [c.accepted for c in made] == [[], [7, 8]], "a row that was preempted knows its output"
    known = {0: [5, 6, 0], 1: [5, 6, 9], 2: [5, 6, 7, 8, 2]}
    assert allowed_lines(rows, [2, 1], known) == ([[3], everything], {})
    known[0] += [1]
    assert allowed_lines(rows, [0], known) == ([[2]], {}), "it was not in the step before"
    assert allowed_lines(rows, [1], known)[0] == [everything]
    rows.apply(plan([(2, (5, 6), True)], freed=[0, 2]))
    known = {0: [5, 6], 2: [5, 6]}
    assert allowed_lines(rows, [0, 2], known) == ([everything, [0]], {})
    known[2] += [99]
    left, errors = allowed_lines(rows, [0, 2], known)
    assert left == [everything, everything]
    assert errors == {1: STRUCTURE_FAILED + "99 is too much"}


def test_a_constraint_that_cannot_be_made() -> None:
    def make(structure: StructuredOutput) -> Letters:
        raise InvalidRequestError("no such letter")

    rows = RowConstraints(make, 40)
    rows.apply(plan([(0, (5, 6), True), (1, (5, 6), False)]))
    left, errors = allowed_lines(rows, [0, 1], {0: [5, 6], 1: [5, 6]})
    assert errors == {0: STRUCTURE_FAILED + "no such letter"}
    assert len(left[1]) == 40


def test_logits_that_are_no_numbers_stay_so() -> None:
    rows = RowConstraints(lambda structure: Letters(), 40)
    rows.apply(plan([(0, (5, 6), True)]))
    future = rows.begin(np.array([0]), np.full(8, 2), lambda row, a, b: [])
    assert future is not None
    logits = torch.full((1, 40), float("nan"))
    future.result().apply(logits)
    assert logits[0, 0].isnan()


def test_a_row_forgets_the_constraint_of_the_sequence_before(compiler: GrammarCompiler) -> None:
    """Also where the plan that freed the row was lost."""
    constraints = RowConstraints(compiler, 64)
    for structure in ({"choice": ["a"]}, None):
        params = SamplingParams(structured_output=structure)
        new = NewRow(0, (5,), 1, 0, (0,), params, 0)
        constraints.apply(StepPlan(0, (RowStep(0, 1, True),), (new,)))
    rows = np.zeros(1, np.int64)
    assert constraints.begin(rows, np.ones(1, np.int64), lambda row, start, stop: []) is None
