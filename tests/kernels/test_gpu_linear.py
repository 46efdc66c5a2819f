"""Fused products with few rows against torch in float64."""

import pytest
import torch
from gpu_device import DEVICE, ON_GPU, relative_error, tolerance

kernels = pytest.importorskip("nanovllm.kernels.gpu.linear")

DTYPES = [torch.float32, torch.bfloat16] if ON_GPU else [torch.float32]


def make(m, n, k, dtype, gated=False):
    torch.manual_seed(0)
    x, w, norm, bias, residual = (
        torch.randn(*shape, device=DEVICE).to(dtype)
        for shape in ((m, k), (2 * n if gated else n, k), (k,), (n,), (m, n))
    )
    return x, w / k**0.5, norm, bias, residual, torch.full_like(residual, float("nan"))


def normed(x, norm):
    x = x.double()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * norm.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 3, 5])
@pytest.mark.parametrize(("n", "k"), [(40, 64), (17, 200)])
def test_norm_product_bias(m, n, k, dtype):
    x, w, norm, bias, _, out = make(m, n, k, dtype)
    want = normed(x, norm) @ w.double().T + bias.double()
    got = kernels.linear(x, w, out, norm=norm, eps=1e-6, bias=bias)
    assert relative_error(got, want) < tolerance(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 4])
def test_residual_is_added_in_place(m, dtype):
    x, w, _, _, residual, _ = make(m, 48, 96, dtype)
    want = x.double() @ w.double().T + residual.double()
    got = kernels.linear(x, w, residual, residual=residual)
    assert got is residual
    assert relative_error(got, want) < tolerance(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 2])
def test_gate_and_up_in_one_kernel(m, dtype):
    x, w, norm, _, _, out = make(m, 24, 80, dtype, gated=True)
    gate, up = (normed(x, norm) @ w.double().T).chunk(2, -1)
    want = torch.nn.functional.silu(gate) * up
    got = kernels.linear(x, w, out, norm=norm, eps=1e-6, gated=True)
    assert relative_error(got, want) < tolerance(dtype)
