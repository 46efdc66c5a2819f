"""What a step of rows with several tokens tells the device: packed by the host, read by kernels.

One block of int32 words holds all of it. Where each part lies depends on the step's size alone, so
a captured graph finds the parts of any step of its size. All parts begin at 16 bytes: kernels are
compiled for that.

Shape legend: T tokens, S rows of the step, L <= S rows that sample, all padded to the size of a
graph; T' and S' the next multiples of 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanovllm.kernels.gpu.sampling import RowParams
from nanovllm.runner.gpu_special import RowSampling
from nanovllm.runner.rows import RowState

ALIGN = 4  # words
SMALL = 8  # int32 values a row: context, position, top-k, 3 floats, then line and row
LINES = 6  # the first of them that is -1 for padding; the others are 0


@dataclass(slots=True)
class TokenInputs:
    """Device views; lines are the rows that sample, in order, -1 for padding."""

    slots: Tensor  # [T] int64: of the KV cache, -1 for padding
    positions: Tensor  # [T] int64
    token_rows: Tensor  # [T] int32
    cu_q_lens: Tensor  # [S + 1] int32
    context_lens: Tensor  # [S] int32
    rows: Tensor  # [S] int32, -1 for padding
    columns: Tensor  # [1] int32: of the packed block tables
    tables: Tensor  # [at least S * columns] int32
    last: Tensor  # [L] int64: index into T of each line's last token
    lines: Tensor  # [L] int32
    params: RowParams  # [L]


class Layout:
    """Where the parts of a step of num_tokens and num_rows lie."""

    def __init__(self, num_tokens: int, num_rows: int) -> None:
        self.num_tokens, self.num_rows = num_tokens, num_rows
        tokens, rows = (-(-size // ALIGN) * ALIGN for size in (num_tokens, num_rows))
        sizes = (4 * tokens, 4 * rows, tokens, SMALL * rows, rows + ALIGN, ALIGN)
        self._ends = tuple(accumulate(sizes))

    def views(self, words: Tensor) -> TokenInputs:
        """The parts of device words that `pack` filled on the host."""
        a, b, c, d, e, f = self._ends
        t, s = self.num_tokens, self.num_rows
        slots, positions = words[:a].view(torch.int64).view(2, -1)[:, :t]
        last, seed = words[a:b].view(torch.int64).view(2, -1)[:, :s]
        small = words[c:d].view(SMALL, -1)[:, :s]
        context_lens, position, top_k, _, _, _, lines, rows = small
        temperature, top_p, min_p = small[3:LINES].view(torch.float32)
        params = RowParams(temperature, seed, position, top_k, top_p, min_p)
        return TokenInputs(
            slots, positions, words[b : b + t], words[d : d + s + 1], context_lens, rows,
            words[e : e + 1], words[f:], last, lines, params,
        )  # fmt: skip

    def pack(
        self,
        words: NDArray[np.int32],
        state: RowState,
        sampling: RowSampling,
        ids: NDArray[np.int64],
        q_lens: NDArray[np.int64],
        samples: NDArray[np.bool_],
    ) -> int:
        """Fills words for rows ids [<= S] that compute q_lens tokens; returns how many it used."""
        *_, e, f = self._ends
        words[:f] = 0
        context = state.num_computed[ids] + q_lens
        ends = q_lens.cumsum()
        self._pack_tokens(words, state, ids, q_lens, context - ends)
        self._pack_rows(words, sampling, ids, context, ends, samples)
        columns = -(-int(np.max(context)) // state.block_size)
        words[e] = columns
        end = f + len(ids) * columns
        words[f:end].reshape(len(ids), columns)[:] = state.block_tables[ids, :columns]
        return end

    def _pack_tokens(
        self,
        words: NDArray[np.int32],
        state: RowState,
        ids: NDArray[np.int64],
        q_lens: NDArray[np.int64],
        shifts: NDArray[np.int64],
    ) -> None:
        """shifts: position of a row's tokens minus their index in the step."""
        a, b, c, *_ = self._ends
        token_rows = np.repeat(ids, q_lens)
        at = np.arange(len(token_rows)) + np.repeat(shifts, q_lens)
        blocks, offsets = np.divmod(at, state.block_size)
        slots, positions = words[:a].view(np.int64).reshape(2, -1)
        here = slice(len(at))
        np.multiply(state.block_tables[token_rows, blocks], state.block_size, out=slots[here])
        slots[here] += offsets
        slots[len(at) :] = -1
        positions[here] = at
        words[b:c][here] = token_rows

    def _pack_rows(
        self,
        words: NDArray[np.int32],
        sampling: RowSampling,
        ids: NDArray[np.int64],
        context: NDArray[np.int64],
        ends: NDArray[np.int64],
        samples: NDArray[np.bool_],
    ) -> None:
        """ends: index into T after each row's last token."""
        a, b, c, d, e, _ = self._ends
        n, sampled = len(ids), ids[samples]
        num = len(sampled)
        longs = words[a:b].view(np.int64).reshape(2, -1)
        longs[0, :num], longs[1, :num] = ends[samples] - 1, sampling.seed[sampled]
        small = words[c:d].reshape(SMALL, -1)
        small[LINES:] = -1
        small[0, :n], small[1, :num] = context, context[samples]
        small[2, :num] = sampling.top_k[sampled]
        small[3:LINES, :num] = sampling.floats[:, sampled].view(np.int32)
        small[LINES, :num], small[LINES + 1, :n] = sampled, ids
        words[d + 1 : d + 1 + n], words[d + 1 + n : e] = ends, ends[-1]
