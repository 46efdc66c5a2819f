"""The contract of an attention backend: paged attention equals the textbook's, slot by slot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nanovllm.attention.base import AttentionBackend, AttentionBatch, AttentionSpec
from nanovllm.attention.cpu import CpuAttention
from nanovllm.attention.select import select_backend
from nanovllm.attention.torch_ref import TorchAttention
from nanovllm.errors import ConfigError

SLOTS = 8
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
# (query length, context length) of each sequence
SHAPES = {
    "prompts": [(5, 5), (1, 1), (17, 17), (8, 8)],
    "decoding": [(1, 1), (1, 8), (1, 9), (1, 40), (1, 16)],
    "chunks": [(3, 20), (8, 16), (1, 33), (2, 2)],
    "one": [(24, 25)],
}


def spec_of(heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> AttentionSpec:
    return AttentionSpec(heads, kv_heads, dim, SLOTS, dtype, torch.device("cpu"))


def textbook(
    q: Tensor, keys: Tensor, values: Tensor, start: int, scale: float, window: int | None
) -> Tensor:
    """q [n, H, D] at positions start.. over keys and values [L, G, D], in float64."""
    group = q.shape[1] // keys.shape[1]
    keys, values = (x.double().repeat_interleave(group, dim=1) for x in (keys, values))
    scores = torch.einsum("nhd,lhd->hnl", q.double(), keys) * scale
    distance = torch.arange(start, start + len(q))[:, None] - torch.arange(len(keys))
    hidden = (distance < 0) | (distance >= (window or 10**9))
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("hnl,lhd->nhd", weights, values)


@pytest.mark.parametrize("backend", [TorchAttention, CpuAttention])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", [None, 1, 7, 100])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "dtype"),
    [
        (4, 2, 16, torch.float32),
        (6, 1, 40, torch.float32),
        (3, 3, 64, torch.float32),
        (4, 2, 64, torch.bfloat16),
        (4, 4, 32, torch.float16),
    ],
)
def test_contract(
    backend: type[AttentionBackend],
    shape: str,
    window: int | None,
    heads: int,
    kv_heads: int,
    dim: int,
    dtype: torch.dtype,
) -> None:
    reason = backend.unsupported(spec_of(heads, kv_heads, dim, dtype))
    if reason is not None:
        pytest.skip(reason)
    torch.manual_seed(len(shape))
    lens = SHAPES[shape]
    columns = max(-(-length // SLOTS) for _, length in lens) + 2
    num_blocks = len(lens) * columns
    tables = torch.randperm(num_blocks).view(len(lens), columns).int()
    cache = torch.full((num_blocks, 2, kv_heads, SLOTS, dim), float("nan"), dtype=dtype)
    keys = [torch.randn(length, kv_heads, dim).to(dtype) for _, length in lens]
    values = [torch.randn(length, kv_heads, dim).to(dtype) for _, length in lens]
    queries = [torch.randn(length, heads, dim).to(dtype) for _, length in lens]
    attention: Any = backend()

    def run(computed: list[tuple[int, int]]) -> Tensor:
        """Positions [begin, end) of each sequence as one batch; what lies in a block is theirs."""
        rows = [(row, begin, end) for row, (begin, end) in enumerate(computed) if begin < end]
        at = [(row, position) for row, begin, end in rows for position in range(begin, end)]
        slots = [int(tables[row, p // SLOTS]) * SLOTS + p % SLOTS for row, p in at]
        seen = tables[[row for row, _, _ in rows]].clone()
        for i, (_, _, end) in enumerate(rows):
            seen[i, -(-end // SLOTS) :] = 10**6  # never to be read
        batch = AttentionBatch(
            cu_q_lens=torch.tensor([0, *(end - begin for _, begin, end in rows)]).cumsum(0).int(),
            context_lens=torch.tensor([end for _, _, end in rows]).int(),
            block_tables=torch.cat((seen, torch.full_like(seen, -1)), dim=1)[:, :columns],
            slot_mapping=torch.tensor(slots),
            positions=torch.tensor([position for _, position in at]),
            max_q_len=max(end - begin for _, begin, end in rows),
            max_context_len=max(end for _, _, end in rows),
        )
        attention.plan(batch)
        q, k, v = (
            torch.stack([x[row][position] for row, position in at]) for x in (queries, keys, values)
        )
        return attention.forward(q, k, v, cache, batch, dim**-0.5, window)

    if any(n < length for n, length in lens):
        run([(0, length - n) for n, length in lens])
    out = run([(length - n, length) for n, length in lens])
    assert out.dtype == dtype
    begin = 0
    for row, (n, length) in enumerate(lens):
        expected = textbook(
            queries[row][-n:], keys[row], values[row], length - n, dim**-0.5, window
        )
        torch.testing.assert_close(
            out[begin : begin + n].double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
        )
        begin += n


@pytest.mark.parametrize("backend", [TorchAttention, CpuAttention])
def test_a_sequence_may_begin_on_what_another_stores_in_the_same_step(
    backend: type[AttentionBackend],
) -> None:
    """The one that reads comes first in the batch, so that no order of the work helps."""
    heads, kv_heads, dim = 4, 2, 16
    reason = backend.unsupported(spec_of(heads, kv_heads, dim, torch.float32))
    if reason is not None:
        pytest.skip(reason)
    torch.manual_seed(0)
    q = torch.randn(28, heads, dim)
    k, v = torch.randn(2, 28, kv_heads, dim)
    tables = torch.tensor([[2, 0, 1], [2, 3, -1]]).int()
    slots = [*range(8), *range(8, 12), *range(16, 24), *range(24, 32)]
    batch = AttentionBatch(
        cu_q_lens=torch.tensor([0, 12, 28]).int(),  # 12 tokens after a block of 8, and all 16
        context_lens=torch.tensor([20, 16]).int(),
        block_tables=tables,
        slot_mapping=torch.tensor(slots),
        positions=torch.tensor([*range(8, 20), *range(16)]),
        max_q_len=16,
        max_context_len=20,
    )
    cache = torch.full((4, 2, kv_heads, SLOTS, dim), float("nan"))
    attention: Any = backend()
    attention.plan(batch)
    out = attention.forward(q, k, v, cache, batch, dim**-0.5, None)
    keys, values = (torch.cat((x[12:20], x[:12])) for x in (k, v))
    for got, expected in (
        (out[:12], textbook(q[:12], keys, values, 8, dim**-0.5, None)),
        (out[12:], textbook(q[12:], k[12:], v[12:], 0, dim**-0.5, None)),
    ):
        torch.testing.assert_close(got.double(), expected, atol=2e-6, rtol=2e-6)


def test_selection_says_why() -> None:
    odd = spec_of(4, 2, 20, torch.float32)
    backend, reasons = select_backend(odd)
    assert backend.name == "torch"
    assert any("head_dim" in reason and "20" in reason for reason in reasons)
    with pytest.raises(ConfigError, match=r"'cpu' cannot run here: .*head_dim.*20"):
        select_backend(odd, "cpu")
    with pytest.raises(ConfigError, match=r"auto or one of \[.*\], got 'fast'"):
        select_backend(odd, "fast")
    assert select_backend(spec_of(4, 2, 16, torch.float32), "torch")[0].name == "torch"
