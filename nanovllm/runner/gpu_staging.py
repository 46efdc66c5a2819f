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

    def send_arrays(self, arrays: Sequence[NDArray[np.generic]]) -> list[Tensor]:
        """Uploads arrays of 4 or 8 bytes an element in one copy; returns their device views.

        The views are overwritten by the next upload, in stream order.
        """
        words = self.begin()
        spans, end = [], 0
        for array in arrays:
            flat = np.ascontiguousarray(array).reshape(-1).view(np.int32)
            words[end : end + len(flat)] = flat
            spans.append((end, end + len(flat)))
            end += len(flat) + len(flat) % 2  # 8-byte elements stay aligned
        self.send(end)
        views = (self.device_words[begin:stop] for begin, stop in spans)
        return [
            view.view(torch.from_numpy(array[:0].reshape(-1)).dtype).view(array.shape)
            for view, array in zip(views, arrays, strict=True)
        ]


class Downloader:
    """Copies int64 results back; `take` waits for exactly that copy."""

    def __init__(self, num_words: int) -> None:
        self._ring = [
            _Slot(torch.empty(num_words, dtype=torch.int64, pin_memory=True), torch.cuda.Event())
            for _ in range(RING)
        ]
        self._next = 0

    def send(self, source: Tensor) -> Download:
        """Starts the copy of a contiguous int64 tensor."""
        slot = self._ring[self._next]
        self._next = (self._next + 1) % RING
        target = slot.host[: source.numel()]
        target.copy_(source.view(-1), non_blocking=True)
        slot.event.record()
        return Download(target, slot.event)


@dataclass(slots=True)
class Download:
    """A copy under way; must be taken before RING more are sent."""

    host: Tensor
    event: torch.cuda.Event

    def take(self) -> list[int]:
        self.event.synchronize()
        return self.host.tolist()
