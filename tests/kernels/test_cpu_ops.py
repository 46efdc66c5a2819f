"""The CPU kernels against plain torch in float64, bit-for-bit invariance, and the build."""

from __future__ import annotations

import multiprocessing
import os
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from nanovllm.attention.base import AttentionBatch, AttentionSpec
from nanovllm.attention.cpu import CpuAttention
from nanovllm.kernels import cache, cpu_ops
from nanovllm.kernels.cpu import build
from nanovllm.kernels.cpu.library import library

OPS = cpu_ops.load()
if isinstance(OPS, str):
    pytest.skip(f"no CPU kernels here: {OPS}", allow_module_level=True)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One rounding of the result (2^-24, 2^-8 and 2^-11 of it) and the float32 sums before it.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(got: torch.Tensor, expected: torch.Tensor, extra: float = 0.0) -> None:
    tolerance = TOLERANCE[got.dtype] + extra
    torch.testing.assert_close(got.double(), expected.double(), rtol=tolerance, atol=tolerance)


# ---- linear


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (17, 5), (64, 64), (100, 577), (960, 576), (40, 3)])
def test_linear(dtype, n, k):
    weight, bias, x = randn(n, k, dtype=dtype), randn(n, dtype=dtype), randn(23, k, dtype=dtype)
    packed = OPS.pack(weight)
    product = x.double() @ weight.double().T
    scale = product.abs().max() + 1
    close(OPS.linear(x, packed) / scale, product / scale)
    close(OPS.linear(x, packed, bias) / scale, (product + bias.double()) / scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_bits_do_not_depend_on_the_other_rows(dtype):
    packed = OPS.pack(randn(200, 321, dtype=dtype))
    x = randn(300, 321, dtype=dtype)
    together = OPS.linear(x, packed)
    for m in (1, 2, 3, 5, 6, 7, 13, 64, 257):
        assert torch.equal(OPS.linear(x[9 : 9 + m], packed), together[9 : 9 + m])


def test_linear_takes_strided_rows_and_leading_dimensions():
    packed, wide = OPS.pack(randn(48, 32)), randn(6, 80)
    rows = wide[:, 16:48]
    expected = OPS.linear(rows.contiguous(), packed)
    assert torch.equal(OPS.linear(rows, packed), expected)
    assert torch.equal(OPS.linear(rows.contiguous().view(2, 3, 32), packed).view(6, 48), expected)


def test_linear_without_rows():
    assert OPS.linear(torch.empty(0, 32), OPS.pack(randn(48, 32))).shape == (0, 48)


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_returns_the_rows_that_were_packed(dtype):
    weight = randn(37, 21, dtype=dtype)
    ids = torch.tensor([36, 0, 5, 5, 17])
    assert torch.equal(OPS.embedding(OPS.pack(weight), ids), weight[ids])


# ---- rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [3, 64, 577])
def test_norms(dtype, n):
    x, weight = randn(70, n, dtype=dtype), randn(n, dtype=dtype, seed=1)
    expected = F.rms_norm(x.double(), (n,), weight.double(), 1e-6)
    close(OPS.rms_norm(x, weight, 1e-6), expected, TOLERANCE[dtype])  # rounded twice
    residual = randn(70, n, dtype=dtype, seed=2)
    total = residual + x
    normed = OPS.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(residual, total)
    assert torch.equal(normed, OPS.rms_norm(total, weight, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul(dtype):
    gate_up = randn(9, 2 * 77, dtype=dtype) * 20
    gate_up[0, :3] = torch.tensor([-float("inf"), -200.0, 200.0])
    gate, up = gate_up.double().chunk(2, dim=-1)
    got = OPS.silu_mul(gate_up)
    expected = F.silu(gate) * up
    finite = expected.isfinite()
    close(got[finite], expected[finite])


def test_nan_passes_through():
    nan = torch.full((1, 32), float("nan"))
    assert OPS.silu_mul(nan).isnan().all()
    assert OPS.rms_norm(nan, torch.ones(32), 1e-6).isnan().all()
    assert OPS.linear(nan, OPS.pack(randn(5, 32))).isnan().all()


def rotate(x, cos_sin, positions):
    cos, sin = cos_sin[positions].double().chunk(2, dim=-1)
    a, b = x.double().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [8, 24, 64, 128])
@pytest.mark.parametrize("normed", [False, True])
def test_rope(dtype, dim, normed):
    fused = randn(11, (4 + 2 + 2) * dim, dtype=dtype)
    q = fused[:, : 4 * dim].view(11, 4, dim)
    k = fused[:, 4 * dim : 6 * dim].view(11, 2, dim)
    values = fused[:, 6 * dim :].clone()
    angles = randn(50, dim // 2)
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=-1)
    positions = torch.arange(11) * 3
    weights = randn(dim, dtype=dtype, seed=3), randn(dim, dtype=dtype, seed=4)
    q_in, k_in = q.double(), k.double()
    if normed:
        q_in = F.rms_norm(q_in, (dim,), weights[0].double(), 1e-6)
        k_in = F.rms_norm(k_in, (dim,), weights[1].double(), 1e-6)
    expected = rotate(q_in, cos_sin, positions), rotate(k_in, cos_sin, positions)
    if normed:
        OPS.qk_norm_rope(q, k, *weights, 1e-6, cos_sin, positions)
    else:
        OPS.rope(q, k, cos_sin, positions)
    extra = 4 * TOLERANCE[dtype] if normed else 0.0  # two more roundings, of up to 3 sigma
    close(q, expected[0], extra)
    close(k, expected[1], extra)
    assert torch.equal(fused[:, 6 * dim :], values)


# ---- attention

LENS = [(1, 1), (1, 70), (37, 37), (20, 150), (1, 300), (130, 131)]  # (new tokens, context)
SHAPES = [  # H, G, D, P, window
    (9, 3, 64, 16, None),
    (16, 8, 128, 32, None),
    (4, 1, 24, 8, 20),
    (3, 3, 8, 40, 7),
    (8, 2, 256, 256, None),
    (6, 1, 80, 16, 100),
    (128, 1, 16, 16, 64),
]


class Paged:
    """Sequences in a cache whose other slots hold NaN, and whose tables end in rubbish."""

    def __init__(self, lens, heads, kv_heads, dim, block_size, dtype):
        self.lens, self.scale = lens, dim**-0.5
        counts = [-(-context // block_size) for _, context in lens]
        blocks = torch.randperm(sum(counts) + 3, generator=torch.Generator().manual_seed(5))
        shape = (len(blocks), 2, kv_heads, block_size, dim)
        self.cache = torch.full(shape, float("nan"), dtype=dtype)
        self.tables = torch.full((len(lens), max(counts) + 2), -7, dtype=torch.int32)
        self.keys, self.values, self.slots = [], [], []
        for i, (_, context) in enumerate(lens):
            own = blocks[sum(counts[:i]) : sum(counts[: i + 1])]
            self.tables[i, : len(own)] = own
            self.keys.append(randn(context, kv_heads, dim, dtype=dtype, seed=10 + i))
            self.values.append(randn(context, kv_heads, dim, dtype=dtype, seed=20 + i))
            at = torch.arange(context)
            self.slots.append(own[at // block_size] * block_size + at % block_size)
            OPS.store_kv(self.keys[-1], self.values[-1], self.cache, self.slots[-1])
        self.cu = torch.tensor([0] + [n for n, _ in lens]).cumsum(0).int()
        self.contexts = torch.tensor([context for _, context in lens]).int()
        self.q = randn(int(self.cu[-1]), heads, dim, dtype=dtype, seed=6)

    def attend(self, window):
        return OPS.attention(
            self.q, self.cache, self.tables, self.cu, self.contexts, self.scale, window
        )

    def expected(self, i, window):
        new, context = self.lens[i]
        q = self.q[self.cu[i] : self.cu[i + 1]].double()
        group = q.shape[1] // self.keys[i].shape[1]
        k = self.keys[i].double().repeat_interleave(group, 1)
        v = self.values[i].double().repeat_interleave(group, 1)
        at, key = torch.arange(new)[:, None] + context - new, torch.arange(context)[None]
        seen = (key <= at) & (key > at - (window or context))
        scores = torch.einsum("qhd,khd->hqk", q, k) * self.scale
        weights = scores.masked_fill(~seen, -float("inf")).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, v)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "block_size", "window"), SHAPES)
def test_attention(dtype, heads, kv_heads, dim, block_size, window):
    paged = Paged(LENS, heads, kv_heads, dim, block_size, dtype)
    out = paged.attend(window)
    for i in range(len(LENS)):
        # bfloat16 rounds the softmax weights too.
        extra = 2**-8 if dtype is torch.bfloat16 else 0.0
        close(out[paged.cu[i] : paged.cu[i + 1]], paged.expected(i, window), extra)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "block_size", "window"), SHAPES)
def test_attention_bits_depend_on_the_context(dtype, heads, kv_heads, dim, block_size, window):
    paged = Paged(LENS, heads, kv_heads, dim, block_size, dtype)
    out = paged.attend(window)
    for i, (new, context) in enumerate(LENS):
        for first, count in ((0, 1), (new // 3, new - new // 3), (new - 1, 1)):
            q = paged.q[int(paged.cu[i]) + first :][:count]
            cu = torch.tensor([0, count], dtype=torch.int32)
            seen = torch.tensor([context - new + first + count], dtype=torch.int32)
            table = paged.tables[i : i + 1]
            alone = OPS.attention(q, paged.cache, table, cu, seen, paged.scale, window)
            start = int(paged.cu[i]) + first
            assert torch.equal(alone, out[start : start + count])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 700])
def test_long_contexts_are_shared_out_without_a_trace(dtype, window):
    """One row of one KV head is cut along its context; in a batch it is not."""
    lens = [(1, 4099), (40, 1500), (1, 513), (200, 1025)]
    paged = Paged(lens, 4, 1, 64, 16, dtype)
    out = paged.attend(window)
    for i, (new, context) in enumerate(lens):
        extra = 2**-8 if dtype is torch.bfloat16 else 0.0
        close(out[paged.cu[i] : paged.cu[i + 1]], paged.expected(i, window), extra)
        for first in {0, new // 2, new - 1}:
            row = int(paged.cu[i]) + first
            cu = torch.tensor([0, 1], dtype=torch.int32)
            seen = torch.tensor([context - new + first + 1], dtype=torch.int32)
            table, q = paged.tables[i : i + 1], paged.q[row : row + 1]
            alone = OPS.attention(q, paged.cache, table, cu, seen, paged.scale, window)
            assert torch.equal(alone, out[row : row + 1])


def test_cache_view_with_strided_blocks():
    paged = Paged(LENS, 4, 2, 32, 16, torch.float32)
    layers = torch.full((paged.cache.shape[0], 3, *paged.cache.shape[1:]), float("nan"))
    layers[:, 1] = paged.cache
    expected = paged.attend(None)
    paged.cache = layers[:, 1]
    assert torch.equal(paged.attend(None), expected)


def test_backend_stores_and_attends():
    paged = Paged(LENS, 8, 2, 64, 16, torch.float32)
    expected = paged.attend(None)
    new_k = torch.cat([k[-n:] for k, (n, _) in zip(paged.keys, LENS, strict=True)])
    new_v = torch.cat([v[-n:] for v, (n, _) in zip(paged.values, LENS, strict=True)])
    slots = torch.cat([s[-n:] for s, (n, _) in zip(paged.slots, LENS, strict=True)])
    old_k, old_v, old_slots = (
        torch.cat([x[:-n] for x, (n, _) in zip(parts, LENS, strict=True)])
        for parts in (paged.keys, paged.values, paged.slots)
    )
    paged.cache.fill_(float("nan"))
    OPS.store_kv(old_k, old_v, paged.cache, old_slots)
    positions = torch.cat([torch.arange(c - n, c) for n, c in LENS])
    batch = AttentionBatch(
        paged.cu, paged.contexts, paged.tables, slots, positions, max_q_len=130, max_context_len=300
    )
    backend = CpuAttention()
    backend.plan(batch)
    got = backend.forward(paged.q, new_k, new_v, paged.cache, batch, paged.scale, None)
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"device": torch.device("meta")}, "meta"),
        ({"dtype": torch.float64}, "float64"),
        ({"head_dim": 100}, "head_dim"),
        ({"block_size": 512}, "block_size"),
    ],
)
def test_backend_says_why_not(change, word):
    spec = {
        "num_heads": 8,
        "num_kv_heads": 2,
        "head_dim": 64,
        "block_size": 16,
        "dtype": torch.float32,
        "device": torch.device("cpu"),
    }
    assert CpuAttention.unsupported(AttentionSpec(**spec)) is None
    assert word in CpuAttention.unsupported(AttentionSpec(**{**spec, **change}))


# ---- wrong arguments


def test_wrong_arguments_are_refused_with_the_numbers():
    packed = OPS.pack(randn(48, 32))
    with pytest.raises(ValueError, match=r"\[2, 31\].*\[48, 32\]"):
        OPS.linear(randn(2, 31), packed)
    with pytest.raises(ValueError, match="bfloat16"):
        OPS.linear(randn(2, 32, dtype=torch.bfloat16), packed)
    with pytest.raises(ValueError, match=r"\[47\]"):
        OPS.linear(randn(2, 32), packed, randn(47))
    with pytest.raises(ValueError, match="strides"):
        OPS.linear(randn(32, 2).T, packed)
    with pytest.raises(ValueError, match=r"48 is outside \[0, 48\)"):
        OPS.embedding(packed, torch.tensor([0, 48]))
    with pytest.raises(ValueError, match="float64"):
        OPS.pack(torch.zeros(2, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"position 9 is outside \[0, 9\)"):
        OPS.rope(randn(1, 2, 8), randn(1, 2, 8), randn(9, 8), torch.tensor([9]))
    cache = torch.zeros(2, 2, 1, 8, 8)
    with pytest.raises(ValueError, match=r"slot 16 is outside \[0, 16\)"):
        OPS.store_kv(randn(1, 1, 8), randn(1, 1, 8), cache, torch.tensor([16]))
    table, cu = torch.tensor([[2]], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"sequence 0 .*outside \[0, 2\)"):
        OPS.attention(randn(1, 2, 8), cache, table, cu, cu[1:], 1.0)


# ---- threads and processes


def results():
    """Enough work that the pool shares it out."""
    packed = OPS.pack(randn(512, 512, dtype=torch.bfloat16))
    paged = Paged([(130, 131), (1, 900)], 8, 2, 64, 16, torch.bfloat16)
    return OPS.linear(randn(90, 512, dtype=torch.bfloat16), packed), paged.attend(None)


def test_bits_do_not_depend_on_the_number_of_threads():
    default = results()
    for num_threads in (1, 3):
        cpu_ops.load(num_threads)
        assert all(torch.equal(a, b) for a, b in zip(results(), default, strict=True))
    cpu_ops.load(torch.get_num_threads())


def test_one_torch_thread_ends_with_its_block():
    before = torch.get_num_threads()
    with cpu_ops.one_torch_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_two_threads_may_call_at_once():
    expected, failures = results(), []

    def call():
        for _ in range(20):
            if not all(torch.equal(a, b) for a, b in zip(results(), expected, strict=True)):
                failures.append("differs")

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert not failures
    assert not any(caller.is_alive() for caller in callers)


def bits(result):
    return result.view(torch.int16).tolist()


def _digest(pipe):
    torch.set_num_threads(1)
    pipe.send([bits(result) for result in results()])


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_does_not_hang():
    expected = [bits(result) for result in results()]
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=_digest, args=(theirs,))
    child.start()
    try:
        assert ours.poll(30)
        assert ours.recv() == expected
    finally:
        child.kill()
        child.join()


# ---- the build


def test_no_compiler_is_a_reason_in_words(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    library.cache_clear()
    try:
        assert "no C++ compiler" in cpu_ops.load()
        spec = AttentionSpec(8, 2, 64, 16, torch.float32, torch.device("cpu"))
        assert "no C++ compiler" in CpuAttention.unsupported(spec)
    finally:
        library.cache_clear()


def test_failing_compiler_is_a_reason_in_words(monkeypatch, tmp_path):
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\necho 'x.cpp:1: error: out of ink' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(build.BuildError, match="out of ink"):
        build.build_library()
    assert not list((tmp_path / "cache" / "nanovllm").iterdir())


def test_what_killed_compilers_left_is_removed_after_a_day(tmp_path):
    for name in ("tmpold", "tmpnew", "kept"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.o").write_text("")
    for name in ("tmpold", "kept"):
        os.utime(tmp_path / name, (0, 0))
    with cache.scratch(tmp_path) as scratch:
        assert scratch.parent == tmp_path
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "tmpnew"]


def test_unusable_cache_directory_falls_back_to_a_temporary_one(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(cache.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(build, "_compile", lambda compiler, library: library)
    assert build.build_library().parent == tmp_path / f"nanovllm-{os.getuid()}"


def test_a_cache_directory_that_others_may_write_is_not_trusted(monkeypatch, tmp_path):
    shared = tmp_path / "nanovllm"
    shared.mkdir()
    shared.chmod(0o777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "_compile", lambda compiler, library: library)
    assert build.build_library().parent != shared


def test_the_name_follows_sources_and_compiler(monkeypatch, tmp_path):
    compiler = build.find_compiler()
    name = build._fingerprint(compiler)
    assert build._fingerprint(compiler) == name
    monkeypatch.setattr(build, "_instruction_set", lambda: "another processor")
    assert build._fingerprint(compiler) != name


def test_a_truncated_library_is_not_loaded(tmp_path: Path) -> None:
    library = tmp_path / "cpu-x.so"
    library.write_bytes(b"0123456789")
    library.with_suffix(".size").write_text("10")
    assert cache.is_whole(library)
    library.write_bytes(b"01234")
    assert not cache.is_whole(library)
    library.with_suffix(".size").unlink()
    assert not cache.is_whole(library)
