"""Triton row kernels against the plain torch operators."""

import pytest
import torch
from gpu_device import DEVICE, relative_error, tolerance

from nanovllm.attention.torch_ref import store_kv
from nanovllm.layers.ops import TorchOps

kernels = pytest.importorskip("nanovllm.kernels.gpu.rowwise")

OPS = TorchOps()
DTYPES = [torch.float32, torch.bfloat16]


def randn(*shape, dtype):
    return torch.randn(*shape, device=DEVICE).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [32, 80, 1000])
def test_norm(size, dtype):
    torch.manual_seed(0)
    x = randn(3, 2 * size, dtype=dtype)[:, :size]  # strided rows
    weight = randn(size, dtype=dtype)
    want = OPS.rms_norm(x.float(), weight.float(), 1e-6)
    assert relative_error(kernels.rms_norm(x, weight, 1e-6), want) < tolerance(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [24, 1100])
def test_silu_mul(size, dtype):
    torch.manual_seed(0)
    x = randn(3, 2 * size, dtype=dtype)
    assert relative_error(kernels.silu_mul(x), OPS.silu_mul(x.float())) < tolerance(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "groups", "dim"), [(4, 2, 64), (3, 1, 80), (2, 2, 96)])
def test_rope(heads, groups, dim, dtype):
    torch.manual_seed(0)
    q, k = randn(5, heads, dim, dtype=dtype), randn(5, groups, dim, dtype=dtype)
    cos_sin, positions = randn(9, dim, dtype=torch.float32), torch.tensor([0, 8, 3, 3, 1])
    positions = positions.to(DEVICE)
    want_q, want_k = q.float(), k.float()
    OPS.rope(want_q, want_k, cos_sin, positions)
    kernels.rope(q, k, cos_sin, positions)
    assert relative_error(q, want_q) < tolerance(dtype)
    assert relative_error(k, want_k) < tolerance(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 96])
def test_embedding_ready_for_a_norm(size, dtype):
    torch.manual_seed(0)
    table, norm = randn(10, size, dtype=dtype), randn(size, dtype=dtype)
    ids = torch.tensor([3, 9, 0, 3], device=DEVICE)
    rows, scaled, squares = kernels.embed(ids, table, norm)
    assert torch.equal(rows, table[ids])
    assert relative_error(scaled, table[ids].float() * norm.float()) < tolerance(dtype)
    assert squares.shape == (1, 4)
    assert relative_error(squares[0], table[ids].float().square().sum(-1)) < 1e-5


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize(("heads", "groups", "dim"), [(4, 2, 64), (3, 1, 80)])
def test_rope_store(heads, groups, dim, qk_norm):
    torch.manual_seed(0)
    qkv = randn(4, heads + 2 * groups, dim, dtype=torch.float32)
    q, k, v = qkv.clone().split((heads, groups, groups), 1)
    norms = tuple(randn(dim, dtype=torch.float32) for _ in range(2)) if qk_norm else None
    cos_sin, positions = randn(9, dim, dtype=torch.float32), torch.tensor([0, 8, 3, 3])
    slots = torch.tensor([5, 17, -1, 0]).to(DEVICE)
    cache = torch.full((3, 2, groups, 8, dim), float("nan"), device=DEVICE)
    want_cache = cache.clone()
    want_q, want_k = (x.contiguous() for x in (q, k))
    if norms:
        want_q, want_k = (
            OPS.rms_norm(x, w, 1e-6) for x, w in zip((want_q, want_k), norms, strict=True)
        )
    OPS.rope(want_q, want_k, cos_sin, positions.to(DEVICE))
    real = slots >= 0
    store_kv(want_k[real], v[real], want_cache, slots[real])
    kernels.rope_store(q, k, v, norms, 1e-6, cos_sin, positions.to(DEVICE), cache, slots)
    assert relative_error(q, want_q) < 2e-5
    torch.testing.assert_close(cache, want_cache, equal_nan=True, rtol=1e-4, atol=1e-5)
