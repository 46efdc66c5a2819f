"""Turns a plan and the rows' state into the tensors of one step.

Shape legend: T tokens, S sequences in the plan, L rows that sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanovllm.attention.base import AttentionBatch
from nanovllm.engine.plan import StepPlan
from nanovllm.runner.rows import RowState


@dataclass(slots=True)
class Batch:
    """One step's inputs on the device, and the host's view of which rows they belong to."""

    token_ids: Tensor  # [T] int64
    attention: AttentionBatch
    sample_rows: NDArray[np.int64]  # [L] rows that sample, in plan order
    sample_positions: Tensor  # [L] int64: index into T of each sampling row's last token


def build_batch(plan: StepPlan, rows: RowState, device: torch.device) -> Batch:
    """Packs the plan's tokens row by row. Call after `rows.apply`, before `rows.advance`."""
    ids = np.array([step.row for step in plan.rows], np.int64)
    q_lens = np.array([step.num_tokens for step in plan.rows], np.int64)
    starts = rows.num_computed[ids]
    context_lens = starts + q_lens
    cu_q_lens = np.zeros(len(ids) + 1, np.int64)
    np.cumsum(q_lens, out=cu_q_lens[1:])
    row_of_token = np.repeat(ids, q_lens)
    positions = np.arange(cu_q_lens[-1]) + np.repeat(starts - cu_q_lens[:-1], q_lens)
    size = rows.block_size
    slots = rows.block_tables[row_of_token, positions // size].astype(np.int64) * size
    slots += positions % size
    columns = -(-int(np.max(context_lens)) // size)
    samples = np.array([step.sample for step in plan.rows], bool)

    def upload(array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    on_device = upload(positions)
    attention = AttentionBatch(
        cu_q_lens=upload(cu_q_lens.astype(np.int32)),
        context_lens=upload(context_lens.astype(np.int32)),
        block_tables=upload(rows.block_tables[ids, :columns]),
        slot_mapping=upload(slots),
        positions=on_device,
        max_q_len=int(np.max(q_lens)),
        max_context_len=int(np.max(context_lens)),
    )
    return Batch(
        token_ids=rows.tokens[upload(row_of_token), on_device].long(),
        attention=attention,
        sample_rows=ids[samples],
        sample_positions=upload(cu_q_lens[1:][samples] - 1),
    )
