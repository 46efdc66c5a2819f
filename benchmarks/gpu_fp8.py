"""Fused decode attention over a cache of 8-bit floats, tile by tile, beside bfloat16's own tile.

    python benchmarks/gpu_fp8.py [--rows 256,128,64,32,8] [--seconds 85]

Each variant is first compared with float32 over what the cache holds then. Times are of CUDA graph
replay over layers that do not fit the L2 cache, rows longest first; bytes are those of keys and
values. Sorted: the best tile of a case comes last.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import replace

import torch
from gpu_kernels import BF16, CUDA, fake_batch, graph_time, tried

from nanovllm.kernels.gpu import attention

DIM, SLOTS, MEAN = 128, 64, 900
HEADS = ((16, 8), (32, 8))
WRONG = 1.5e-2  # relative error; the tolerance of the tests
TILES = (  # keys, warps, stages; of the stages, (stages - 2) / 2 hold keys
    (32, 1, 6), (32, 1, 8), (32, 1, 12), (32, 2, 6), (32, 2, 8), (64, 1, 6), (64, 2, 4), (64, 2, 6),
    (64, 2, 8), (64, 4, 4), (64, 4, 6), (64, 4, 8), (128, 4, 6),
)  # fmt: skip


class Case:
    """Inputs of one step of `rows` single tokens over `layers` caches."""

    def __init__(self, heads: int, groups: int, rows: int, layers: int, kind: torch.dtype) -> None:
        torch.manual_seed(0)
        num_blocks = rows * -(-MEAN * 3 // 2 // SLOTS) + 8
        batch, self.keys = fake_batch(rows, SLOTS, MEAN, num_blocks)
        longest_first = batch.context_lens.sort(descending=True).values
        self.batch = replace(batch, context_lens=longest_first)
        shape = (num_blocks, 2, groups, SLOTS, DIM)
        self.caches = [torch.randn(shape, dtype=BF16, device=CUDA).to(kind) for _ in range(layers)]
        qkv = torch.randn(rows, heads + 2 * groups, DIM, dtype=BF16, device=CUDA)
        self.q, k, v = qkv.split((heads, groups, groups), 1)
        self.norms = (torch.rand(DIM, device=CUDA) + 0.5).to(BF16), torch.ones_like(qkv[0, 0])
        angles = torch.rand(MEAN * 2, DIM // 2, device=CUDA) * 6
        self.cos_sin = torch.cat((angles.cos(), angles.sin()), 1)
        self.new = attention.FusedInputs(k, v, self.norms, self.cos_sin, 1e-6)
        self.out = torch.empty(rows, heads, DIM, dtype=BF16, device=CUDA)
        self.workspace = attention.DecodeWorkspace(heads, DIM, CUDA)
        self.bytes = self.keys * groups * DIM * 2 * self.caches[0].element_size()

    def run(self, tile: tuple[int, int, int] | None, splits: int) -> None:
        b = self.batch
        for cache in self.caches:
            attention.decode(
                self.q, cache, b.cu_q_lens, b.context_lens, b.block_tables, DIM**-0.5, None,
                self.workspace, splits, self.out, new=self.new, tile=tile,
            )  # fmt: skip

    def error(self) -> float:
        """Of `out`, against float32 over the last cache, new keys and values included."""
        q = self.q.float()
        q = (q * torch.rsqrt(q.square().mean(-1, keepdim=True) + 1e-6)).to(BF16)
        q = (q * self.norms[0]).float()  # rounded where the kernel rounds
        wanted = torch.empty_like(q)
        for row, context in enumerate(self.batch.context_lens.tolist()):
            cos, sin = self.cos_sin[context - 1].chunk(2)
            x, y = q[row].chunk(2, -1)
            one = torch.cat((x * cos - y * sin, y * cos + x * sin), -1).to(BF16).float()
            blocks = self.caches[-1][self.batch.block_tables[row].long()].float()
            keys, values = blocks.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :context]
            one = one.view(len(keys), -1, DIM)
            wanted[row] = ((one @ keys.mT * DIM**-0.5).softmax(-1) @ values).flatten(0, 1)
        return float((self.out.float() - wanted).norm() / wanted.norm())


def splits_of(rows: int, groups: int) -> list[int]:
    """The default and its neighbours."""
    own = attention.num_splits(rows, groups, MEAN * 3 // 2)
    return [s for s in (own, own * 2, own // 2) if 1 <= s <= (16 if rows <= 32 else 2)]


def variants(rows: int, groups: int) -> Iterator[tuple]:
    """(kind, tile, splits): bfloat16's own, then every tile, and some with other splits."""
    own, *others = splits_of(rows, groups)
    yield BF16, None, own
    for tile in (None, *TILES):
        yield torch.float8_e4m3fn, tile, own
    for tile, splits in itertools.product(((32, 1, 8), (64, 2, 6), (64, 4, 6)), others):
        yield torch.float8_e4m3fn, tile, splits


def compile_and_check(job: tuple[int, int, int, torch.dtype, tuple | None, int]) -> tuple:
    """In a process of its own, so that compiling uses every core; the result stays on disk."""
    heads, groups, rows, kind, tile, splits = job
    case = Case(heads, groups, min(rows, 8), 1, kind)
    try:
        case.run(tile, splits)
        return job, case.error()
    except Exception as error:
        return job, f"{type(error).__name__}: {str(error)[:80]}"


def check_all(rows: list[int], deadline: float) -> dict[tuple, object]:
    jobs = {}
    for (heads, groups), r in itertools.product(HEADS, rows):
        for kind, tile, splits in variants(r, groups):
            jobs[heads, kind, tile, splits] = (heads, groups, r, kind, tile, splits)
    found: dict[tuple, object] = {}
    with multiprocessing.get_context("spawn").Pool(12) as pool:
        results = pool.imap_unordered(compile_and_check, jobs.values())
        while len(found) < len(jobs):
            try:
                job, error = results.next(timeout=max(1.0, deadline - time.time()))
            except multiprocessing.TimeoutError:
                break  # the rest stays unmeasured
            found[job[0], *job[3:]] = error
    for what, error in found.items():
        if not isinstance(error, float) or not error < WRONG:
            print("WRONG", what, error)
    errors = [e for e in found.values() if isinstance(e, float)]
    print(f"{len(found)} of {len(jobs)} variants, errors {min(errors, default=0):.1e}", end=" ")
    print(f"to {max(errors, default=0):.1e}", flush=True)
    return found


def measure(heads: int, groups: int, rows: int, checked: dict[tuple, object]) -> None:
    layers = max(4, min(28, 1000 // rows))
    table = []
    for kind, chosen in itertools.groupby(variants(rows, groups), key=lambda v: v[0]):
        case = Case(heads, groups, rows, layers, kind)
        for _, tile, splits in chosen:
            error = checked.get((heads, kind, tile, splits))
            if not isinstance(error, float) or not error < WRONG:
                continue
            micros = tried(graph_time, lambda c=case, t=tile, s=splits: c.run(t, s), layers)
            if micros:
                table.append((micros, str(kind)[6:], tile or "default", splits, case.bytes, error))
        del case
    print(f"\n{rows} rows, {heads}/{groups} heads")
    for micros, kind, tile, splits, num_bytes, error in sorted(table, key=lambda t: -t[0]):
        print(f"  {micros:8.2f} us {num_bytes / micros / 1e6:5.2f} TB/s  {kind:14s} {tile!s:12s} "
              f"splits={splits:<2d} error={error:.1e}", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="256,128,64,32,8")
    parser.add_argument("--seconds", type=float, default=85.0)
    args = parser.parse_args()
    rows = [int(r) for r in args.rows.split(",")]
    deadline = time.time() + args.seconds
    checked = check_all(rows, deadline - args.seconds / 2)
    for r, (heads, groups) in itertools.product(rows, HEADS):
        if time.time() < deadline:
            try:
                measure(heads, groups, r, checked)
            except Exception as error:
                print(f"{r} rows, {heads}/{groups} heads: {type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
