"""Page-locked memory between host and GPU: one upload and one download a step.

A ring of buffers, each free again once the GPU has passed its event, so that a step can be packed
while the last ones still wait for their copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

RING = 4  # steps in flight, and one to spare


@dataclass(slots=True)
class _Slot:
    host: Tensor
    event: torch.cuda.Event
    in_use: bool = False


class Uploader:
    """Copies int32 words to one device buffer, whose views then belong to the step."""

    def __init__(self, num_words: int, device: torch.device) -> None:
        self.device_words = torch.empty(num_words, dtype=torch.int32, device=device)
        self._ring = [
            _Slot(torch.empty(num_words, dtype=torch.int32, pin_memory=True), torch.cuda.Event())
            for _ in range(RING)
        ]
        self._views = [slot.host.numpy() for slot in self._ring]
        self._next = 0

    def begin(self) -> NDArray[np.int32]:
        """The words to fill before `send`."""
        self._ring[self._next].event.synchronize()
        return self._views[self._next]

    def send(self, num_words: int) -> None:
        """Copies the first words of what `begin` returned, in stream order."""
        slot = self._ring[self._next]
        self.device_words[:num_words].copy_(slot.host[:num_words], non_blocking=True)
        slot.event.record()
        self._next = (self._next + 1) % RING


def upload(arrays: Sequence[NDArray[np.generic]], device: torch.device) -> list[Tensor]:
    """Copies arrays of 4 or 8 bytes an element at once, without a wait; returns device views."""
    spans = _spans(arrays)
    pinned = device.type == "cuda"
    host = torch.empty(spans[-1][1], dtype=torch.int32, pin_memory=pinned)
    _pack(arrays, spans, host.numpy())
    return _views(arrays, spans, host.to(device, non_blocking=True))


def _spans(arrays: Sequence[NDArray[np.generic]]) -> list[tuple[int, int]]:
    """Where each array's words begin and end; 8-byte elements are aligned."""
    spans, end = [], 0
    for array in arrays:
        begin = end + end % 2
        end = begin + array.nbytes // 4
        spans.append((begin, end))
    return spans


def _pack(
    arrays: Sequence[NDArray[np.generic]], spans: list[tuple[int, int]], words: NDArray[np.int32]
) -> None:
    for array, (begin, end) in zip(arrays, spans, strict=True):
        words[begin:end] = np.ascontiguousarray(array).reshape(-1).view(np.int32)


def _views(
    arrays: Sequence[NDArray[np.generic]], spans: list[tuple[int, int]], words: Tensor
) -> list[Tensor]:
    return [
        words[begin:end].view(torch.from_numpy(array[:0].reshape(-1)).dtype).view(array.shape)
        for array, (begin, end) in zip(arrays, spans, strict=True)
    ]


class Downloader:
    """Copies int64 results back; `take` waits for exactly that copy."""

    def __init__(self, num_words: int) -> None:
        self._num_words = num_words
        self._ring = [self._new() for _ in range(RING)]
        self._next = 0

    def _new(self) -> _Slot:
        host = torch.empty(self._num_words, dtype=torch.int64, pin_memory=True)
        return _Slot(host, torch.cuda.Event())

    def send(self, source: Tensor) -> Download:
        """Starts the copy of a contiguous int64 tensor."""
        slot = self._ring[self._next]
        if slot.in_use:  # not taken yet: that copy keeps its memory
            slot = self._ring[self._next] = self._new()
        self._next = (self._next + 1) % RING
        slot.in_use = True
        slot.host[: source.numel()].copy_(source.view(-1), non_blocking=True)
        slot.event.record()
        return Download(slot, source.numel())


@dataclass(slots=True)
class Download:
    """A copy under way. `take` may be called again, after an interrupt."""

    slot: _Slot
    num_words: int
    words: list[int] | None = None

    def take(self) -> list[int]:
        if self.words is None:
            self.slot.event.synchronize()
            self.words = self.slot.host[: self.num_words].tolist()
            self.slot.in_use = False
        return self.words
