"""Which kernels multiply how many rows, without a GPU."""

from dataclasses import replace

import pytest
import torch

from nanovllm.bench.shapes import find_shape
from nanovllm.kernels.cuda import few
from nanovllm.models import registry

choices = pytest.importorskip("nanovllm.runner.product_choice", exc_type=ImportError)
linear = choices.linear.linear

DEVICE = torch.device("cuda", 0)
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    monkeypatch.setattr(choices, "available", lambda device: None)


def choose(shape, dtype=BF16, **changes):
    config = replace(registry.read_config(find_shape(shape)), **changes)
    return choices.ProductChoice.of(config, dtype, DEVICE)


def ways(choice, rows):
    return [(choice.few(n), choice.some(n)) for n in rows]


def test_small_models():
    choice = choose("qwen3-0.6b")
    assert ways(choice, [1, 8, 9, 160, 161]) == [
        (few.product, False), (few.product, False), (None, True), (None, True), (None, False),
    ]  # fmt: skip


def test_large_models():
    choice = choose("qwen3-8b")
    assert ways(choice, [1, 2, 32, 33]) == [
        (linear, False), (None, True), (None, True), (None, False)
    ]  # fmt: skip


def test_shapes_whose_copies_are_short():
    """A K of 1536 is read by 768 features at a time: too few for `few`."""
    choice = choose("smollm-135m")
    assert ways(choice, [1, 2, 8]) == [(linear, False), (None, True), (None, True)]


@pytest.mark.parametrize(
    ("dtype", "changes"), [(torch.float16, {}), (torch.float32, {}), (BF16, {"vocab_size": 1001})]
)
def test_what_cuda_kernels_cannot_multiply(dtype, changes):
    choice = choose("qwen3-0.6b", dtype, **changes)
    assert ways(choice, [1, 4, 5, 64]) == [
        (linear, False), (linear, False), (None, False), (None, False)
    ]  # fmt: skip


def test_other_devices(monkeypatch):
    monkeypatch.setattr(choices, "available", lambda device: "another GPU")
    assert ways(choose("qwen3-0.6b"), [4, 5]) == [(linear, False), (None, False)]


def test_a_bias_before_the_activation():
    assert ways(choose("qwen3-0.6b", mlp_bias=True), [1, 16]) == [(None, False), (None, False)]
