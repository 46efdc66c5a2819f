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
    wide = torch.randperm(num_blocks).view(len(lens), columns).int()
    tables = torch.cat((wide, torch.full_like(wide, -1)), dim=1)[:, :columns]  # strided rows
    cache = torch.full((num_blocks, 2, kv_heads, SLOTS, dim), float("nan"), dtype=dtype)
    keys = [torch.randn(length, kv_heads, dim).to(dtype) for _, length in lens]
    values = [torch.randn(length, kv_heads, dim).to(dtype) for _, length in lens]
    queries = [torch.randn(n, heads, dim).to(dtype) for n, _ in lens]
    slots: list[int] = []
    for row, (n, length) in enumerate(lens):
        for position in range(length):
            block, offset = int(tables[row, position // SLOTS]), position % SLOTS
            if position >= length - n:
                slots.append(block * SLOTS + offset)
            else:
                cache[block, 0, :, offset] = keys[row][position]
                cache[block, 1, :, offset] = values[row][position]
        tables[row, -(-length // SLOTS) :] = 10**6  # never to be read
    new = [torch.cat([x[row][-n:] for row, (n, _) in enumerate(lens)]) for x in (keys, values)]
    q_lens = torch.tensor([0, *(n for n, _ in lens)])
    batch = AttentionBatch(
        cu_q_lens=q_lens.cumsum(0).int(),
        context_lens=torch.tensor([length for _, length in lens]).int(),
        block_tables=tables,
        slot_mapping=torch.tensor(slots),
        positions=torch.cat([torch.arange(length - n, length) for n, length in lens]),
        max_q_len=max(n for n, _ in lens),
        max_context_len=max(length for _, length in lens),
    )
    attention: Any = backend()
    attention.plan(batch)
    out = attention.forward(torch.cat(queries), *new, cache, batch, dim**-0.5, window)
    assert out.dtype == dtype
    for row, (n, length) in enumerate(lens):
        begin = int(batch.cu_q_lens[row])
        expected = textbook(queries[row], keys[row], values[row], length - n, dim**-0.5, window)
        torch.testing.assert_close(
            out[begin : begin + n].double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
        )


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
