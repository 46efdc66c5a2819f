"""Triton attention against the float32 reference, with NaN in every slot outside a context."""

from dataclasses import replace

import pytest
import torch
from gpu_device import DEVICE, ON_GPU, relative_error, tolerance

from nanovllm.attention.base import AttentionBatch
from nanovllm.attention.torch_ref import TorchAttention

kernels = pytest.importorskip("nanovllm.kernels.gpu.attention")
from nanovllm.attention.triton import TritonAttention  # noqa: E402

DTYPES = [torch.float32, torch.float16, torch.bfloat16] if ON_GPU else [torch.float32]


def make_batch(q_lens, context_lens, *, slots, columns=None):
    """A batch with shuffled blocks; entries of the tables past the context are far out of range."""
    blocks = [-(-c // slots) for c in context_lens]
    columns = columns or max(blocks) + 1
    ids = torch.randperm(sum(blocks)).tolist()
    tables = torch.full((len(q_lens), columns), 1 << 30, dtype=torch.int32)
    slot_mapping, positions = [], []
    for row, (n, context, count) in enumerate(zip(q_lens, context_lens, blocks, strict=True)):
        own = [ids.pop() for _ in range(count)]
        tables[row, :count] = torch.tensor(own, dtype=torch.int32)
        for p in range(context - n, context):
            positions.append(p)
            slot_mapping.append(own[p // slots] * slots + p % slots)
    cu = torch.tensor([0, *q_lens]).cumsum(0).int()
    return AttentionBatch(
        cu.to(DEVICE),
        torch.tensor(context_lens, dtype=torch.int32, device=DEVICE),
        tables.to(DEVICE),
        torch.tensor(slot_mapping, device=DEVICE),
        torch.tensor(positions, device=DEVICE),
        max(q_lens),
        max(context_lens),
    ), sum(blocks)


def make_tensors(batch, num_blocks, heads, groups, dim, slots, dtype):
    """q, k, v and a cache that is NaN wherever no context reaches."""
    num_tokens = int(batch.cu_q_lens[-1])
    q, k, v = (
        torch.randn(num_tokens, n, dim, device=DEVICE).to(dtype) for n in (heads, groups, groups)
    )
    cache = torch.full((num_blocks, 2, groups, slots, dim), float("nan"), device=DEVICE)
    for row, context in enumerate(batch.context_lens.tolist()):
        for p in range(context):
            cache[batch.block_tables[row, p // slots], :, :, p % slots] = torch.randn(
                2, groups, dim, device=DEVICE
            )
    return q, k, v, cache.to(dtype)


def reference(q, k, v, cache, batch, scale, window):
    backend = TorchAttention()
    batch = replace(batch)
    backend.plan(batch)
    return backend.forward(q.float(), k.float(), v.float(), cache.float(), batch, scale, window)


def check(q_lens, context_lens, heads, groups, dim, slots, dtype, window=None):
    torch.manual_seed(0)
    batch, num_blocks = make_batch(q_lens, context_lens, slots=slots)
    q, k, v, cache = make_tensors(batch, num_blocks, heads, groups, dim, slots, dtype)
    want = reference(q, k, v, cache.clone(), batch, dim**-0.5, window)
    backend = TritonAttention()
    backend.plan(batch)
    got = backend.forward(q, k, v, cache, batch, dim**-0.5, window)
    assert relative_error(got, want) < tolerance(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "groups", "dim", "slots"),
    [(4, 2, 64, 16), (3, 1, 80, 8), (2, 2, 96, 24), (4, 1, 128, 64), (2, 1, 256, 32)],
)
def test_mixed_batch_of_chunks_and_single_tokens(heads, groups, dim, slots, dtype):
    check([1, 5, 1, 33, 2], [40, 5, 1, 70, 130], heads, groups, dim, slots, dtype)


@pytest.mark.parametrize("window", [1, 7, 64])
def test_sliding_window(window):
    check([1, 40, 3], [150, 40, 99], 4, 2, 32, 16, torch.float32, window)


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_rows_are_split_and_counters_return_to_zero(dtype):
    torch.manual_seed(1)
    batch, num_blocks = make_batch([1, 1], [700, 300], slots=16)
    q, k, v, cache = make_tensors(batch, num_blocks, 4, 2, 32, 16, dtype)
    want = reference(q, k, v, cache.clone(), batch, 0.2, None)
    backend = TritonAttention()
    for _ in range(2):
        got = backend.forward(q, k, v, cache, batch, 0.2, None)
        assert relative_error(got, want) < tolerance(dtype)
    assert kernels.num_splits(2, 2, 700) > 1
    assert not backend.workspace(4, 32, q.device).counter.any()


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_fused_decode_normalises_rotates_stores_and_attends(qk_norm, splits):
    torch.manual_seed(2)
    contexts, heads, groups, dim, slots = [1, 17, 300], 4, 2, 32, 16
    batch, num_blocks = make_batch([1, 1, 1], contexts, slots=slots)
    q, k, v, cache = make_tensors(batch, num_blocks, heads, groups, dim, slots, torch.float32)
    qkv = torch.cat((q, k, v), 1).contiguous()
    q, k, v = qkv.split((heads, groups, groups), 1)
    norms = tuple(torch.rand(dim, device=DEVICE) + 0.5 for _ in range(2)) if qk_norm else None
    cos_sin = torch.randn(512, dim, device=DEVICE)
    want_cache, got_cache = cache.clone(), cache.clone()
    wq, wk = (
        _norm_rope(x, norms and norms[i], cos_sin, batch.positions) for i, x in enumerate((q, k))
    )
    want = reference(wq, wk, v, want_cache, batch, 0.3, None)
    store = TorchAttention()
    store.plan(batch)
    store.forward(wq, wk, v, want_cache, batch, 0.3, None)
    new = kernels.FusedInputs(k, v, norms, cos_sin, 1e-6)
    workspace = kernels.DecodeWorkspace(heads, dim, q.device)
    got = torch.full_like(want, float("nan"))
    kernels.decode(
        q, got_cache, batch.cu_q_lens, batch.context_lens, batch.block_tables, 0.3, None,
        workspace, splits, got, new=new,
    )  # fmt: skip
    assert relative_error(got, want) < 2e-5
    torch.testing.assert_close(got_cache, want_cache, equal_nan=True, rtol=1e-4, atol=1e-5)


def _norm_rope(x, weight, cos_sin, positions):
    if weight is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, -1)
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def test_padding_rows_write_nothing():
    batch, num_blocks = make_batch([1, 1], [20, 9], slots=16)
    q, k, v, cache = make_tensors(batch, num_blocks, 2, 1, 32, 16, torch.float32)
    padded = replace(
        batch,
        context_lens=batch.context_lens * torch.tensor([1, 0], device=DEVICE, dtype=torch.int32),
        slot_mapping=batch.slot_mapping * torch.tensor([1, 0], device=DEVICE)
        - torch.tensor([0, 1], device=DEVICE),
    )
    before = cache.clone()
    got = TritonAttention().forward(q, k, v, cache, padded, 0.2, None)
    assert not got[0].isnan().any()
    block, slot = divmod(int(batch.slot_mapping[0]), 16)
    before[block, :, :, slot] = cache[block, :, :, slot]
    torch.testing.assert_close(cache, before, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lens", [([1, 1], [150, 40]), ([70, 3], [70, 99])])
def test_cache_of_8_bit_floats(lens, dtype):
    torch.manual_seed(3)
    batch, num_blocks = make_batch(*lens, slots=16)
    q, k, v, cache = make_tensors(batch, num_blocks, 4, 2, 64, 16, torch.float32)
    narrow = cache.to(torch.float8_e4m3fn)
    q = q.to(dtype)
    k, v = (x.to(torch.float8_e4m3fn).to(dtype) for x in (k, v))
    want = reference(q, k, v, narrow.float(), batch, 0.2, None)
    got = TritonAttention().forward(q, k, v, narrow, batch, 0.2, None)
    assert relative_error(got, want) < tolerance(dtype)


def make_narrow(contexts, heads, groups, dim, slots, dtype):
    """Single tokens over a cache of 8-bit floats; k and v are as the cache rounds them."""
    torch.manual_seed(4)
    batch, num_blocks = make_batch([1] * len(contexts), contexts, slots=slots)
    q, k, v, cache = make_tensors(batch, num_blocks, heads, groups, dim, slots, torch.float32)
    k, v = (x.to(torch.float8_e4m3fn).to(dtype) for x in (k, v))
    return batch, q.to(dtype), k, v, cache.to(torch.float8_e4m3fn)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "groups", "dim", "slots", "window"),
    [(4, 2, 64, 16, None), (3, 1, 80, 8, None), (9, 1, 128, 64, 50), (2, 1, 256, 24, None)],
)
def test_single_tokens_over_8_bit_floats(heads, groups, dim, slots, window, dtype):
    batch, q, k, v, cache = make_narrow([150, 1, 70], heads, groups, dim, slots, dtype)
    large = 60000.0 if dtype == torch.bfloat16 else 1.0  # beyond what float16 holds
    q *= large
    scale = dim**-0.5 / large
    want = reference(q, k, v, cache.float(), batch, scale, window)
    got = TritonAttention().forward(q, k, v, cache, batch, scale, window)
    assert relative_error(got, want) < tolerance(dtype)


@pytest.mark.parametrize(("dim", "splits"), [(64, 1), (64, 4), (128, 8)])
def test_fused_decode_over_8_bit_floats(dim, splits):
    heads, groups = 4, 2
    batch, q, k, v, cache = make_narrow([1, 17, 300], heads, groups, dim, 16, torch.float16)
    # Quarter turns: what is stored needs no rounding (Triton 3.6's interpreter rounds wrongly).
    turned = torch.randint(2, (512, dim // 2), device=DEVICE).float()
    cos_sin = torch.cat((turned, 1 - turned), 1)
    wq, wk = (_norm_rope(x.float(), None, cos_sin, batch.positions) for x in (q, k))
    want_cache = cache.float()
    want = reference(wq, wk, v, want_cache, batch, 0.2, None)
    got = torch.full_like(q, float("nan"))
    kernels.decode(
        q, cache, batch.cu_q_lens, batch.context_lens, batch.block_tables, 0.2, None,
        kernels.DecodeWorkspace(heads, dim, q.device), splits, got,
        new=kernels.FusedInputs(k, v, None, cos_sin, 1e-6),
    )  # fmt: skip
    assert relative_error(got, want) < tolerance(torch.float16)
    torch.testing.assert_close(cache.float(), want_cache, equal_nan=True, rtol=0, atol=0)
