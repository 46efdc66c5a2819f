"""Trains both models together: the same batches, the small one also on the large one's logits.

The schedule follows the wall clock, so a run always ends in time with its learning rate at zero.
Distillation: Hinton et al. 2015.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tools.demo_model.model import Qwen3, Shape, Steps
from tools.demo_model.shards import MAX_DOCUMENT, Batch, batches

WARMUP_STEPS = 200
DECAY_FROM = 0.4  # share of the time after which the learning rate falls to zero


@dataclass(frozen=True)
class Plan:
    seconds: float
    tokens: int = 65_536  # per step
    seed: int = 0
    rates: tuple[float, float] = (2.0e-3, 4.0e-3)  # demo, draft


def _prefetch(source: Iterator[Batch], device: str, depth: int = 8) -> Iterator[list[Tensor]]:
    """Batches as tensors on the device, packed by a thread."""
    waiting: queue.Queue[list[Tensor]] = queue.Queue(depth)

    def fill() -> None:
        for batch in source:
            tensors = [torch.from_numpy(array) for array in batch]
            waiting.put([t.pin_memory() for t in tensors] if device == "cuda" else tensors)

    threading.Thread(target=fill, daemon=True).start()
    while True:
        yield [t.to(device, non_blocking=True) for t in waiting.get()]


def _optimizer(model: Qwen3, rate: float, fused: bool) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=fused)


class Trainer:
    """Owns both models, their optimizers and the schedule."""

    def __init__(self, shapes: tuple[Shape, Shape], plan: Plan, device: str) -> None:
        torch.manual_seed(plan.seed)
        self.plan, self.device = plan, device
        self.demo, self.draft = (Qwen3(shape).to(device) for shape in shapes)
        models = zip((self.demo, self.draft), plan.rates, strict=True)
        self.optimizers = [_optimizer(m, rate, device == "cuda") for m, rate in models]
        self.steps = Steps(compiled=device == "cuda")

    def _set_rates(self, step: int, progress: float) -> None:
        factor = min(1.0, step / WARMUP_STEPS, (1 - progress) / (1 - DECAY_FROM))
        for optimizer, rate in zip(self.optimizers, self.plan.rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * max(factor, 0.0)

    def _losses(self, batch: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        ids, positions, labels, cu_lens = batch
        chosen = labels >= 0
        wanted = labels[chosen]
        hidden = self.demo(ids, positions, cu_lens, MAX_DOCUMENT, self.steps)
        teacher = self.demo.logits(hidden[chosen])
        demo_loss = F.cross_entropy(teacher, wanted)
        hidden = self.draft(ids, positions, cu_lens, MAX_DOCUMENT, self.steps)
        student = self.draft.logits(hidden[chosen])
        target = teacher.detach().softmax(-1)
        draft_loss = F.cross_entropy(student, target) + 0.2 * F.cross_entropy(student, wanted)
        agree = (student.argmax(-1) == teacher.argmax(-1)).float().mean()
        return demo_loss, draft_loss, agree.detach()

    def step(self, batch: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """One update of both models; losses and agreement, still on the device."""
        demo_loss, draft_loss, agree = self._losses(batch)
        (demo_loss + draft_loss).backward()
        for model, optimizer in zip((self.demo, self.draft), self.optimizers, strict=True):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return demo_loss.detach(), draft_loss.detach(), agree

    def _first_step(self, batch: list[Tensor]) -> None:
        """Compiles; where that fails, goes on without."""
        self._set_rates(0, 0.0)
        try:
            self.step(batch)
        except Exception as error:
            if self.device != "cuda":
                raise
            print(f"compilation failed, training uncompiled: {error!r}"[:2000], flush=True)
            self.steps = Steps(compiled=False)
            for optimizer in self.optimizers:
                optimizer.zero_grad(set_to_none=True)

    def run(self, shards: Path, checkpoint: Callable[[float], None]) -> dict[str, float]:
        """Trains for the planned seconds, calling `checkpoint` at the half."""
        source = _prefetch(batches(shards, self.plan.tokens, self.plan.seed), self.device)
        self._first_step(next(source))
        start, step, saved, progress = time.perf_counter(), 0, False, 0.0
        while progress < 1.0:
            step += 1
            self._set_rates(step, progress)
            values = self.step(next(source))
            if step % 20 == 0:
                numbers = [round(float(v), 4) for v in values]  # waits for the device
            progress = (time.perf_counter() - start) / self.plan.seconds
            if step % 200 == 0:
                rate = step * self.plan.tokens / (time.perf_counter() - start)
                seen = len(list(shards.glob("*.npz")))
                print(f"{progress:.2f} step {step} demo, draft, agree {numbers} "
                      f"{rate / 1e6:.2f} Mtok/s shards {seen}", flush=True)  # fmt: skip
            if progress > 0.5 and not saved:
                checkpoint(progress)
                saved = True
        return {
            "steps": step,
            "tokens": step * self.plan.tokens,
            "seconds": round(time.perf_counter() - start, 1),
        }
