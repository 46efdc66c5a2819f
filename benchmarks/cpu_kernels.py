"""The CPU kernels against torch: linear layers and attention in the shapes of two small models.

Both sides of a ratio alternate in one loop, so that drift of the machine meets both; figures are
medians. The weights of a linear layer rotate through more memory than the caches hold, as they do
in a model. Run it on an idle machine:

    python benchmarks/cpu_kernels.py [--model NAME] [--rows 1 16] [--dtype float32] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

from nanovllm.kernels import cpu_ops
from nanovllm.kernels.cpu_ops import CpuOps

ROTATE_BYTES = 256 << 20
ROWS = (1, 4, 16, 32, 128, 512)
BLOCK_SIZE = 16
SETTLE_SECONDS = 0.02  # torch's threads spin for some milliseconds after they worked


@dataclass(frozen=True)
class Shape:
    hidden: int
    inter: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    def linears(self) -> dict[str, tuple[int, int]]:
        """name -> (outputs, inputs)"""
        return {
            "qkv": ((self.heads + 2 * self.kv_heads) * self.head_dim, self.hidden),
            "o": (self.hidden, self.heads * self.head_dim),
            "gate_up": (2 * self.inter, self.hidden),
            "down": (self.hidden, self.inter),
            "head": (self.vocab, self.hidden),
        }


MODELS = {
    "SmolLM-135M": Shape(576, 1536, 9, 3, 64, 49152),
    "Qwen3-0.6B": Shape(1024, 3072, 16, 8, 128, 151936),
}


@dataclass(frozen=True)
class Result:
    what: str
    case: str
    ours_us: float
    torch_us: float
    note: str

    @property
    def ratio(self) -> float:
        return self.torch_us / self.ours_us


def seconds(function: Callable[[], object]) -> float:
    time.sleep(SETTLE_SECONDS)
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def interleave(*functions: Callable[[], object], repeats: int) -> list[float]:
    """Median seconds of each, called in turn."""
    for function in functions:
        function()
    times = [[seconds(function) for function in functions] for _ in range(repeats)]
    return [median(column) for column in zip(*times, strict=True)]


def bench_linear(ops: CpuOps, name: str, n: int, k: int, m: int, dtype: torch.dtype) -> Result:
    """A note gives the speed, and for one row the share of a plain read of the same bytes."""
    size = n * k * dtype.itemsize
    copies = max(1, min(60, ROTATE_BYTES // size))
    weights = torch.randn(copies, n, k, dtype=torch.float32).to(dtype)
    packed = [ops.pack(weight) for weight in weights]
    x = torch.randn(m, k).to(dtype)
    everything = weights.view(torch.int64 if weights.numel() % 4 == 0 else torch.int16)
    sides: list[Callable[[], object]] = [
        lambda: [ops.linear(x, weight) for weight in packed],
        lambda: [F.linear(x, weight) for weight in weights],
    ]
    if m == 1:
        sides.append(everything.sum)
    times = [t / copies for t in interleave(*sides, repeats=3 if m >= 128 else 7)]
    note = f"{2e-9 * m * n * k / times[0]:.0f} GFLOP/s"
    if m == 1:
        note = f"{1e-9 * size / times[0]:.1f} GB/s, a plain read {1e-9 * size / times[2]:.1f}"
    return Result(f"linear {name} [{n}, {k}]", f"{m} rows", 1e6 * times[0], 1e6 * times[1], note)


def bench_attention(
    ops: CpuOps, shape: Shape, seqs: int, new: int, context: int, dtype: torch.dtype
) -> Result:
    """Against scaled_dot_product_attention over contiguous keys and values, gathering not counted.

    Grouped heads of a decode step are given to it as queries, which is its fastest form.
    """
    heads, groups, dim = shape.heads, shape.kv_heads, shape.head_dim
    blocks = -(-context // BLOCK_SIZE)
    cache = torch.randn(seqs * blocks, 2, groups, BLOCK_SIZE, dim).to(dtype)
    tables = torch.randperm(seqs * blocks).int().view(seqs, blocks)
    cu = torch.arange(0, (seqs + 1) * new, new, dtype=torch.int32)
    lens = torch.full((seqs,), context, dtype=torch.int32)
    q = torch.randn(seqs * new, heads, dim).to(dtype)
    k, v = torch.randn(2, seqs, groups, context, dim).to(dtype)
    scale = dim**-0.5
    if new == 1:
        query = q.view(seqs, groups, heads // groups, dim)
        other = lambda: F.scaled_dot_product_attention(query, k, v, scale=scale)  # noqa: E731
    else:
        query = q.view(seqs, new, heads, dim).transpose(1, 2)
        wide_k, wide_v = (x.repeat_interleave(heads // groups, 1) for x in (k, v))
        mask = torch.ones(new, context, dtype=torch.bool).tril(context - new)
        causal = {"is_causal": True} if new == context else {"attn_mask": mask}
        other = lambda: F.scaled_dot_product_attention(  # noqa: E731
            query, wide_k, wide_v, scale=scale, **causal
        )
    ours = lambda: ops.attention(q, cache, tables, cu, lens, scale)  # noqa: E731
    times = interleave(ours, other, repeats=15)
    pairs = seqs * (new * context - new * (new - 1) // 2)
    note = f"{4e-9 * pairs * heads * dim / times[0]:.0f} GFLOP/s"
    if new == 1:
        note = f"{1e-9 * seqs * context * groups * dim * 2 * dtype.itemsize / times[0]:.1f} GB/s"
    case = f"{seqs} x {new} of {context}"
    return Result("attention", case, 1e6 * times[0], 1e6 * times[1], note)


ATTENTION_CASES = [  # sequences, new tokens, context
    *[(1, 1, 128), (1, 1, 1024), (1, 1, 4096), (16, 1, 256), (16, 1, 1024), (32, 1, 512)],
    *[(1, 128, 128), (1, 512, 512), (1, 512, 2048), (4, 256, 256)],
]


def run(args: argparse.Namespace, ops: CpuOps) -> dict[str, list[Result]]:
    dtype = getattr(torch, args.dtype)
    tables: dict[str, list[Result]] = {}
    for model in args.model:
        shape, rows = MODELS[model], []
        for name, (n, k) in shape.linears().items():
            for m in args.rows:
                if name == "head" and m > 32:
                    continue  # only the last token of a prompt needs logits
                rows.append(show(bench_linear(ops, name, n, k, m, dtype)))
        for case in ATTENTION_CASES if not args.no_attention else []:
            rows.append(show(bench_attention(ops, shape, *case, dtype)))
        tables[model] = rows
    return tables


def show(result: Result) -> Result:
    print(
        f"{result.what:30} {result.case:16} {result.ours_us:9.0f} us  torch {result.torch_us:9.0f}"
        f" us  {result.ratio:5.2f}x  {result.note}",
        flush=True,
    )
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--dtype", choices=("bfloat16", "float32", "float16"), default="bfloat16")
    parser.add_argument("--no-attention", action="store_true", help="linear layers only")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the results there")
    args = parser.parse_args()
    ops = cpu_ops.load()
    if isinstance(ops, str):
        print(f"no CPU kernels: {ops}", file=sys.stderr)
        return 1
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.dtype}")
    tables = run(args, ops)
    if args.json:
        plain = {model: [asdict(row) for row in rows] for model, rows in tables.items()}
        args.json.write_text(json.dumps(plain, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
