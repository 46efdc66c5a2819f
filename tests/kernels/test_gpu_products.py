"""Products with some tens of rows against torch in float64."""

import pytest
import torch
from gpu_device import DEVICE, ON_GPU, relative_error, tolerance

kernels = pytest.importorskip("nanovllm.kernels.gpu.products")

DTYPES = [torch.float32, torch.bfloat16] if ON_GPU else [torch.float32]
ROWS = [5, 33, 100]  # one tile with a rest, a whole tile and a rest, two tiles


def make(m, n, k, dtype, gated=False):
    torch.manual_seed(0)
    x, w, bias, residual = (
        torch.randn(*shape, device=DEVICE).to(dtype)
        for shape in ((m, k), (2 * n if gated else n, k), (n,), (m, n))
    )
    return x, w / k**0.5, bias, residual, torch.full_like(residual, float("nan"))


@pytest.fixture
def workspace():
    workspace = kernels.Workspace(torch.device(DEVICE))
    yield workspace
    assert not workspace.counter.any(), "a counter is not zero after the launch"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize(("n", "k"), [(40, 48), (17, 512)])
def test_product_and_bias(m, n, k, dtype, workspace):
    x, w, bias, _, out = make(m, n, k, dtype)
    want = x.double() @ w.double().T + bias.double()
    for _ in range(2):
        got = kernels.product(x, w, out, workspace, bias=bias)
        assert relative_error(got, want) < tolerance(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", ROWS)
def test_parts_meet_and_the_residual_is_added_in_place(m, dtype, workspace):
    x, w, _, residual, _ = make(m, 48, 1024, dtype)
    assert kernels._tile(m, 48, 1024, dtype.itemsize, False)[3] > 1
    want = x.double() @ w.double().T + residual.double()
    got = kernels.product(x, w, residual, workspace, residual=residual)
    assert got is residual
    assert relative_error(got, want) < tolerance(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize(("n", "k"), [(24, 80), (50, 64)])
def test_gate_and_up_in_one_kernel(m, n, k, dtype, workspace):
    x, w, _, _, out = make(m, n, k, dtype, gated=True)
    gate, up = (x.double() @ w.double().T).chunk(2, -1)
    want = torch.nn.functional.silu(gate) * up
    got = kernels.product(x, w, out, workspace, gated=True)
    assert relative_error(got, want) < tolerance(dtype)


def test_other_rows_do_not_change_a_row_of_the_same_tiling(workspace):
    x, w, _, _, out = make(30, 40, 256, torch.float32)
    whole = kernels.product(x, w, out, workspace).clone()
    x[:29] = 7.0
    assert torch.equal(kernels.product(x, w, out, workspace)[29], whole[29])


def test_weights_whose_rows_cannot_be_cut_are_refused():
    assert kernels.fits(torch.zeros(3, 32))
    assert not kernels.fits(torch.zeros(3, 40))
    assert not kernels.fits(torch.zeros(32, 3).T)
