"""CUDA C++ products: their variants without a GPU, and on one their results against float64."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gpu_device import relative_error, tolerance
from torch import Tensor

from nanovllm.bench.shapes import SHAPES, find_shape
from nanovllm.kernels.cuda import build, few, launch, many

DEVICE = torch.device("cuda", 0)
REASON = launch.available(DEVICE) if torch.cuda.is_available() else "there is no CUDA device"
PROCESSORS = 132  # of an H200
SHARED_LIMIT = 227 * 1024
BF16 = torch.bfloat16
EPS = 1e-6


def on_gpu(test: Any) -> Any:
    return pytest.mark.gpu(pytest.mark.skipif(REASON is not None, reason=REASON or "")(test))


# --- without a GPU: the variants that models ask for ---------------------------------------------


@dataclass
class Launch:
    source: str
    name: str
    defines: dict[str, int]
    shared: int
    grid: tuple[int, int, int]
    threads: int


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """What the products launch, instead of launching it."""
    found: list[Launch] = []

    class Recorder:
        def __init__(self, variant: Any, *_: Any, shared: int) -> None:
            self.variant, self.shared = variant, shared

        def launch(self, grid: Any, threads: int, *_: Any, shared: int, **__: Any) -> None:
            assert shared == self.shared
            source, name, defines = self.variant
            found.append(Launch(source, name, defines, shared, grid, threads))

    for module in (few, many):
        monkeypatch.setattr(module, "compile_cubin", lambda s, name, defines: (s, name, defines))
        monkeypatch.setattr(module, "Kernel", Recorder)
        monkeypatch.setattr(module, "processors_of", lambda device: PROCESSORS)
        module._variant.cache_clear()
    monkeypatch.setattr(many, "tensor_map", lambda *arguments: bytes(128))
    stream = SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    return found


def products_of(model: str) -> dict[str, tuple[int, int]]:
    """The (N, K) of a layer's products, and of the LM head."""
    c = find_shape(model)
    queries, keys = (c[f"num_{w}_heads"] * c["head_dim"] for w in ("attention", "key_value"))
    hidden, inter = c["hidden_size"], c["intermediate_size"]
    return {
        "qkv": (queries + 2 * keys, hidden), "o": (hidden, queries),
        "gate_up": (inter, hidden), "down": (hidden, inter),
        "head": (c["vocab_size"], hidden),
    }  # fmt: skip


def ask(module: Any, product: str, m: int, n: int, k: int) -> None:
    """Launches what a layer would, with tensors that hold nothing."""

    def tensor(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, out, ends = tensor(m, k), tensor(m, n), product in ("o", "down")
    weight = tensor(2 * n if product == "gate_up" else n, k)
    gated = product == "gate_up"
    if module is few and ends:
        few.product(x, weight, out, residual=out)
    elif module is few:
        few.product(x, weight, out, norm=tensor(k), gated=gated)
    elif ends:
        many.add(out, x, weight, tensor(n))
    else:
        rows = many.Rows(x, tensor(1, m, dtype=torch.float32))
        many.product(rows, weight, out, gated=gated)


def check_constants(found: Launch, m: int, n: int, k: int) -> None:
    assert found.shared <= SHARED_LIMIT
    assert found.threads <= 1024
    d = SimpleNamespace(**found.defines)
    assert found.threads >= d.STAGES, "a thread initialises the barriers of one stage"
    if found.name == "few.cu":
        assert k % d.K_STEP == 0 == d.K_STEP % (32 * d.WARPS)
        assert n % 8 == 0 == d.GROUPS % (1 + d.GATED)
        assert m <= few.MAX_ROWS
        assert found.grid == (d.BLOCKS, 1, 1)
    else:
        assert m <= d.BATCH <= 256
        assert d.BATCH % (8 * d.BATCH_GROUPS) == 0 == d.BATCH % d.SPLIT
        assert k // many.K_STEP >= d.SPLIT, "each block of a cluster needs a part of K"
        assert found.grid[0] == d.SPLIT <= 8
        assert found.grid[1] * many.TILE >= n * (1 + d.GATED)


@pytest.mark.parametrize("model", SHAPES)
def test_every_product_of_a_model_has_a_variant(model: str, launches: list[Launch]) -> None:
    for product, (n, k) in products_of(model).items():
        for m in range(1, many.MAX_ROWS + 1):
            for module in (few, many) if m <= few.MAX_ROWS else (many,):
                ask(module, product, m, n, k)
                check_constants(launches[-1], m, n, k)
    assert len(launches) == 5 * (few.MAX_ROWS + many.MAX_ROWS)


@pytest.mark.skipif(build.unavailable() is not None, reason=build.unavailable() or "")
@pytest.mark.parametrize(
    ("module", "product", "m", "model"),
    [
        (few, "qkv", 1, "qwen3-0.6b"), (few, "gate_up", 7, "qwen3-0.6b"),
        (few, "o", 8, "smollm-135m"), (few, "down", 3, "qwen3-8b"),
        (many, "o", 16, "qwen3-0.6b"), (many, "qkv", 100, "qwen3-1.7b"),
        (many, "gate_up", 64, "smollm-135m"), (many, "gate_up", 256, "qwen3-8b"),
        (many, "down", 128, "qwen3-0.6b"), (many, "down", 256, "qwen3-8b"),
    ],
)  # fmt: skip
def test_variants_compile_and_keep_their_values_in_registers(
    module: Any, product: str, m: int, model: str, launches: list[Launch],
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    ask(module, product, m, *products_of(model)[product])
    (found,) = launches
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "--ptxas-options=-v"))
    monkeypatch.setattr(build, "_load", lambda file: None)  # the log is of the compiler alone
    monkeypatch.setattr(build, "_store", lambda file, cubin: None)
    enough = f"\nstatic_assert(sizeof(Shared) <= {found.shared});\n"
    with caplog.at_level(logging.DEBUG, logger="nanovllm"):
        build.compile_cubin(found.source + enough, found.name, defines=found.defines)
    (stack,) = re.findall(r"(\d+) bytes stack frame, \d+ bytes spill stores", caplog.text)
    assert int(stack) <= 100
    assert "serialized" not in caplog.text, "wgmma waits for each instruction"


def test_weights_that_cannot_be_copied_are_refused() -> None:
    assert few.suits(1000, 1024)
    assert not few.suits(1004, 1024)
    assert not few.suits(1000, 1000)
    assert many.fits(1000, 1000)
    assert not many.fits(1004, 1000)
    assert not many.fits(1000, 1004)


# --- on a GPU ------------------------------------------------------------------------------------

ROWS_FEW = [1, 2, 7, 8]
ROWS_MANY = [1, 5, 16, 17, 64, 100, 128, 200, 256]
KINDS_FEW = ["", "norm", "norm bias", "norm gated", "residual", "bias residual"]
KINDS_MANY = ["", "bias", "norm", "norm gated", "after", "bias after"]


def guarded(tensor: Tensor) -> Tensor:
    """The same values, with NaN behind them that must be neither read nor written."""
    room = tensor.new_full((len(tensor) + 16, *tensor.shape[1:]), float("nan"))
    room[: len(tensor)] = tensor
    return room[: len(tensor)]


def is_intact(tensor: Tensor) -> bool:
    """Whether what is behind a guarded tensor is still NaN, and nothing in it is."""
    assert tensor._base is not None
    return bool(tensor._base[len(tensor) :].isnan().all() and not tensor.isnan().any())


def squares_of(x: Tensor, parts: int) -> Tensor:
    """[parts, M]"""
    return x.float().square().view(len(x), parts, -1).sum(-1).T.contiguous()


def new_rows(m: int, n: int) -> many.Rows:
    """Room for what a product with `after` writes."""
    shapes = {(m, n): BF16, (-(-n // many.TILE), m): torch.float32}
    made = (torch.full(s, float("nan"), dtype=t, device=DEVICE) for s, t in shapes.items())
    return many.Rows(*map(guarded, made))


@dataclass
class Case:
    """A product's operands, and the result in float64."""

    m: int
    n: int
    k: int
    kind: str  # words: norm, bias, gated, residual or after

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        weights = 2 * self.n if "gated" in self.kind else self.n
        shapes = (self.m, self.k), (weights, self.k), (self.k,), (self.n,), (self.m, self.n)
        x, weight, *others = (torch.randn(shape, device=DEVICE) for shape in shapes)
        tensors = [t.to(BF16) for t in (x, weight / self.k**0.5, *others)]
        self.x, self.weight, self.norm, self.bias, self.old = map(guarded, tensors)

    def wanted(self) -> Tensor:
        x, weight = self.x.double(), self.weight.double()
        if "norm" in self.kind:
            x = x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * self.norm.double()
        y = x @ weight.T
        if "gated" in self.kind:
            gate, up = y.chunk(2, -1)
            y = F.silu(gate) * up
        if "bias" in self.kind:
            y = y + self.bias.double()
        if "residual" in self.kind or "after" in self.kind:
            y = y + self.old.double()
        return y

    def few(self, tile: few.Tile | None = None) -> list[Tensor]:
        adds = "residual" in self.kind
        out = guarded(self.old if adds else torch.full_like(self.old, float("nan")))
        few.product(
            self.x, self.weight, out, norm=self.norm if "norm" in self.kind else None, eps=EPS,
            bias=self.bias if "bias" in self.kind else None, gated="gated" in self.kind,
            residual=out if adds else None, tile=tile,
        )  # fmt: skip
        return [out]

    def many(self, tile: many.Tile | None = None) -> list[Tensor]:
        """The result, and with `after` the rows for the next norm and their squares."""
        x: Tensor | many.Rows = self.x
        if "norm" in self.kind:
            scaled = (self.x.float() * self.norm.float()).to(BF16)
            x = many.Rows(guarded(scaled), guarded(squares_of(self.x, 4)))
        gated, adds = "gated" in self.kind, "after" in self.kind
        out = guarded(self.old if adds else torch.full_like(self.old, float("nan")))
        after = new_rows(self.m, self.n)
        many.product(
            x, self.weight, out, eps=EPS, bias=self.bias if "bias" in self.kind else None,
            gated=gated, norm=self.bias if adds else None, after=after if adds else None, tile=tile,
        )  # fmt: skip
        return [out, after.scaled, after.squares] if adds else [out]


def check(case: Case, run: Callable[[], list[Tensor]]) -> None:
    """Right, the same in each of several launches, and nothing but the result is written."""
    out, *after = first = run()
    for found in [first, *(run() for _ in range(3))]:
        assert all(map(is_intact, found))
        assert all(map(torch.equal, found, first))
    assert relative_error(out, case.wanted()) < tolerance(BF16)
    if after:
        scaled, squares = after
        assert relative_error(scaled, out.double() * case.bias.double()) < tolerance(BF16)
        assert relative_error(squares.sum(0), out.double().square().sum(-1)) < 1e-5


@on_gpu
@pytest.mark.parametrize("kind", KINDS_FEW)
@pytest.mark.parametrize(("n", "k"), [(200, 896), (1000, 576), (24, 4864), (2048, 1024)])
def test_few_rows(n: int, k: int, kind: str) -> None:
    for m in ROWS_FEW:
        case = Case(m, n, k, kind)
        check(case, case.few)


@on_gpu
@pytest.mark.parametrize("kind", ["norm", "norm gated", "residual"])
@pytest.mark.parametrize("groups", [2, 6, 8])
@pytest.mark.parametrize("stages", [2, 3])
def test_few_rows_in_every_unit_and_a_short_ring(groups: int, stages: int, kind: str) -> None:
    for m in (3, 8):
        case = Case(m, 5000, 1536, kind)  # a rest in the last unit
        best = few.best_tile(case.n, case.k, "gated" in kind, PROCESSORS)
        check(case, partial(case.few, replace(best, groups=groups, stages=stages)))


@on_gpu
def test_a_row_depends_neither_on_the_others_nor_on_their_number() -> None:
    case = Case(8, 1000, 896, "norm gated")
    (whole,), x, old = case.few(), case.x, case.old
    for rows in (1, 2, 7):
        case.x, case.old = guarded(x[-rows:]), old[-rows:]
        assert torch.equal(case.few()[0], whole[-rows:])


@on_gpu
@pytest.mark.parametrize("kind", KINDS_MANY)
@pytest.mark.parametrize(("n", "k"), [(1024, 1024), (520, 1544), (1000, 576), (24, 4864)])
def test_many_rows(n: int, k: int, kind: str) -> None:
    for m in ROWS_MANY:
        case = Case(m, n, k, kind)
        check(case, case.many)


@on_gpu
@pytest.mark.parametrize("kind", ["norm", "norm gated", "after"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("split", [1, 2, 4, 8])
@pytest.mark.parametrize("stages", [0, 2])  # two: every step waits for a free one
def test_many_rows_in_every_tile(stages: int, split: int, groups: int, kind: str) -> None:
    tile = many.Tile(split, groups, stages=stages)
    for m in (16, 100, 256):
        case = Case(m, 520, 1640, kind)  # 26 steps of K, the last with a rest
        check(case, partial(case.many, tile))


class Chain:
    """The products of two layers, attention left out: each reads what the one before wrote.

    All that is written is NaN at first, so that a product which does not wait is seen.
    """

    shapes = {  # noqa: RUF012
        "qkv": (2048, 1024), "o": (1024, 2048), "gate_up": (3072, 1024), "down": (1024, 3072),
    }  # fmt: skip

    def __init__(self, m: int, changes: dict[str, Any]) -> None:
        """`changes` are those of the best tiles."""

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, device=DEVICE).to(BF16)

        torch.manual_seed(0)
        self.few_tiles, self.many_tiles, weights = {}, {}, {}
        for name, (n, k) in self.shapes.items():
            gated = name == "gate_up"
            few_tile = few.best_tile(n, k, gated, PROCESSORS)
            many_tile = many.best_tile(m, n, k, gated, PROCESSORS)
            self.few_tiles[name] = replace(few_tile, **changes)
            self.many_tiles[name] = replace(many_tile, **changes)
            weights[name] = [random(2 * n if gated else n, k) / k**0.5 for _ in range(2)]
        self.layers = [
            dict(zip(weights, layer, strict=True)) for layer in zip(*weights.values(), strict=True)
        ]
        self.norm, self.start, self.residual = random(1024), random(m, 1024), random(m, 1024)
        self.projected, self.active = random(m, 2048), random(m, 3072)
        self.first = many.Rows(self.start * self.norm, squares_of(self.start, 1))
        self.middle, self.last = new_rows(m, 1024), new_rows(m, 1024)

    def written(self) -> list[Tensor]:
        rows = [t for r in (self.middle, self.last) for t in (r.scaled, r.squares)]
        return [self.projected, self.active, self.residual, *rows]

    def reset(self) -> None:
        for tensor in self.written():
            tensor.fill_(float("nan"))
        self.residual.copy_(self.start)

    def few(self) -> Iterator[Tensor]:
        run, tile, norm = partial(few.product, eps=EPS), self.few_tiles, self.norm
        x, y, z = self.residual, self.projected, self.active
        for w in self.layers:
            yield run(x, w["qkv"], y, norm=norm, tile=tile["qkv"])
            yield run(y, w["o"], x, residual=x, tile=tile["o"])
            yield run(x, w["gate_up"], z, norm=norm, gated=True, tile=tile["gate_up"])
            yield run(z, w["down"], x, residual=x, tile=tile["down"])

    def many(self) -> Iterator[Tensor]:
        run, tile, norm = partial(many.product, eps=EPS), self.many_tiles, self.norm
        x, y, z, rows = self.residual, self.projected, self.active, self.first
        for w in self.layers:
            yield run(rows, w["qkv"], y, tile=tile["qkv"])
            yield run(y, w["o"], x, norm=norm, after=self.middle, tile=tile["o"])
            yield run(self.middle, w["gate_up"], z, gated=True, tile=tile["gate_up"])
            yield run(z, w["down"], x, norm=norm, after=self.last, tile=tile["down"])
            rows = self.last


def check_chain(chain: Chain, run: Callable[[], Iterator[Tensor]]) -> None:
    """Replays of a graph, products overlapping, against one product at a time."""
    chain.reset()
    for out in run():
        torch.cuda.synchronize()
        assert not out.isnan().any()
    wanted = [tensor.clone() for tensor in chain.written()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain.reset()
        for _ in run():
            pass
    for _ in range(20):
        graph.replay()
        for found, want in zip(chain.written(), wanted, strict=True):
            # As numbers: what a chain of few rows leaves alone stays NaN.
            assert torch.equal(found.nan_to_num(-1.0), want.nan_to_num(-1.0))


@on_gpu
@pytest.mark.parametrize("m", [1, 8])
@pytest.mark.parametrize("changes", [{}, {"lead": -1}, {"lead": 0}, {"lead": 999}], ids=str)
def test_a_chain_of_few_rows_in_a_graph(changes: dict[str, Any], m: int) -> None:
    chain = Chain(m, changes)
    check_chain(chain, chain.few)


@on_gpu
@pytest.mark.parametrize("m", [8, 64, 100, 256])
@pytest.mark.parametrize("changes", [{}, {"lead": -1}, {"lead": 0}, {"lead": 999}], ids=str)
def test_a_chain_of_many_rows_in_a_graph(changes: dict[str, Any], m: int) -> None:
    chain = Chain(m, changes)
    check_chain(chain, chain.many)
