"""Checks and times the CUDA C++ products in the chain of a layer, attention left out.

    python benchmarks/gpu_products.py [check] [chain] [tune] [--rows 1 8 32 128] [--json FILE]

`chain` compares ways to compute a layer's four products with the norms, sums and activation around
them; `tune` tries tiles of `many` one product after the other, in that chain. Times are
microseconds a layer by CUDA graph replay over weights that the L2 cache cannot hold; "roof" is
the weights' bytes at 4.3 TB/s.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from gpu_kernels import graph_time
from torch import Tensor

from nanovllm.kernels.cuda import few, many
from nanovllm.kernels.gpu import linear, rowwise

CUDA = torch.device("cuda", 0)
BF16 = torch.bfloat16
ROOF = 4.3e6  # bytes a microsecond
EPS = 1e-6
SHAPES = {  # hidden, intermediate, heads, KV heads
    "0.6B": (1024, 3072, 16, 8),
    "1.7B": (2048, 6144, 16, 8),
    "4B": (2560, 9728, 32, 8),
    "8B": (4096, 12288, 32, 8),
}
PRODUCTS = ("qkv", "o", "gate_up", "down")
RESULTS: list[dict[str, object]] = []
Tiles = dict[str, many.Tile]


def report(table: str, micros: float, roof: float, **what: object) -> None:
    RESULTS.append({"table": table, "us": micros, "roof_us": roof, **what})
    words = "  ".join(f"{k}={v}" for k, v in what.items())
    print(f"{table:6s} {micros:8.2f} us  roof {roof:7.2f}  {words}", flush=True)


def random(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=CUDA) * scale).to(BF16)


# --- correctness -------------------------------------------------------------------------------


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def wanted(x: Tensor, w: Tensor, norm: Tensor | None, gated: bool) -> Tensor:
    x = x.double()
    if norm is not None:
        x = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * norm.double()
    out = x @ w.double().T
    if gated:
        gate, up = out.chunk(2, -1)
        out = F.silu(gate) * up
    return out


def check() -> None:
    """Every kind of product at a few shapes; tests/kernels has the rest."""
    errors = {}
    for m, n, k, gated in [(1, 4096, 1024, False), (8, 200, 896, True), (5, 1024, 3072, False)]:
        x, w, norm = random(m, k), random(n * (1 + gated), k, scale=k**-0.5), random(k)
        out = few.product(x, w, torch.empty_like(random(m, n)), norm=norm, eps=EPS, gated=gated)
        errors["few", m, n, k, gated] = relative_error(out, wanted(x, w, norm, gated))
    for m in (9, 64, 100, 256):
        x, w, norm = random(m, 1024), random(4096, 1024, scale=1 / 32), random(1024)
        rows = many.Rows((x.float() * norm).to(BF16), x.float().square().sum(-1)[None])
        for gated in (False, True):
            out = random(m, len(w) // (1 + gated))
            many.product(rows, w, out, eps=EPS, gated=gated)
            errors["many", m, gated] = relative_error(out, wanted(x, w, norm, gated))
        residual, other = random(m, 1024), random(1024, 1024, scale=1 / 32)
        want = residual.double() + wanted(x, other, None, False)
        after = many.add(residual, x, other, norm)
        errors["add", m] = relative_error(residual, want)
        errors["scaled", m] = relative_error(after.scaled, residual.double() * norm.double())
        squares = residual.double().square().sum(-1)
        errors["squares", m] = relative_error(after.squares.sum(0), squares)
    for what, error in errors.items():
        print(f"{error:.1e}{'' if error < 1.5e-2 else '   WRONG'}  {what}")


# --- the chain of a layer ----------------------------------------------------------------------


@dataclass
class Chain:
    """Weights of some layers, and activations of `rows` rows."""

    shapes: dict[str, tuple[int, int]]  # out and in; of one of gate and up
    layers: list[dict[str, Tensor]]
    norm: Tensor
    rows: int = 0

    @classmethod
    def of(cls, name: str, num_layers: int = 20) -> Chain:
        hidden, inter, heads, groups = SHAPES[name]
        shapes = {
            "qkv": ((heads + 2 * groups) * 128, hidden), "o": (hidden, heads * 128),
            "gate_up": (inter, hidden), "down": (hidden, inter),
        }  # fmt: skip
        layers = [
            {p: random(n * (1 + (p == "gate_up")), k, scale=0.02) for p, (n, k) in shapes.items()}
            for _ in range(num_layers)
        ]
        return cls(shapes, layers, random(hidden))

    def with_rows(self, rows: int) -> Chain:
        self.rows = rows
        self.residual = random(rows, self.shapes["o"][0])
        self.attended = random(rows, self.shapes["o"][1])
        self.qkv, self.active = (random(rows, self.shapes[p][0]) for p in ("qkv", "gate_up"))
        return self

    @property
    def roof(self) -> float:
        return sum(w.numel() * 2 for w in self.layers[0].values()) / ROOF

    def time(self, way: Callable[..., None], *args: object) -> float:
        def run() -> None:
            way(*args)

        return graph_time(run, len(self.layers))

    def by_cublas(self) -> None:
        x, norm = self.residual, partial(rowwise.rms_norm, weight=self.norm, eps=EPS, pdl=True)
        for w in self.layers:
            F.linear(norm(x), w["qkv"])
            x.addmm_(self.attended, w["o"].t())
            both = F.linear(norm(x), w["gate_up"])
            x.addmm_(rowwise.silu_mul(both, pdl=True), w["down"].t())

    def by_rows(self, product: Callable[..., Tensor]) -> None:
        """By few.product or linear.linear, which take the norm along."""
        x, norm = self.residual, {"norm": self.norm, "eps": EPS, "pdl": True}
        for w in self.layers:
            product(x, w["qkv"], self.qkv, **norm)
            product(self.attended, w["o"], x, residual=x, pdl=True)
            product(x, w["gate_up"], self.active, gated=True, **norm)
            product(self.active, w["down"], x, residual=x, pdl=True)

    def by_many(self, tiles: Tiles) -> None:
        x, norm = self.residual, self.norm
        rows = many.Rows(x, x.float().square().sum(-1)[None])
        for w in self.layers:
            many.product(rows, w["qkv"], self.qkv, eps=EPS, tile=tiles["qkv"])
            rows = many.add(x, self.attended, w["o"], norm, tile=tiles["o"])
            many.product(
                rows, w["gate_up"], self.active, eps=EPS, gated=True, tile=tiles["gate_up"]
            )
            rows = many.add(x, self.active, w["down"], norm, tile=tiles["down"])

    def best_tiles(self) -> Tiles:
        return {
            p: many.best_tile(self.rows, n, k, p == "gate_up", 132)
            for p, (n, k) in self.shapes.items()
        }


def bench_chain(names: list[str], sizes: list[int]) -> None:
    for name in names:
        chain = Chain.of(name)
        for m in sizes:
            chain.with_rows(m)
            ways = {"cuBLAS": (chain.by_cublas,)}
            if m <= 8:
                ways["linear"] = (chain.by_rows, linear.linear)
                ways["few"] = (chain.by_rows, few.product)
            if m >= 2:
                ways["many"] = (chain.by_many, chain.best_tiles())
            for by, way in ways.items():
                report("chain", chain.time(*way), chain.roof, shape=name, M=m, by=by)


def candidates(chain: Chain, product: str) -> list[many.Tile]:
    k, batch = chain.shapes[product][1], many.batch_of(chain.rows)
    alone = many.SHARED_LIMIT // many._stage(batch) - 1
    return [
        many.Tile(split, groups, lead, stages)
        for split in (1, 2, 4, 8)
        for groups in (1, 2)
        for lead in (0, many.AT_ONCE)
        for stages in (0, min(16, alone))  # two blocks a multiprocessor, or one with a longer ring
        if k >= 2 * split * many.K_STEP and batch // groups % 8 == 0
    ]


def compile_tiles(chain: Chain) -> None:
    """All candidates at once, so that no timing waits for the compiler."""
    with ThreadPoolExecutor(16) as pool:
        for product in PRODUCTS:
            flags = (product in ("qkv", "gate_up"), False, product == "gate_up",
                     product in ("o", "down"))  # fmt: skip
            for tile in candidates(chain, product):
                batch = many.batch_of(chain.rows)
                pool.submit(many._variant, batch, tile, flags, CUDA)


def tune(names: list[str], sizes: list[int]) -> None:
    """Coordinate descent: twice over the products, the best tile of each in the chain."""
    for name in names:
        chain = Chain.of(name)
        for m in sizes:
            compile_tiles(chain.with_rows(m))
            tiles = chain.best_tiles()
            start = best = chain.time(chain.by_many, tiles)
            for product in PRODUCTS * 2:
                for tile in candidates(chain, product):
                    micros = chain.time(chain.by_many, {**tiles, product: tile})
                    if micros < best * 0.995:
                        best, tiles = micros, {**tiles, product: tile}
            words = {p: (t.split, t.groups, t.lead, t.stages) for p, t in tiles.items()}
            cublas = chain.time(chain.by_cublas)
            report("tune", best, chain.roof, shape=name, M=m, before=start, cuBLAS=cublas, **words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=["check", "chain"])
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32, 64, 96, 128])
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    with torch.inference_mode():
        for part in args.parts:
            if part == "check":
                check()
            else:
                {"chain": bench_chain, "tune": tune}[part](args.shapes, args.rows)
    if args.json:
        about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
        args.json.write_text(json.dumps({**about, "results": RESULTS}, indent=1, default=str))


if __name__ == "__main__":
    main()
