"""What may come next in rows whose output has a form, worked out beside the forward pass.

Each such row has a TokenConstraint. While the model computes, a thread of its own tells the
constraints which tokens were chosen since, and fills one bit mask a row; the sampler waits for
them, and other rows do not notice. Knows no grammars.

Shape legend: C rows of the step that sample and are constrained, L rows that sample, V vocabulary,
W = ceil(V / 32) words of a mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanovllm.engine.plan import StepPlan
from nanovllm.errors import InvalidRequestError
from nanovllm.structured_output import STRUCTURE_FAILED, StructuredOutput

# Of a token that only a wish forbids (bad words, min_tokens): it is chosen if the form leaves
# nothing else, and in practice never otherwise.
LEAST_LOGIT = -1e30


class TokenConstraint(Protocol):
    """The state of one sequence: what may follow the tokens that were accepted."""

    def fill_mask(self, row: NDArray[np.int32]) -> None:
        """Sets bit i % 32 of row[i // 32] for each token id i that may follow, clears all others.

        Never leaves a mask empty: where nothing more may follow, end tokens may. Raises
        InvalidRequestError if the constraint cannot go on.
        """

    def accept(self, token_ids: Sequence[int]) -> None:
        """Takes chosen tokens. After one that was not allowed the next mask raises."""

    def rewind(self, num_tokens: int) -> None:
        """Takes back the last tokens that were accepted."""


ConstraintFactory = Callable[[StructuredOutput], TokenConstraint]
ReadTokens = Callable[[int, int, int], list[int]]  # row, from, up to: token ids of a row


@dataclass(slots=True)
class Masks:
    """bits [C, W] int32 of the lines [C] in 0..L; errors say in words which lines cannot go on."""

    lines: list[int]
    bits: Tensor
    errors: dict[int, str]

    def apply(self, logits: Tensor) -> dict[int, str]:
        """Forbids what the masks do in logits [L, V], in place; returns the errors."""
        forbidden = self._forbidden(logits.device)
        forbidden = forbidden[:, : logits.shape[1]]
        if logits.device.type == "cpu":  # without a copy of the rows
            for line, mask in zip(self.lines, forbidden, strict=True):
                logits[line].clamp_(min=LEAST_LOGIT).masked_fill_(mask, float("-inf"))
        else:  # with few launches
            kept = logits[self.lines].clamp_(min=LEAST_LOGIT)
            logits[self.lines] = kept.masked_fill_(forbidden, float("-inf"))
        return self.errors

    def _forbidden(self, device: torch.device) -> Tensor:
        """The masks, turned around, as bool [C, 32 W] on a device."""
        if device.type == "cpu":
            bits = np.unpackbits((~self.bits.numpy()).view(np.uint8), axis=1, bitorder="little")
            return torch.from_numpy(bits).view(torch.bool)
        words = self.bits.to(device, non_blocking=True).unsqueeze(-1)
        shifts = torch.arange(32, dtype=torch.int32, device=device)
        return ((words >> shifts) & 1).bool().logical_not_().flatten(1)


@dataclass(slots=True)
class _Row:
    constraint: TokenConstraint | None
    num_accepted: int = 0  # tokens of the row that the constraint knows, the prompt included
    error: str = ""


class RowConstraints:
    """The constraints of the rows that have one. `make` is None where there can be none."""

    def __init__(self, make: ConstraintFactory | None, vocab_size: int) -> None:
        self._make = make
        self._num_words = (vocab_size + 31) // 32
        self._rows: dict[int, _Row] = {}
        self._thread: ThreadPoolExecutor | None = None
        self._filling: Future[Masks] | None = None

    def apply(self, plan: StepPlan) -> None:
        """Takes over new and freed rows; one that was preempted accepts its tokens again."""
        if self._filling is not None:
            wait([self._filling])  # of a step that failed before it sampled
        for row in plan.freed_rows:
            self._rows.pop(row, None)
        for new in plan.new_rows:
            self._rows.pop(new.row, None)  # of a plan that was lost, and what it freed with it
            structure = new.params.structured_output
            if isinstance(structure, StructuredOutput):
                output = new.token_ids[new.num_prompt_tokens :]
                self._rows[new.row] = self._start(structure, output)
                self._rows[new.row].num_accepted = len(new.token_ids)

    def _start(self, structure: StructuredOutput, output: Sequence[int]) -> _Row:
        try:
            assert self._make is not None, "the engine refuses structures it cannot constrain"
            constraint = self._make(structure)
        except InvalidRequestError as error:
            return _Row(None, error=str(error))
        if output:
            constraint.accept(output)
        return _Row(constraint)

    def begin(
        self, sample_rows: NDArray[np.int64], num_tokens: NDArray[np.int64], read: ReadTokens
    ) -> Future[Masks] | None:
        """Starts filling the masks of the rows [L] that sample; None if none is constrained.

        num_tokens [R] are the tokens that exist in each row; read is called on another thread.
        """
        if not self._rows:
            return None
        lines = [(i, int(row)) for i, row in enumerate(sample_rows) if int(row) in self._rows]
        if not lines:
            return None
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="nanovllm-masks")
        ends = {row: int(num_tokens[row]) for _, row in lines}
        self._filling = self._thread.submit(self._fill, lines, ends, read)
        return self._filling

    def _fill(self, lines: list[tuple[int, int]], ends: dict[int, int], read: ReadTokens) -> Masks:
        words = np.full((len(lines), self._num_words), -1, np.int32)
        errors = {}
        for mask, (line, row) in zip(words, lines, strict=True):
            error = self._fill_one(mask, row, ends[row], read)
            if error:
                mask[:] = -1
                errors[line] = STRUCTURE_FAILED + error
        return Masks([line for line, _ in lines], torch.from_numpy(words), errors)

    def _fill_one(self, mask: NDArray[np.int32], row: int, end: int, read: ReadTokens) -> str:
        """Why there is no mask, or ""."""
        state = self._rows[row]
        if state.constraint is None:
            return state.error
        try:
            if state.num_accepted < end:
                state.constraint.accept(read(row, state.num_accepted, end))
                state.num_accepted = end
            state.constraint.fill_mask(mask)
        except InvalidRequestError as error:
            return str(error)
        return ""
