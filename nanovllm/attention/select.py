"""Chooses the attention backend: the first that can run, with the others' reasons in words."""

from __future__ import annotations

from nanovllm.attention.base import AttentionBackend, AttentionSpec
from nanovllm.attention.cpu import CpuAttention
from nanovllm.attention.torch_ref import TorchAttention
from nanovllm.attention.triton import TritonAttention
from nanovllm.errors import ConfigError

# Fastest first; each says itself on which devices it runs.
BACKENDS: tuple[type[AttentionBackend], ...] = (TritonAttention, CpuAttention, TorchAttention)


def select_backend(spec: AttentionSpec, name: str = "auto") -> tuple[AttentionBackend, list[str]]:
    """(backend, why each faster one was passed over).

    Raises ConfigError if `name` is unknown or cannot run here.
    """
    known = [backend.name for backend in BACKENDS]
    if name != "auto" and name not in known:
        raise ConfigError(f"attention_backend must be auto or one of {known}, got {name!r}")
    reasons: list[str] = []
    for backend in BACKENDS:
        if name not in ("auto", backend.name):
            continue
        reason = backend.unsupported(spec)
        if reason is None:
            return backend(), reasons
        if name == backend.name:
            raise ConfigError(f"attention_backend={name!r} cannot run here: {reason}")
        reasons.append(f"{backend.name}: {reason}")
    raise AssertionError("the torch backend runs everywhere")
