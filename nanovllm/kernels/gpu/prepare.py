"""Turns what the host uploads for a step into the step's inputs.

Shape legend: T tokens and S rows of the step (padded to a graph's bucket), R rows that exist,
C context length, N columns of the step's block table, P slots a block.
"""

# mypy: disable-error-code="no-untyped-def, attr-defined, misc"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _prepare_kernel(
    tokens_ptr,
    row_ptr,
    context_ptr,
    columns_ptr,
    packed_ptr,
    ids_ptr,
    tables_ptr,
    tokens_stride,
    tables_stride,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (S): the row's last token, and its blocks from the packed tables."""
    line = tl.program_id(0)
    row = tl.load(row_ptr + line).to(tl.int64)
    context = tl.load(context_ptr + line)
    columns = tl.load(columns_ptr)
    here = context > 0
    token = tl.load(tokens_ptr + row * tokens_stride + context - 1, mask=here, other=0)
    tl.store(ids_ptr + line, token.to(tl.int64))
    used = (context + P - 1) // P
    for start in range(0, used, BLOCK):
        column = start + tl.arange(0, BLOCK)
        blocks = tl.load(packed_ptr + line * columns + column, mask=column < used)
        tl.store(
            tables_ptr + line.to(tl.int64) * tables_stride + column, blocks, mask=column < used
        )


def prepare(
    tokens: Tensor,
    rows: Tensor,
    context_lens: Tensor,
    columns: Tensor,
    packed_tables: Tensor,
    token_ids: Tensor,
    block_tables: Tensor,
    block_size: int,
) -> None:
    """Fills token_ids [S] int64 and block_tables [S, N] int32.

    tokens [R, C] int32; rows and context_lens [S] int32, context 0 for padding; packed_tables
    holds S rows of `columns` [1] block ids, of which those within the context count.
    """
    _prepare_kernel[(len(rows),)](
        tokens, rows, context_lens, columns, packed_tables, token_ids, block_tables,
        tokens.stride(0), block_tables.stride(0), block_size, 64, num_warps=1,
    )  # fmt: skip


@triton.jit
def _gather_kernel(
    tokens_ptr,
    row_ptr,
    position_ptr,
    slot_ptr,
    ids_ptr,
    tokens_stride,
    num_tokens,
    BLOCK: tl.constexpr,
):
    """Grid (tiles of T)."""
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = t < num_tokens
    real = inside & (tl.load(slot_ptr + t, mask=inside, other=-1) >= 0)
    row = tl.load(row_ptr + t, mask=real, other=0).to(tl.int64)
    position = tl.load(position_ptr + t, mask=real, other=0)
    token = tl.load(tokens_ptr + row * tokens_stride + position, mask=real, other=0)
    tl.store(ids_ptr + t, token.to(tl.int64), mask=inside)


def gather_tokens(
    tokens: Tensor, rows: Tensor, positions: Tensor, slot_mapping: Tensor, token_ids: Tensor
) -> None:
    """token_ids [T] = tokens [R, C] at (rows, positions); 0 where the slot is -1 (padding)."""
    _gather_kernel[(triton.cdiv(len(rows), 256),)](
        tokens, rows, positions, slot_mapping, token_ids, tokens.stride(0), len(rows), 256,
        num_warps=2,
    )  # fmt: skip
