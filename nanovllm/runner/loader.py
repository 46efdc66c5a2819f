"""Fills a decoder's parameters from safetensors files, strictly: nothing missing, nothing left.

Tensors are read one parameter at a time and handed over in their final form, so the peak is the
weights plus one parameter. Files are reopened now and then: a memory map counts every page that
was read for as long as it is open.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanovllm.errors import WeightsError
from nanovllm.models.decoder import Decoder, Parameter

# Tensors that some exporters add and that carry no information of their own.
IGNORED_SUFFIXES = ("rotary_emb.inv_freq", "attention.bias", "attn.masked_bias")
REOPEN_AFTER_BYTES = 64 << 20
MAX_NAMES = 20


def load_weights(model: Decoder, directory: Path, dtype: torch.dtype, device: torch.device) -> None:
    """Reads every parameter of model from directory.

    Raises WeightsError listing the names that are missing, unexpected or wrong-shaped, or the
    file that is truncated.
    """
    with _Checkpoint(directory) as checkpoint:
        parameters = list(model.parameters())
        _check_names(parameters, checkpoint, model.config.tie_word_embeddings)
        for parameter in parameters:
            model.set_parameter(parameter, _assemble(parameter, checkpoint, dtype, device))


def _assemble(
    parameter: Parameter, checkpoint: _Checkpoint, dtype: torch.dtype, device: torch.device
) -> Tensor:
    out = torch.empty(parameter.shape, dtype=dtype, device=device)
    row = 0
    for name, shape in parameter.pieces:
        out[row : row + shape[0]].copy_(checkpoint.read(name))
        row += shape[0]
    return out


def _check_names(parameters: Iterable[Parameter], checkpoint: _Checkpoint, tied: bool) -> None:
    expected = {name: shape for p in parameters for name, shape in p.pieces}
    found = checkpoint.shapes
    ignored = {name for name in found if name.endswith(IGNORED_SUFFIXES)}
    if tied:
        ignored.add("lm_head.weight")
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected and name not in ignored]
    wrong = [
        f"{name} is {list(found[name])}, not {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    problems = (("missing", missing), ("unexpected", unexpected), ("wrong shape", wrong))
    lines = [f"{what}: {_listed(names)}" for what, names in problems if names]
    if lines:
        where = checkpoint.directory
        raise WeightsError(f"the weights in {where} do not fit config.json; " + "; ".join(lines))


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more


class _Checkpoint:
    """The safetensors files of a directory, read by tensor name."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in _safetensors_files(directory):
            for name, shape in _shapes(path):
                self._files[name] = path
                self.shapes[name] = shape
        self._open_path: Path | None = None
        self._open: safe_open | None = None
        self._read_bytes = 0

    def __enter__(self) -> _Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self._open = None

    def read(self, name: str) -> Tensor:
        path = self._files[name]
        if path != self._open_path or self._read_bytes > REOPEN_AFTER_BYTES:
            self._open = None  # unmaps the last file
            self._open = safe_open(path, framework="pt", device="cpu")
            self._open_path, self._read_bytes = path, 0
        assert self._open is not None
        tensor: Tensor = self._open.get_tensor(name)
        self._read_bytes += tensor.nbytes
        return tensor


def _safetensors_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise WeightsError(f"{index} is not a weight index: {error}") from None
        absent = [name for name in names if not (directory / name).exists()]
        if absent:
            raise WeightsError(f"{index} names files that are not there: {_listed(absent)}")
        return [directory / name for name in names]
    whole = directory / "model.safetensors"
    files = [whole] if whole.exists() else sorted(directory.glob("*.safetensors"))
    if not files:
        raise WeightsError(f"no .safetensors file in {directory}")
    return files


def _shapes(path: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in file.keys():  # noqa: SIM118 - a safetensors handle, not a dict
                yield name, tuple(file.get_slice(name).get_shape())
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} cannot be read (truncated or damaged?): {error}") from None


def fill_dummy_weights(model: Decoder, dtype: torch.dtype, device: torch.device, seed: int) -> None:
    """Random weights of deviation 0.02 and norms of one: the shapes of a model without its file."""
    generator = torch.Generator().manual_seed(seed)
    pool = (torch.randn(1 << 20, generator=generator) * 0.02).to(dtype).to(device)
    repeat = _Repeater(pool)
    for parameter in model.parameters():
        if len(parameter.shape) == 1 and not parameter.field.endswith("_bias"):
            tensor = torch.ones(parameter.shape, dtype=dtype, device=device)
        else:
            tensor = repeat(parameter.shape)
        model.set_parameter(parameter, tensor)


class _Repeater:
    """Tensors of any shape from one pool of numbers, each starting elsewhere in it."""

    def __init__(self, pool: Tensor) -> None:
        self._pool = pool
        self._offset = 0

    def __call__(self, shape: tuple[int, ...]) -> Tensor:
        size = math.prod(shape)
        self._offset = (self._offset + 7919) % len(self._pool)
        pool = self._pool.roll(self._offset)
        repeats = -(-size // len(pool))
        return pool.repeat(repeats)[:size].view(shape).contiguous()
