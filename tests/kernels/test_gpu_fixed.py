"""Kernels of the batch-invariant mode: right, and on a GPU the same bits in every arrangement."""

from dataclasses import replace

import pytest
import torch
from gpu_device import DEVICE, ON_GPU, relative_error, tolerance
from test_gpu_attention import make_batch, make_tensors, reference

linears = pytest.importorskip("nanovllm.kernels.gpu.fixed_linear")
from nanovllm.kernels.gpu import fixed_attention as attention  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16] if ON_GPU else [torch.float32]
only_gpu = pytest.mark.skipif(not ON_GPU, reason="the interpreter's products may round otherwise")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 40, 64), (70, 33, 200), (5, 64, 128)])
def test_product_bias_residual(m, n, k, dtype):
    torch.manual_seed(0)
    x, w, bias, residual = (
        torch.randn(*shape, device=DEVICE).to(dtype) for shape in ((m, k), (n, k), (n,), (m, n))
    )
    want = x.double() @ w.double().T + bias.double()
    assert relative_error(linears.linear(x, w, bias=bias), want) < tolerance(dtype)
    want += residual.double()
    got = linears.linear(x, w, bias=bias, residual=residual, out=residual)
    assert got is residual
    assert relative_error(got, want) < tolerance(dtype)


@only_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "k"), [(1024, 1024), (4096, 1024), (1000, 3072), (48, 200)])
def test_a_row_has_the_same_bits_whatever_shares_its_product(n, k, dtype):
    torch.manual_seed(0)
    x = torch.randn(600, k, device=DEVICE).to(dtype)
    w = torch.randn(n, k, device=DEVICE).to(dtype)
    whole = linears.linear(x, w)
    for begin, end in ((0, 1), (7, 9), (100, 164), (30, 95), (200, 400), (64, 577)):
        assert torch.equal(linears.linear(x[begin:end], w), whole[begin:end])


def attend(q, cache, batch, *, single, window=None, chunk=attention.MIN_CHUNK):
    out = torch.full(q.shape, float("nan"), dtype=q.dtype, device=q.device)
    groups, dim = cache.shape[2], cache.shape[4]
    workspace = attention.FixedWorkspace(q.shape[1], groups, dim, q.device)
    attention.attend(
        q, cache, batch.cu_q_lens, batch.context_lens, batch.block_tables, dim**-0.5, window,
        workspace, out, single=single, chunk=chunk,
        num_chunks=-(-int(batch.context_lens.max()) // chunk),
    )  # fmt: skip
    return out


def stored(q, k, v, cache, batch):
    """The specification's output, after which the cache holds the step's keys and values."""
    want = reference(q, k, v, cache.clone(), batch, q.shape[2] ** -0.5, None)
    slots, size = batch.slot_mapping, cache.shape[3]
    cache[slots // size, 0, :, slots % size] = k
    cache[slots // size, 1, :, slots % size] = v
    return want


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "groups", "dim", "slots"), [(4, 2, 64, 16), (3, 1, 80, 8), (2, 2, 128, 64)]
)
def test_attention_of_chunks_and_single_tokens(heads, groups, dim, slots, dtype):
    torch.manual_seed(0)
    for q_lens, contexts in (([1, 5, 1, 33], [140, 5, 1, 70]), ([1, 1, 1], [130, 1, 64])):
        batch, blocks = make_batch(q_lens, contexts, slots=slots)
        q, k, v, cache = make_tensors(batch, blocks, heads, groups, dim, slots, dtype)
        want = stored(q, k, v, cache, batch)
        single = batch.max_q_len == 1
        assert relative_error(attend(q, cache, batch, single=single, chunk=64), want) < tolerance(
            dtype
        )


@pytest.mark.parametrize("window", [1, 7, 64])
def test_sliding_window(window):
    torch.manual_seed(0)
    batch, blocks = make_batch([1, 40, 3], [150, 40, 99], slots=16)
    q, k, v, cache = make_tensors(batch, blocks, 4, 2, 32, 16, torch.float32)
    want = reference(q, k, v, cache.clone(), batch, 32**-0.5, window)
    stored(q, k, v, cache, batch)
    got = attend(q, cache, batch, single=False, window=window, chunk=64)
    assert relative_error(got, want) < 2e-5


@only_gpu
@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "groups", "dim"), [(16, 8, 128), (8, 1, 64), (4, 2, 256)])
def test_a_query_has_the_same_bits_alone_in_a_chunk_and_in_a_batch(
    heads, groups, dim, dtype, window
):
    torch.manual_seed(0)
    contexts = [1300, 2000, 511, 513]
    q_lens = [900, 70, 1, 512]
    batch, blocks = make_batch(q_lens, contexts, slots=16)
    q, k, v, cache = make_tensors(batch, blocks, heads, groups, dim, 16, dtype)
    stored(q, k, v, cache, batch)
    together = attend(q, cache, batch, single=False, window=window)
    cu = batch.cu_q_lens.tolist()
    for token, row, context in ((0, 0, 401), (899, 0, 1300), (969, 1, 2000), (970, 2, 511)):
        assert cu[row] <= token < cu[row + 1]
        alone = replace(
            batch,
            cu_q_lens=torch.tensor([0, 1], dtype=torch.int32, device=DEVICE),
            context_lens=torch.tensor([context], dtype=torch.int32, device=DEVICE),
            block_tables=batch.block_tables[row : row + 1],
            max_q_len=1,
        )
        for single in (True, False):
            got = attend(q[token : token + 1], cache, alone, single=single, window=window)
            assert torch.equal(got[0], together[token])
