"""An executor without a model: it writes into every slot what the slot should hold, and looks.

The content of a slot is a digest of the salt and all tokens up to the slot's position: exactly
what real keys and values depend on. Every row's context is compared with the row's own tokens
before a token is sampled, so a stale, foreign or missing slot is seen at once. A sampled token is
a function of that digest and the sequence's seed, so what a request must answer is known without
running anything.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from nanovllm.engine.plan import NewRow, RowResult, RowStep, StepPlan, StepResult
from nanovllm.engine.sequence import Sequence

EOS = 0
VOCAB_SIZE = 3
NOTHING = -1  # what a slot holds that was never properly written


def extend(content: int, token_id: int) -> int:
    """The digest of a prefix and one more token; hashes of integer tuples are not randomised."""
    return hash((content, token_id, 7))


def root(salt: bytes) -> int:
    return hash(tuple(salt))


def contents(salt: bytes, token_ids: list[int]) -> list[int]:
    found, content = [], root(salt)
    for token_id in token_ids:
        content = extend(content, token_id)
        found.append(content)
    return found


def sample(content: int, seed: int) -> int:
    """One of 16 outcomes is the end token, the others are two letters."""
    draw = hash((content, seed)) >> 7 & 15
    return EOS if draw == 0 else 1 + draw % 2


def answer(prompt: list[int], salt: bytes, seed: int, length: int) -> list[int]:
    """The first `length` tokens that an engine without end tokens would produce."""
    content, tokens = contents(salt, prompt)[-1], []
    for _ in range(length):
        tokens.append(sample(content, seed))
        content = extend(content, tokens[-1])
    return tokens


@dataclass
class SimulatedRow:
    seed: int
    salt: bytes
    tokens: list[int]
    num_computed: int
    table: list[int]


@dataclass
class SimulatedStep:
    """A future: `wrong` names the seeds of rows that read what is not theirs."""

    kv: SimulatedKV
    plan: StepPlan
    outcome: StepResult | Exception
    wrong: dict[int, str]

    def result(self) -> StepResult:
        self.kv.delivered.append(self)
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


@dataclass
class SimulatedKV:
    """Executes plans in the order of submission, like a device that runs behind the host."""

    num_blocks: int
    block_size: int
    max_num_seqs: int
    budget: int
    salts: dict[int, bytes] = field(default_factory=dict)  # by the sequence's seed
    slots: dict[int, int] = field(default_factory=dict)
    rows: dict[int, SimulatedRow] = field(default_factory=dict)
    delivered: list[SimulatedStep] = field(default_factory=list)
    fail_next: bool = False
    row_errors: int = 0  # so many of the next sampling rows report an error
    closed: bool = False

    def know(self, group: list[Sequence]) -> None:
        """A plan names no salt: the test tells which sequence has which."""
        self.salts |= {seq.seed: seq.salt for seq in group}

    def submit(self, plan: StepPlan) -> SimulatedStep:
        failing, self.fail_next = self.fail_next, False
        assert plan.rows, "an empty plan"
        assert plan.num_tokens <= self.budget, "a plan over the budget"
        self._take_over(plan)
        if failing:
            self._spoil(plan)
            return SimulatedStep(self, plan, RuntimeError("the device is on fire"), {})
        self._copy(plan)
        alone = self._write(plan)
        wrong: dict[int, str] = {}
        results = tuple(self._row_result(step, wrong, alone) for step in plan.rows)
        return SimulatedStep(self, plan, StepResult(plan.step_id, results), wrong)

    def close(self) -> None:
        self.closed = True

    def _take_over(self, plan: StepPlan) -> None:
        for row in plan.freed_rows:
            # A row that is given and taken back between two plans was never seen here.
            self.rows.pop(row, None)
        for new in plan.new_rows:
            self._start(new)
        assert len({step.row for step in plan.rows}) == len(plan.rows), "a row twice in a plan"
        for step in plan.rows:
            row = self.rows[step.row]
            if step.replaced_block is not None:
                index, block = step.replaced_block
                row.table[index] = block
            row.table += step.new_block_ids
            assert step.num_tokens >= 1, "a row without tokens"
            end = row.num_computed + step.num_tokens
            assert end <= len(row.tokens), "tokens are computed that do not exist"
            assert step.sample == (end == len(row.tokens)), "sampling not at the last token"
            assert end <= len(row.table) * self.block_size, "slots without a block"

    def _start(self, new: NewRow) -> None:
        assert 0 <= new.row < self.max_num_seqs
        assert new.row not in self.rows, "a new row that was never freed"
        self.rows[new.row] = SimulatedRow(
            new.seed,
            self.salts[new.seed],
            list(new.token_ids),
            new.num_computed,
            list(new.block_ids),
        )

    def _slot(self, row: SimulatedRow, position: int) -> int:
        return row.table[position // self.block_size] * self.block_size + (
            position % self.block_size
        )

    def _copy(self, plan: StepPlan) -> None:
        size = self.block_size
        read = {
            target * size + i: self.slots.get(source * size + i)
            for source, target in plan.block_copies
            for i in range(size)
        }
        for slot, content in read.items():
            self.slots[slot] = NOTHING if content is None else content

    def _write(self, plan: StepPlan) -> set[int]:
        """Returns the slots of rows of a single token: nobody else may read them in this step."""
        written: set[int] = set()
        alone: set[int] = set()
        for step in plan.rows:
            row = self.rows[step.row]
            known = contents(row.salt, row.tokens)
            for position in range(row.num_computed, row.num_computed + step.num_tokens):
                slot = self._slot(row, position)
                assert slot not in written, "two rows write one slot"
                written.add(slot)
                self.slots[slot] = known[position]
                if step.num_tokens == 1:
                    alone.add(slot)
        return alone

    def _row_result(self, step: RowStep, wrong: dict[int, str], alone: set[int]) -> RowResult:
        row = self.rows[step.row]
        if any(self._slot(row, position) in alone for position in range(row.num_computed)):
            wrong[row.seed] = f"{row} reads what a single token stores in the same step"
        row.num_computed += step.num_tokens
        known = contents(row.salt, row.tokens)[: row.num_computed]
        for position, content in enumerate(known):
            if self.slots.get(self._slot(row, position)) != content:
                wrong[row.seed] = f"position {position} of {row} holds something else"
                break
        if not step.sample:
            return RowResult(step.row)
        token_id = sample(known[-1], row.seed)
        row.tokens.append(token_id)
        if self.row_errors:
            self.row_errors -= 1
            return RowResult(step.row, error="not a number")
        return RowResult(step.row, (token_id,))

    def _spoil(self, plan: StepPlan) -> None:
        """A step that raised has written anything or nothing; its rows count on regardless."""
        for step in plan.rows:
            row = self.rows[step.row]
            for position in range(row.num_computed, row.num_computed + step.num_tokens):
                self.slots[self._slot(row, position)] = NOTHING
            row.num_computed += step.num_tokens
            if step.sample:
                row.tokens.append(1)
