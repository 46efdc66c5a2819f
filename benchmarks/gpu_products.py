"""Checks and times the CUDA C++ products: each alone over its tiles, and the chain of a layer.

    python benchmarks/gpu_products.py [check] [few] [many] [chain] [--json FILE]

Times are microseconds by CUDA graph replay over weights that the L2 cache cannot hold; "roof" is
the weights' bytes at 4.3 TB/s.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F

from nanovllm.kernels.cuda import few, many
from nanovllm.kernels.gpu import linear, products, rowwise

CUDA = torch.device("cuda", 0)
BF16 = torch.bfloat16
VOCAB = 151936
ROOF = 4.3e6  # bytes a microsecond
SHAPES = {  # hidden, intermediate, layers, heads, KV heads
    "0.6B": (1024, 3072, 28, 16, 8),
    "1.7B": (2048, 6144, 28, 16, 8),
    "4B": (2560, 9728, 36, 32, 8),
    "8B": (4096, 12288, 36, 32, 8),
}
CHANGES = [{"lead": lead, "padded": padded} for padded in (False, True) for lead in (-1, 0, 3, 999)]
RESULTS: list[dict[str, object]] = []


def graph_time(run, count: int) -> float:
    """Microseconds of one of the `count` equal pieces of run(), by graph replay; median of 7."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    times = []
    for _ in range(7):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(2):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / 2 / count)
    return statistics.median(times)


def report(table: str, micros: float, roof: float, **what: object) -> None:
    RESULTS.append({"table": table, "us": micros, "roof_us": roof, **what})
    words = "  ".join(f"{k}={v}" for k, v in what.items())
    print(f"{table:6s} {micros:8.2f} us  roof {roof:7.2f}  {words}", flush=True)


def tried(call, *args, **kwargs):
    try:
        return call(*args, **kwargs)
    except Exception as error:
        print(f"       {type(error).__name__}: {str(error)[:200]}", args[1:], kwargs, flush=True)
        return None


def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, device=CUDA) * scale).to(BF16)


def norm_of(x, weight, eps=1e-6):
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def relative_error(found, wanted) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def check_few(m: int, n: int, k: int, gated: bool, norm: bool, bias: bool, residual: bool) -> None:
    x, w = random(m, k), random(n * (2 if gated else 1), k, scale=k**-0.5)
    g = random(k) if norm else None
    b = random(n) if bias else None
    r = random(m, n) if residual else None
    out = r.clone() if residual else torch.full((m, n), float("nan"), dtype=BF16, device=CUDA)
    want = (norm_of(x, g) if norm else x.double()) @ w.double().T
    if gated:
        gate, up = want.chunk(2, -1)
        want = F.silu(gate) * up
    if bias:
        want = want + b.double()
    if residual:
        want = want + r.double()
    few.product(x, w, out, norm=g, eps=1e-6, bias=b, gated=gated,
                residual=out if residual else None)  # fmt: skip
    torch.cuda.synchronize()
    error = relative_error(out, want)
    print(f"few  M={m} N={n} K={k} {gated=} {norm=} {bias=} {residual=}: {error:.2e}"
          f"{'' if error < 1.5e-2 else '   WRONG'}", flush=True)  # fmt: skip


def check_many(m: int, n: int, k: int, kind: str, tile: many.Tile | None) -> None:
    gated, residual, scale = kind == "gated", kind == "residual", kind in ("gated", "scale")
    x, w = random(m, k), random(n * (2 if gated else 1), k, scale=k**-0.5)
    g, b = random(k), random(n) if kind == "bias" else None
    source = x
    if scale:
        parts = x.float().square().view(m, 4, -1).sum(-1).T.contiguous()
        source = many.Rows((x.float() * g.float()).to(BF16), parts)
    want = (norm_of(x, g) if scale else x.double()) @ w.double().T
    if gated:
        gate, up = want.chunk(2, -1)
        want = F.silu(gate) * up
    if b is not None:
        want = want + b.double()
    out = torch.full((m, n), float("nan"), dtype=BF16, device=CUDA)
    after, next_norm = None, None
    if residual:
        out = random(m, n)
        want = want + out.double()
        next_norm = random(n)
        after = many.new_rows(m, n, out, (tile or many.best_tile(m, n, k, False, 132)).warpgroups)
    many.product(source, w, out, eps=1e-6, bias=b, gated=gated, norm=next_norm, after=after,
                 tile=tile)  # fmt: skip
    torch.cuda.synchronize()
    errors = [relative_error(out, want)]
    if after is not None:
        errors.append(relative_error(after.scaled, out.double() * next_norm.double()))
        errors.append(relative_error(after.squares.sum(0), out.double().square().sum(-1)))
    words = " ".join(f"{error:.1e}" for error in errors)
    bad = not all(error < 1.5e-2 for error in errors)
    print(f"many M={m} N={n} K={k} {kind} {tile}: {words}{'   WRONG' if bad else ''}", flush=True)


def check() -> None:
    for m, gated, norm, bias, residual in [
        (1, False, True, False, False), (1, True, True, False, False), (3, False, False, True, True),
        (8, False, True, True, False), (11, True, True, False, False), (16, False, False, False, True),
    ]:  # fmt: skip
        for n, k in ((4096, 1024), (1024, 3072), (200, 896), (4096, 4096)):
            tried(check_few, m, n, k, gated, norm, bias, residual)
    for m in (5, 33, 64, 100, 200, 256):
        for kind in ("plain", "scale", "gated", "residual", "bias"):
            tried(check_many, m, 1024, 1024, kind, None)
    for warpgroups, split, groups in itertools.product((1, 2), (1, 2, 4, 8), (1, 2)):
        for kind in ("scale", "gated", "residual"):
            tile = many.Tile(
                warpgroups, split, many.stages_of(112, many.Tile(warpgroups, split, 0))
            )
            tried(check_many, 100, 520, 1536, kind, tile)


def layer_products(name: str):
    hidden, inter, _, heads, groups = SHAPES[name]
    return {
        "qkv": ((heads + 2 * groups) * 128, hidden), "o": (hidden, heads * 128),
        "gate_up": (inter, hidden), "down": (hidden, inter),
    }  # fmt: skip


def weights_of(n: int, k: int) -> list[torch.Tensor]:
    copies = max(2, min(28, (256 << 20) // (n * k * 2)))
    return [random(n, k, scale=0.02) for _ in range(copies)]


def few_tiles(n, k, gated):
    base = few.best_tile(n, k, gated, 132)
    yield base
    for lead, padded in ((0, False), (3, False), (-1, True), (0, True)):
        yield replace(base, lead=lead, padded=padded)
    for groups in (2, 4, 6, 8):
        if groups != base.groups:
            yield replace(base, groups=groups, stages=5)
    if k % 512 == 0:
        yield few.Tile(base.groups, 512, 8, min(12, base.stages * 2))


def bench_few() -> None:
    for name in SHAPES:
        shapes = {**layer_products(name), "head": (VOCAB, SHAPES[name][0])}
        for product, (n, k) in shapes.items():
            gated, residual = product == "gate_up", product in ("o", "down")
            weights = weights_of(n * (2 if gated else 1), k)
            roof = n * (2 if gated else 1) * k * 2 / ROOF
            g = random(k)
            for m in (1, 8, 16):
                x, out = random(m, k), random(m, n)

                def library(x=x, weights=weights):
                    for w in weights:
                        F.linear(x, w)

                report("few", graph_time(library, len(weights)), roof, shape=name, product=product,
                       M=m, by="cuBLAS")  # fmt: skip
                for tile in few_tiles(n, k, gated) if m != 16 else [None]:

                    def ours(tile=tile, x=x, out=out, g=g, weights=weights, gated=gated,
                             residual=residual):  # fmt: skip
                        for w in weights:
                            few.product(x, w, out, norm=None if residual else g, eps=1e-6,
                                        gated=gated, residual=out if residual else None,
                                        tile=tile)  # fmt: skip

                    micros = tried(graph_time, ours, len(weights))
                    if micros:
                        report("few", micros, roof, shape=name, product=product, M=m, tile=tile)


def bench_many(sizes: list[int]) -> None:
    for name in SHAPES:
        shapes = {**layer_products(name), "head": (VOCAB, SHAPES[name][0])}
        for product, (n, k) in shapes.items():
            gated, residual = product == "gate_up", product in ("o", "down")
            weights = weights_of(n * (2 if gated else 1), k)
            roof = n * (2 if gated else 1) * k * 2 / ROOF
            for m in sizes:
                x, out, g = random(m, k), random(m, n), random(n)
                squares = x.float().square().sum(-1).view(1, m)
                rows = many.Rows(x, squares)
                jobs = []
                for warpgroups, split in itertools.product((1, 2), (1, 2, 4, 8)):
                    if k // 64 < 2 * split or (product == "head" and split > 1):
                        continue
                    tile = many.Tile(warpgroups, split, 0)
                    stages = many.stages_of(many.batch_of(m), tile)
                    jobs += [
                        many.Tile(warpgroups, split, stages, groups)
                        for groups in (1, 2, 4)
                        if warpgroups * groups <= 4 and many.batch_of(m) // groups >= 32
                    ]

                def library(x=x, weights=weights):
                    for w in weights:
                        F.linear(x, w)

                found = [(graph_time(library, len(weights)), "cuBLAS")]
                for tile in jobs:
                    after = many.new_rows(m, n, out, tile.warpgroups) if residual else None

                    def ours(tile=tile, after=after, x=x, out=out, g=g, rows=rows, weights=weights,
                             gated=gated, residual=residual):  # fmt: skip
                        for w in weights:
                            many.product(x if residual else rows, w, out, eps=1e-6, gated=gated,
                                         norm=g, after=after, tile=tile)  # fmt: skip

                    micros = tried(graph_time, ours, len(weights))
                    if micros:
                        found.append((micros, tile))
                best = many.best_tile(m, n, k, gated, 132)
                for micros, tile in sorted(found, key=lambda item: item[0]):
                    note = "chosen" if tile == best else ""
                    report("many", micros, roof, shape=name, product=product, M=m, tile=tile,
                           note=note)  # fmt: skip


def bench_chain() -> None:
    """The four products of a layer with what joins them, attention left out."""
    for name, (hidden, inter, layers, heads, _) in SHAPES.items():
        layers = min(layers, 20)
        shapes = layer_products(name)
        blocks = [
            {p: random(n * (2 if p == "gate_up" else 1), k, scale=0.02)
             for p, (n, k) in shapes.items()} for _ in range(layers)
        ]  # fmt: skip
        roof = sum(w.numel() * 2 for w in blocks[0].values()) / ROOF
        g = random(hidden)
        workspace = products.Workspace(CUDA)
        for m in (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256):
            residual, attended = random(m, hidden), random(m, heads * 128)
            qkv = random(m, shapes["qkv"][0])
            active = random(m, inter)

            def library(m=m, residual=residual, attended=attended, blocks=blocks, g=g):
                for b in blocks:
                    F.linear(rowwise.rms_norm(residual, g, 1e-6, pdl=True), b["qkv"])
                    residual.addmm_(attended, b["o"].t())
                    both = F.linear(rowwise.rms_norm(residual, g, 1e-6, pdl=True), b["gate_up"])
                    residual.addmm_(rowwise.silu_mul(both, pdl=True), b["down"].t())

            def triton_few(residual=residual, attended=attended, qkv=qkv, active=active, g=g,
                           blocks=blocks, call=linear.linear, change=None):  # fmt: skip
                def tile(p):
                    if change is None:
                        return None
                    return replace(few.best_tile(*shapes[p], p == "gate_up", 132), **change)

                for b in blocks:
                    call(residual, b["qkv"], qkv, norm=g, eps=1e-6, pdl=True, tile=tile("qkv"))  # fmt: skip
                    call(attended, b["o"], residual, residual=residual, pdl=True, tile=tile("o"))  # fmt: skip
                    call(residual, b["gate_up"], active, norm=g, eps=1e-6, gated=True, pdl=True,
                         tile=tile("gate_up"))  # fmt: skip
                    call(active, b["down"], residual, residual=residual, pdl=True,
                         tile=tile("down"))  # fmt: skip

            def triton_some(residual=residual, attended=attended, qkv=qkv, active=active, g=g,
                            blocks=blocks):  # fmt: skip
                for b in blocks:
                    normed = rowwise.rms_norm(residual, g, 1e-6, pdl=True)
                    products.product(normed, b["qkv"], qkv, workspace, pdl=True)
                    products.product(attended, b["o"], residual, workspace, residual=residual,
                                     pdl=True)  # fmt: skip
                    normed = rowwise.rms_norm(residual, g, 1e-6, pdl=True)
                    products.product(normed, b["gate_up"], active, workspace, gated=True, pdl=True)
                    products.product(active, b["down"], residual, workspace, residual=residual,
                                     pdl=True)  # fmt: skip

            def ours_many(change, m=m, residual=residual, attended=attended, qkv=qkv, active=active,
                          g=g, blocks=blocks, shapes=shapes):  # fmt: skip
                def tile(p):
                    best = many.best_tile(m, *shapes[p], p == "gate_up", 132)
                    return replace(best, **change)

                def room(p):
                    return many.new_rows(m, residual.shape[1], residual, tile(p).warpgroups)

                rows = many.Rows(residual, residual.float().square().sum(-1).view(1, m))

                for b in blocks:
                    many.product(rows, b["qkv"], qkv, eps=1e-6, tile=tile("qkv"))  # fmt: skip
                    rows = room("o")
                    many.product(attended, b["o"], residual, norm=g, after=rows, tile=tile("o"))  # fmt: skip
                    many.product(rows, b["gate_up"], active, eps=1e-6, gated=True,
                                 tile=tile("gate_up"))  # fmt: skip
                    rows = room("down")
                    many.product(active, b["down"], residual, norm=g, after=rows,
                                 tile=tile("down"))  # fmt: skip

            ways = {"cuBLAS": library}
            if m <= 8:
                ways["triton few"] = triton_few
            if 4 <= m <= 128 and hidden <= 1024:
                ways["triton some"] = triton_some
            if m <= 16:
                for change in CHANGES:
                    ways[f"few {change}"] = lambda c=change: triton_few(call=few.product, change=c)
            if m >= 8:
                for change in CHANGES:
                    ways[f"many {change}"] = lambda c=change: ours_many(c)
            for way, run in ways.items():
                micros = tried(graph_time, run, layers)
                if micros:
                    report("chain", micros, roof, shape=name, M=m, by=way)


def compile_all(sizes: list[int], sweep: bool) -> None:
    """Every variant at once, so that no timing waits for the compiler."""
    jobs = []
    with ThreadPoolExecutor(16) as pool:
        for name in SHAPES:
            for p, (n, k) in {**layer_products(name), "head": (VOCAB, SHAPES[name][0])}.items():
                gated, residual = p == "gate_up", p in ("o", "down")
                flags = (not residual, False, gated, residual)
                for rows in (8, 16) if sweep else ():
                    for tile in few_tiles(n, k, gated):
                        jobs.append(
                            pool.submit(few._variant, n, k, rows, tile, flags, BF16, CUDA, 132)
                        )
                for m, warpgroups, split in itertools.product(
                    sizes if sweep else (), (1, 2), (1, 2, 4, 8)
                ):
                    batch = many.batch_of(m)
                    stages = many.stages_of(batch, many.Tile(warpgroups, split, 0))
                    for groups in (1, 2, 4):
                        if warpgroups * groups <= 4 and batch // groups >= 32:
                            tile = many.Tile(warpgroups, split, stages, groups)
                            jobs.append(pool.submit(many._variant, batch, tile, flags, BF16, CUDA))
                for m, change in itertools.product(sizes, CHANGES):
                    tile = replace(many.best_tile(m, n, k, gated, 132), **change)
                    batch = many.batch_of(m)
                    jobs.append(pool.submit(many._variant, batch, tile, flags, BF16, CUDA))
                for rows, change in itertools.product((8, 16), CHANGES):
                    tile = replace(few.best_tile(n, k, gated, 132), **change)
                    jobs.append(pool.submit(few._variant, n, k, rows, tile, flags, BF16, CUDA, 132))
    failed = [str(job.exception())[:300] for job in jobs if job.exception()]
    print(f"{len(jobs)} variants, {len(failed)} failed {set(failed)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=["check", "few", "many", "chain"])
    parser.add_argument("--sizes", type=int, nargs="*", default=[16, 32, 64, 128, 256])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.zeros(1, device=CUDA)
    with torch.inference_mode():
        if {"few", "many", "chain"} & set(args.parts):
            compile_all(args.sizes, bool({"few", "many"} & set(args.parts)))
        for part in args.parts:
            if part == "many":
                bench_many(args.sizes)
            else:
                {"check": check, "few": bench_few, "chain": bench_chain}[part]()
    if args.json:
        about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
        args.json.write_text(json.dumps({**about, "results": RESULTS}, indent=1, default=str))


if __name__ == "__main__":
    main()
