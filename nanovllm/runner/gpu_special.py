"""Rows that want more than a plain choice: biases, bans, penalties, structure, log-probabilities.

They take part in the step as all rows do, graph included; afterwards their lines are adjusted in
a copy and chosen again. Nothing waits for the device, and other rows do not notice.

Shape legend: n special lines, L lines of logits, V vocabulary.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanovllm.engine.plan import NewRow
from nanovllm.kernels.gpu import adjust, sampling
from nanovllm.kernels.gpu.logprobs import logprobs
from nanovllm.runner.constraints import Masks
from nanovllm.runner.cuda_graph import bucket_of
from nanovllm.runner.gpu_results import LogprobDownload
from nanovllm.runner.gpu_staging import upload
from nanovllm.runner.rows import RowState
from nanovllm.runner.sampler import MIN_TEMPERATURE, BadWords
from nanovllm.sampling_params import SamplingParams


class RowSampling:
    """Host arrays [R] of what sampling needs of each row."""

    def __init__(self, num_rows: int) -> None:
        self.floats = np.zeros((3, num_rows), np.float32)  # temperature, top-p, min-p
        self.top_k = np.zeros(num_rows, np.int32)
        self.seed = np.zeros(num_rows, np.int64)
        self.restricted = np.zeros(num_rows, bool)
        self.changed = np.zeros(num_rows, bool)  # the row's logits are not used as they are
        self.changed_below = np.zeros(num_rows, np.int64)  # nor while it has fewer tokens
        self.structured = np.zeros(num_rows, bool)
        self.num_logprobs = np.full(num_rows, -1, np.int64)  # -1: none are wanted
        self.plain = np.ones(num_rows, bool)  # nothing from `restricted` on
        self.prompt_logprobs = np.zeros(num_rows, bool)

    def start(self, new: NewRow) -> None:
        row, p = new.row, new.params
        temperature = 0.0 if p.greedy else max(p.temperature, MIN_TEMPERATURE)
        self.floats[:, row] = temperature, p.top_p, p.min_p
        self.top_k[row] = max(0, p.top_k)
        self.seed[row] = (new.seed + 2**63) % 2**64 - 2**63
        self.restricted[row] = p.restricted
        self.changed[row] = _changes_logits(p)
        self.changed_below[row] = new.num_prompt_tokens + p.min_tokens if p.min_tokens else 0
        self.structured[row] = p.structured_output is not None
        self.num_logprobs[row] = -1 if p.logprobs is None else p.logprobs
        wants = p.restricted or p.min_tokens or p.logprobs is not None
        self.plain[row] = not (wants or self.changed[row])
        self.prompt_logprobs[row] = p.prompt_logprobs is not None

    def special(self, rows: NDArray[np.int64], num_tokens: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of rows [n] change their logits when they have num_tokens [n] tokens."""
        found: NDArray[np.bool_] = self.changed[rows] | (num_tokens < self.changed_below[rows])
        return found


def _changes_logits(p: SamplingParams) -> bool:
    """min_tokens apart, which only counts at first."""
    listed = p.logit_bias or p.allowed_token_ids is not None or p.bad_words
    return bool(listed) or p.structured_output is not None or _penalizes(p)


def _penalizes(p: SamplingParams) -> bool:
    return bool(p.repetition_penalty != 1.0 or p.presence_penalty or p.frequency_penalty)


@dataclass(frozen=True, slots=True)
class SpecialLines:
    """rows [L] of all lines; which lines change their logits, which want log-probabilities."""

    rows: NDArray[np.int64]
    changed: NDArray[np.int64]
    wanted: NDArray[np.int64]
    restricted: bool  # whether another line has top-k, top-p or min-p
    masks: Future[Masks] | None = None  # by index into changed

    @property
    def any(self) -> bool:
        return len(self.changed) + len(self.wanted) > 0


@dataclass(frozen=True, slots=True)
class _Entries:
    """Tokens [E] that have a bias of their own; -inf forbids them."""

    tokens: NDArray[np.int32]
    bias: NDArray[np.float32]

    @classmethod
    def of(cls, entries: dict[int, float]) -> _Entries:
        tokens = np.fromiter(entries.keys(), np.int32, len(entries))
        return cls(tokens, np.fromiter(entries.values(), np.float32, len(entries)))


class SpecialRows:
    """The special rows of one runner, and the memory in which their lines are adjusted."""

    def __init__(
        self,
        rows: RowState,
        sampling_of: RowSampling,
        stop_ids: tuple[int, ...],
        bad_words: BadWords,
    ) -> None:
        self._rows, self._sampling = rows, sampling_of
        self._stop_ids = stop_ids
        self._bad_words = bad_words
        # With and without min_tokens; made when a step first asks.
        self._entries: dict[int, tuple[_Entries, _Entries]] = {}
        self._scratch: Tensor | None = None
        self._counts: Tensor | None = None
        self._workspace: sampling.Workspace | None = None

    def start(self, new: NewRow) -> None:
        """A sequence enters a row."""
        self._entries.pop(new.row, None)

    def _entries_of(self, row: int, p: SamplingParams) -> tuple[_Entries, _Entries]:
        if row in self._entries:
            return self._entries[row]
        entries = dict(p.logit_bias or {})
        if p.allowed_token_ids is not None:
            entries = {token: entries.get(token, 0.0) for token in p.allowed_token_ids}
        ends = dict.fromkeys((*self._stop_ids, *(p.stop_token_ids or ())), float("-inf"))
        found = self._entries[row] = _Entries.of(entries | ends), _Entries.of(entries)
        return found

    def choose(self, logits: Tensor, special: SpecialLines, choice: Tensor) -> dict[int, str]:
        """Chooses again for the lines of logits [L, V] that change them.

        choice [2, size] int64 receives tokens and failure flags. Returns why lines cannot go on.
        """
        lines, rows = special.changed, special.rows[special.changed]
        line, own, targets, adjusted = self.adjusted(logits, lines, rows, choice.shape[1])
        errors = special.masks.result().apply(adjusted) if special.masks else {}
        found = choice.new_empty((2, len(lines)))
        sampling.choose(
            adjusted, own, self._workspace_for(adjusted), found[0], found[1],
            restricted=bool(self._sampling.restricted[rows].any()),
            scatter=(self._rows.tokens, line.rows),
        )  # fmt: skip
        choice.view(-1)[targets] = found.view(-1)
        return {int(lines[i]): error for i, error in errors.items()}

    def adjusted(
        self, logits: Tensor, lines: NDArray[np.int64], rows: NDArray[np.int64], size: int
    ) -> tuple[adjust.LineParams, sampling.RowParams, Tensor, Tensor]:
        """(lines, their sampling, where [2 n] their results go, their logits [n, V] float32)."""
        params = [self._params(int(row)) for row in rows]
        words = self._spellings(params)
        arrays = self._line_arrays(lines, rows, params)
        arrays.append(np.concatenate((lines, lines + size)))
        arrays += self._entry_arrays(rows, params)
        views = upload([*arrays, *words], logits.device)
        line = adjust.LineParams(*views[:8])
        temperature, top_p, min_p, top_k, seed, targets = views[8:14]
        own = sampling.RowParams(temperature, seed, line.num_tokens, top_k, top_p, min_p)
        penalties = any(map(_penalizes, params))
        scratch = self._adjust(logits, line, tuple(views[14:17]), penalties)
        if len(words[0]):
            adjust.forbid_words(self._rows.tokens, line, scratch, *views[17:])
        return line, own, targets, scratch

    def _line_arrays(
        self, lines: NDArray[np.int64], rows: NDArray[np.int64], params: list[SamplingParams]
    ) -> list[NDArray[Any]]:
        """The fields of LineParams, then temperature, top-p, min-p, top-k and seed."""
        s = self._sampling
        penalties = np.array(
            [(p.repetition_penalty, p.presence_penalty, p.frequency_penalty) for p in params],
            np.float32,
        )
        return [
            lines.astype(np.int32),
            rows.astype(np.int32),
            self._rows.num_tokens[rows].astype(np.int32),
            self._rows.num_prompt[rows].astype(np.int32),
            np.array([p.allowed_token_ids is not None for p in params], np.int32),
            *penalties.T,
            *s.floats[:, rows],
            s.top_k[rows],
            s.seed[rows],
        ]

    def _entry_arrays(
        self, rows: NDArray[np.int64], params: list[SamplingParams]
    ) -> list[NDArray[Any]]:
        """(index into n, token, bias) [E] of all tokens with a bias."""
        num_output = self._rows.num_tokens[rows] - self._rows.num_prompt[rows]
        found = [
            self._entries_of(int(row), p)[int(num >= p.min_tokens)]
            for row, num, p in zip(rows, num_output, params, strict=True)
        ]
        counts = [len(entries.tokens) for entries in found]
        return [
            np.repeat(np.arange(len(rows), dtype=np.int32), counts),
            np.concatenate([entries.tokens for entries in found]),
            np.concatenate([entries.bias for entries in found]),
        ]

    def _spellings(self, params: list[SamplingParams]) -> list[NDArray[np.int32]]:
        """(index into n [s], begin [s + 1], all tokens) of the spellings of bad words."""
        index: list[int] = []
        begin, tokens = [0], list[int]()
        for i, p in enumerate(params):
            words = tuple(p.bad_words or ())
            for spelling in self._bad_words.spellings(words) if words else ():
                index.append(i)
                tokens += spelling
                begin.append(len(tokens))
        return [np.array(values, np.int32) for values in (index, begin, tokens)]

    def _adjust(
        self, logits: Tensor, line: adjust.LineParams, entries: tuple[Tensor, ...], penalties: bool
    ) -> Tensor:
        """The special lines' logits [n, V] in float32."""
        n, vocab = len(line.lines), logits.shape[1]
        self._scratch = _at_least(self._scratch, n, vocab, torch.float32, logits.device)
        scratch, counts = self._scratch[:n], None
        if penalties:
            self._counts = _at_least(self._counts, n, vocab, torch.int32, logits.device)
            counts = self._counts[:n]
            adjust.count_tokens(self._rows.tokens, line, counts)
        adjust.adjust(logits, line, counts, scratch)
        if len(entries[0]):
            adjust.set_entries(logits, line, counts, scratch, entries)
        return scratch

    def _workspace_for(self, scratch: Tensor) -> sampling.Workspace:
        if self._workspace is None or len(self._workspace.counter) < len(scratch):
            size = bucket_of(len(scratch))
            self._workspace = sampling.Workspace(size, scratch.shape[1], scratch.device)
        return self._workspace

    def _params(self, row: int) -> SamplingParams:
        params = self._rows.params[row]
        assert params is not None, f"row {row} samples but holds no sequence"
        return params

    def logprobs(self, logits: Tensor, special: SpecialLines, choice: Tensor) -> LogprobDownload:
        """Of the tokens in choice [2, size], from the logits [L, V] as the model made them."""
        counts = self._sampling.num_logprobs[special.rows[special.wanted]]
        counts = np.minimum(counts, logits.shape[1]).tolist()
        (lines,) = upload([special.wanted], logits.device)
        found = logprobs(logits, lines, choice[0], max(counts))
        return LogprobDownload(found, special.wanted.tolist(), counts)


def _at_least(
    memory: Tensor | None, n: int, vocab: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """memory [>= n, V], or a larger one in its place."""
    if memory is not None and len(memory) >= n:
        return memory
    return torch.empty((bucket_of(n), vocab), dtype=dtype, device=device)
