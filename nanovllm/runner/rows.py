"""State that a rank keeps for each row between steps; plans bring only differences.

Host arrays hold what planning a batch needs (lengths and block tables: counts are known on the
host even while token ids are not). Token ids live on the device, so that a sampled token is the
next step's input without a visit to the host.

Shape legend: R rows, N columns of the block table, C context length.
"""

from __future__ import annotations

from array import array

import numpy as np
import torch
from numpy.typing import NDArray

from nanovllm.engine.plan import NewRow, StepPlan
from nanovllm.sampling_params import SamplingParams


class RowState:
    """Lengths, block tables, tokens and sampling parameters of every row."""

    def __init__(
        self, max_num_seqs: int, max_model_len: int, block_size: int, device: torch.device
    ) -> None:
        columns = -(-max_model_len // block_size)
        self.block_size = block_size
        self.num_computed: NDArray[np.int64] = np.zeros(max_num_seqs, np.int64)
        self.num_tokens: NDArray[np.int64] = np.zeros(max_num_seqs, np.int64)  # pending included
        self.num_prompt: NDArray[np.int64] = np.zeros(max_num_seqs, np.int64)
        self.num_blocks: NDArray[np.int64] = np.zeros(max_num_seqs, np.int64)
        self.block_tables: NDArray[np.int32] = np.zeros((max_num_seqs, columns), np.int32)
        self.seeds: NDArray[np.uint64] = np.zeros(max_num_seqs, np.uint64)
        self.params: list[SamplingParams | None] = [None] * max_num_seqs
        # Zeroed, since a step that failed leaves tokens unwritten that the next one, planned
        # already, reads. numpy's zeros cost nothing until a page is touched.
        tokens = torch.from_numpy(np.zeros((max_num_seqs, max_model_len), np.int32))
        self.tokens = tokens.to(device)

    def apply(self, plan: StepPlan) -> None:
        """Takes over everything of a plan but its computation."""
        for row in plan.freed_rows:
            self.params[row] = None
        for new in plan.new_rows:
            self._start(new)
        for step in plan.rows:
            if step.replaced_block is not None:
                index, block = step.replaced_block
                self.block_tables[step.row, index] = block
            if step.new_block_ids:
                begin = self.num_blocks[step.row]
                end = begin + len(step.new_block_ids)
                self.block_tables[step.row, begin:end] = step.new_block_ids
                self.num_blocks[step.row] = end

    def _start(self, new: NewRow) -> None:
        row = new.row
        self.num_computed[row] = new.num_computed
        self.num_tokens[row] = len(new.token_ids)
        self.num_prompt[row] = new.num_prompt_tokens
        self.num_blocks[row] = len(new.block_ids)
        self.block_tables[row, : len(new.block_ids)] = new.block_ids
        self.seeds[row] = new.seed & (2**64 - 1)
        self.params[row] = new.params
        known = torch.frombuffer(array("i", new.token_ids), dtype=torch.int32)
        if self.tokens.is_cuda:  # from pageable memory the copy would wait for the steps before
            known = known.pin_memory()
        self.tokens[row][: len(known)].copy_(known, non_blocking=True)

    def advance(self, plan: StepPlan) -> None:
        """Counts the plan's tokens as computed, and its samples as existing."""
        for step in plan.rows:
            self.num_computed[step.row] += step.num_tokens
            self.num_tokens[step.row] += step.sample
