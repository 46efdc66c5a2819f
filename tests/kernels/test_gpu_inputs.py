"""What a step's words say, against loops over rows and tokens; views and packing agree."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gpu_device import DEVICE

from nanovllm.engine.plan import NewRow, RowStep, StepPlan
from nanovllm.runner.rows import RowState
from nanovllm.sampling_params import SamplingParams

Layout = pytest.importorskip("nanovllm.runner.gpu_inputs").Layout
RowSampling = pytest.importorskip("nanovllm.runner.gpu_special").RowSampling
ROWS, LENGTH, BLOCK = 9, 256, 16
POISON = -77


def make_rows(rng: np.random.Generator) -> tuple[RowState, Any]:
    state = RowState(ROWS, LENGTH, BLOCK, torch.device(DEVICE))
    sampling = RowSampling(ROWS)
    blocks = rng.permutation(ROWS * LENGTH // BLOCK).reshape(ROWS, -1)
    for row in range(ROWS):
        params = SamplingParams(temperature=0.5 + row, top_k=row, top_p=0.9, min_p=0.01 * row)
        tokens = tuple(rng.integers(0, 99, 200).tolist())
        seed = int(rng.integers(2**63)) * (-1) ** row
        new = NewRow(row, tokens, 150, row * 7, tuple(blocks[row].tolist()), params, seed)
        state.apply(StepPlan(0, (), (new,)))
        sampling.start(new)
        assert tuple(state.tokens[row, :200].tolist()) == tokens
    return state, sampling


@pytest.mark.parametrize(
    ("steps", "num_tokens", "num_rows"),
    [
        ([(3, 20, True)], 32, 1),
        ([(3, 32, False)], 32, 1),
        ([(4, 1, True), (0, 17, False), (8, 5, True)], 32, 4),
        ([(4, 1, True), (0, 17, False), (8, 5, True)], 23, 3),
        ([(row, 1 + 3 * row, row % 2 == 0) for row in reversed(range(ROWS))], 117, ROWS),
    ],
)
def test_words_are_what_loops_would_write(
    steps: list[tuple[int, int, bool]], num_tokens: int, num_rows: int
) -> None:
    state, sampling = make_rows(np.random.default_rng(0))
    rows = [RowStep(*step) for step in steps]
    layout = Layout(num_tokens, num_rows)
    words = np.full(4096, POISON, np.int32)
    columns = [np.array(column) for column in zip(*steps, strict=True)]
    ids, q_lens, samples = columns
    used = layout.pack(words, state, sampling, ids, q_lens, samples)
    assert (words[used:] == POISON).all(), "words beyond the used ones were written"
    found = layout.views(torch.from_numpy(words).to(DEVICE))
    slots, positions, token_rows, cu = [], [], [], [0]
    for step in rows:
        start = int(state.num_computed[step.row])
        for position in range(start, start + step.num_tokens):
            block = int(state.block_tables[step.row, position // BLOCK])
            slots.append(block * BLOCK + position % BLOCK)
            positions.append(position)
            token_rows.append(step.row)
        cu.append(len(slots))
    contexts = [int(state.num_computed[step.row]) + step.num_tokens for step in rows]
    lines = [(i, step.row) for i, step in enumerate(rows) if step.sample]

    def padded(values: list[int], size: int, fill: int) -> list[int]:
        return values + [fill] * (size - len(values))

    assert found.slots.tolist() == padded(slots, num_tokens, -1)
    assert found.positions.tolist() == padded(positions, num_tokens, 0)
    assert found.token_rows.tolist() == padded(token_rows, num_tokens, 0)
    assert found.cu_q_lens.tolist() == padded(cu, num_rows + 1, cu[-1])
    assert found.context_lens.tolist() == padded(contexts, num_rows, 0)
    assert found.rows.tolist() == padded([step.row for step in rows], num_rows, -1)
    assert found.last.tolist() == padded([cu[i + 1] - 1 for i, _ in lines], num_rows, 0)
    assert found.lines.tolist() == padded([row for _, row in lines], num_rows, -1)
    width = -(-max(contexts) // BLOCK)
    assert found.columns.tolist() == [width]
    tables = found.tables[: len(rows) * width].view(len(rows), width)
    assert tables.tolist() == [state.block_tables[step.row, :width].tolist() for step in rows]
    of, chosen = found.params, [row for _, row in lines]
    assert of.position.tolist() == padded([contexts[i] for i, _ in lines], num_rows, 0)
    for view, values in (
        (of.temperature, sampling.floats[0]), (of.top_p, sampling.floats[1]),
        (of.min_p, sampling.floats[2]), (of.top_k, sampling.top_k), (of.seed, sampling.seed),
    ):  # fmt: skip
        assert view.tolist() == padded(values[chosen].tolist(), num_rows, 0)
    assert of.seed.tolist()[: len(lines)] == state.seeds[chosen].view(np.int64).tolist()


@pytest.mark.parametrize(("num_tokens", "num_rows"), [(5, 1), (17, 3), (32, 4), (117, 9)])
def test_every_part_begins_at_16_bytes(num_tokens: int, num_rows: int) -> None:
    """Kernels are compiled anew for a pointer that is not."""
    words = torch.empty(4096, dtype=torch.int32)
    found = Layout(num_tokens, num_rows).views(words)
    views = [value for value in vars_of(found) if isinstance(value, torch.Tensor)]
    assert len(views) == 16
    for view in views:
        assert (view.data_ptr() - words.data_ptr()) % 16 == 0
        assert view.is_contiguous()


def vars_of(found: object) -> list[object]:
    values = [getattr(found, name) for name in found.__slots__ if name != "params"]  # type: ignore[attr-defined]
    return values + list(vars(found.params).values())  # type: ignore[attr-defined]
