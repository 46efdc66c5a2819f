"""Turns what the host uploads for a step of single tokens into the step's inputs.

Shape legend: S rows of the step (a graph's bucket), R rows that exist, C context length, N columns
of the step's block table, P slots a block.
"""

# mypy: disable-error-code="no-untyped-def, attr-defined, misc"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _prepare_kernel(tokens_ptr, row_ptr, context_ptr, columns_ptr, packed_ptr, ids_ptr, tables_ptr,
                    tokens_stride, tables_stride, P: tl.constexpr, BLOCK: tl.constexpr):
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
        tl.store(tables_ptr + line.to(tl.int64) * tables_stride + column, blocks,
                 mask=column < used)


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
