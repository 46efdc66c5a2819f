"""The upload of a step of single tokens against plain indexing."""

import pytest
import torch
from gpu_device import DEVICE

kernels = pytest.importorskip("nanovllm.kernels.gpu.prepare")


def test_gathers_last_tokens_and_unpacks_tables():
    tokens = torch.arange(60, dtype=torch.int32, device=DEVICE).view(3, 20)
    rows = torch.tensor([2, 0, -1], dtype=torch.int32, device=DEVICE)
    context = torch.tensor([17, 4, 0], dtype=torch.int32, device=DEVICE)
    packed = torch.tensor([[5, 6, 7], [8, -1, -1], [-1, -1, -1]], dtype=torch.int32, device=DEVICE)
    columns = torch.tensor([3], dtype=torch.int32, device=DEVICE)
    ids = torch.full((3,), -5, dtype=torch.int64, device=DEVICE)
    tables = torch.full((3, 10), -9, dtype=torch.int32, device=DEVICE)
    kernels.prepare(tokens, rows, context, columns, packed.view(-1), ids, tables, 8)
    assert ids.tolist() == [56, 3, 0]
    expected = torch.full((3, 10), -9, dtype=torch.int32)
    expected[0, :3], expected[1, 0] = torch.tensor([5, 6, 7]), 8
    assert torch.equal(tables.cpu(), expected)


def test_gathers_any_tokens_and_leaves_padding_at_zero():
    tokens = torch.arange(60, dtype=torch.int32, device=DEVICE).view(3, 20)
    rows = torch.tensor([2, 0, 1, 7], dtype=torch.int32, device=DEVICE)
    positions = torch.tensor([19, 0, 3, 1 << 40], device=DEVICE)
    slots = torch.tensor([4, 0, 9, -1], device=DEVICE)
    ids = torch.full((4,), -5, dtype=torch.int64, device=DEVICE)
    kernels.gather_tokens(tokens, rows, positions, slots, ids)
    assert ids.tolist() == [59, 0, 23, 0]
