"""What comes back from a step on a GPU: tokens, log-probabilities, why rows cannot go on.

Copies to page-locked memory, under way while the next step is launched; whoever needs one waits for
its event alone. Knows plans and rows, no kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanovllm.engine.plan import RowResult, StepPlan, StepResult, TokenLogprobs
from nanovllm.runner.gpu_staging import Download
from nanovllm.runner.rows import RowState
from nanovllm.runner.sampler import NOT_FINITE, pack_logprobs

TAIL = 32  # tokens that a constraint may be behind without a visit to the device


class TokenTails:
    """The last tokens of rows on their way to the host, ahead of the step that is launched next."""

    def __init__(self, rows: RowState, ids: NDArray[np.int64]) -> None:
        self._rows = rows
        self._tails: dict[int, tuple[int, Tensor]] = {}
        for row in ids.tolist():
            stop = int(rows.num_tokens[row])
            start = max(0, stop - TAIL)
            host = torch.empty(stop - start, dtype=torch.int32, pin_memory=True)
            host.copy_(rows.tokens[row, start:stop], non_blocking=True)
            self._tails[row] = start, host
        self._event = torch.cuda.Event()
        self._event.record()

    def read(self, row: int, start: int, stop: int) -> list[int]:
        """Token ids of a row; waits for the step that chose the last of them."""
        begin, host = self._tails[row]
        if start < begin:
            found: list[int] = self._rows.tokens[row, start:stop].tolist()
            return found
        self._event.synchronize()
        return host[start - begin : stop - begin].tolist()


class LogprobDownload:
    """Log-probabilities on their way to the host; counts holds how many each line asked for."""

    def __init__(self, found: Tensor, lines: Sequence[int], counts: Sequence[int]) -> None:
        self._host = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
        self._host.copy_(found, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()
        self._lines, self._counts = lines, counts

    def take(self) -> dict[int, TokenLogprobs]:
        """By line; waits for the copy."""
        self._event.synchronize()
        heads, values, ids = self._host.split([3, *2 * [self._host.shape[1] // 2 - 1]], 1)
        token_ids, own, ranks = heads.T
        tops = torch.stack([ids, values], -1)
        found = pack_logprobs(token_ids.long(), own, ranks.long(), tops, self._counts)
        return dict(zip(self._lines, found, strict=True))


@dataclass(frozen=True, slots=True)
class Extras:
    """What a step has beside its tokens: log-probabilities, and by line why it cannot go on."""

    logprobs: LogprobDownload | None = None
    errors: dict[int, str] = field(default_factory=dict)

    @property
    def any(self) -> bool:
        return self.logprobs is not None or bool(self.errors)


@dataclass(slots=True)
class GpuPending:
    """A step that was launched; `wait` blocks until its tokens are on the host."""

    plan: StepPlan
    download: Download | None
    num_lines: int  # tokens come first, then as many failure flags
    lines: list[int]  # where each row of the plan finds its token, -1 if it samples none
    extras: Extras = field(default_factory=Extras)
    prompt_logprobs: dict[int, tuple[int, tuple[TokenLogprobs, ...]]] = field(default_factory=dict)

    def wait(self) -> StepResult:
        words = self.download.take() if self.download else []
        flags = words[self.num_lines :]
        if self.prompt_logprobs or self.extras.any or any(flags):
            logprobs = self.extras.logprobs.take() if self.extras.logprobs else {}
            results = [
                self._row(step.row, line, words, logprobs.get(line))
                for step, line in zip(self.plan.rows, self.lines, strict=True)
            ]
        else:
            results = [
                RowResult(step.row, () if line < 0 else (words[line],))
                for step, line in zip(self.plan.rows, self.lines, strict=True)
            ]
        return StepResult(self.plan.step_id, tuple(results))

    def _row(self, row: int, line: int, words: list[int], found: TokenLogprobs | None) -> RowResult:
        start, prompt = self.prompt_logprobs.get(row, (0, ()))
        if line < 0:
            return RowResult(row, prompt_logprobs=prompt, prompt_start=start)
        error = NOT_FINITE if words[self.num_lines + line] else self.extras.errors.get(line)
        return RowResult(
            row,
            () if error else (words[line],),
            () if found is None else (found,),
            prompt,
            start,
            error,
        )
