"""Where the Triton tests run: on the GPU if there is one, else in Triton's interpreter."""

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="the package triton is not installed")
ON_GPU = DEVICE == "cuda"


def tolerance(dtype: torch.dtype) -> float:
    """Largest relative error (Frobenius norm) that rounding explains."""
    return {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 1.5e-2}[dtype]


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    found, wanted = found.double().cpu(), wanted.double().cpu()
    assert found.shape == wanted.shape
    return float((found - wanted).norm() / wanted.norm())


def _let_interpreter_use_new_numpy() -> None:
    """Triton 3.6's interpreter calls int() on arrays of one element; numpy 2.4 refuses that."""
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched


if not ON_GPU:
    _let_interpreter_use_new_numpy()
