"""Sampling kernels against sorting, the CPU's sampler in float64, and the distribution itself."""

import numpy as np
import pytest
import torch
from gpu_device import DEVICE, ON_GPU

from nanovllm.runner.sampler import invert_cdf, uniform_numbers

kernels = pytest.importorskip("nanovllm.kernels.gpu.sampling")

MASK = 2**64 - 1
INF = float("inf")


def params(n, **changed):
    defaults = {
        "temperature": 1.0, "seed": 0, "position": 0, "top_k": 0, "top_p": 1.0, "min_p": 0.0
    }  # fmt: skip
    kinds = {"seed": torch.int64, "position": torch.int32, "top_k": torch.int32}
    values = {}
    for name, value in {**defaults, **changed}.items():
        value = [value] * n if not isinstance(value, list) else value
        values[name] = torch.tensor(value, dtype=kinds.get(name, torch.float32), device=DEVICE)
    return kernels.RowParams(**values)


def choose(logits, p, **options):
    n = len(logits)
    workspace = kernels.Workspace(n, logits.shape[1], logits.device)
    ids = torch.full((n,), -1, dtype=torch.int64, device=DEVICE)
    failed = torch.zeros(n, dtype=torch.bool, device=DEVICE)
    kernels.choose(logits, p, workspace, ids, failed, **{"restricted": False, **options})
    assert not workspace.counter.any()
    return ids.cpu(), failed.cpu()


def unmix(z):
    """The argument at which SplitMix64 is z."""
    z ^= z >> 31 ^ z >> 62
    z = z * pow(0x94D049BB133111EB, -1, 2**64) & MASK
    z ^= z >> 27 ^ z >> 54
    z = z * pow(0xBF58476D1CE4E5B9, -1, 2**64) & MASK
    z ^= z >> 30 ^ z >> 60
    return z - 0x9E3779B97F4A7C15 & MASK


def seed_of(u, position=0):
    """The seed, as int64, that draws u in [0, 1) at a position."""
    seed = unmix(unmix(int(u * 2**53) << 11) ^ position * 0x9E3779B97F4A7C15 & MASK)
    assert uniform_numbers(np.uint64([seed]), np.uint64([position])) == int(u * 2**53) / 2**53
    return (seed + 2**63) % 2**64 - 2**63


def expected(logits, temperature, seeds, positions):
    """The CPU's sampler in float64."""
    u = uniform_numbers(np.array(seeds, np.int64).view(np.uint64), np.array(positions, np.uint64))
    return invert_cdf((logits.cpu().double() / temperature).softmax(-1), torch.from_numpy(u))


@pytest.mark.parametrize("vocab", [50, 9000])
def test_greedy_takes_the_first_maximum(vocab):
    logits = torch.randn(3, vocab, device=DEVICE)
    logits[1, 7] = logits[1, 40] = logits[1, -1] = 9.0
    logits[2, -2] = logits[2, -1] = 9.0
    ids, failed = choose(logits, params(3, temperature=0.0, seed=5))
    assert ids.tolist() == [int(logits[0].cpu().argmax()), 7, vocab - 2]
    assert not failed.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("vocab", "temperature"), [(5000, 0.7), (13, 1.0), (4096, 100.0)])
def test_draws_are_those_of_the_cpus_sampler(vocab, temperature, dtype):
    torch.manual_seed(0)
    n = 24
    seeds = [3, -(2**62), 2**40 + 5] * (n // 3)
    positions = [i * i * 300 for i in range(n)]
    logits = (3 * torch.randn(n, vocab)).to(DEVICE, dtype)
    p = params(n, temperature=temperature, seed=seeds, position=positions)
    ids, failed = choose(logits, p)
    assert torch.equal(ids, expected(logits, temperature, seeds, positions))
    assert not failed.any()
    assert torch.equal(choose(logits, p)[0], ids)


def test_draws_follow_the_softmax():
    probs = torch.tensor([0.3, 0.2, 0.15, 0.12, 0.1, 0.08, 0.05])
    tokens = torch.tensor([0, 1, 900, 1024, 4095, 4096, 4999])  # of several pieces and both tiles
    n = 4000 if ON_GPU else 150
    logits = torch.full((n, 5000), -INF)
    logits[:, tokens] = 2.0 * probs.log()
    p = params(n, temperature=2.0, position=list(range(n)), seed=11)
    ids, _ = choose(logits.to(DEVICE), p)
    found = (ids[:, None] == tokens).sum(0)
    assert found.sum() == n
    chi_square = ((found - n * probs).square() / (n * probs)).sum()
    assert chi_square < 22.5  # one in a thousand is larger, for 6 degrees of freedom


def test_token_depends_on_nothing_but_its_row(monkeypatch):
    torch.manual_seed(0)
    logits = torch.randn(5, 9000, device=DEVICE)
    changed = {"seed": [1, 2, 3, 4, 5], "temperature": [1.0, 0.0, 0.5, 3.0, 1.0]}
    ids, _ = choose(logits, params(5, **changed))
    for programs in (1, 10):  # of one for all tiles of a row to one for each
        monkeypatch.setattr(kernels, "PROGRAMS", programs)
        assert torch.equal(choose(logits, params(5, **changed))[0], ids)
    for i in range(5):
        one = params(1, **{name: values[i] for name, values in changed.items()})
        assert choose(logits[i : i + 1], one)[0].item() == ids[i]


def test_extreme_temperatures():
    logits = torch.randn(4, 300, device=DEVICE)
    logits[:2, 77] = 9.0
    p = params(4, temperature=[1e-6, 1e-30, 100.0, 3e38], seed=seed_of(0.999))
    ids, failed = choose(logits, p)
    assert ids.tolist()[:2] == [77, 77]
    assert ids[3] == int(0.999 * 300)  # all are equal
    assert abs(ids[2] - ids[3]) < 6
    assert not failed.any()


def test_one_huge_logit_and_all_equal_ones():
    logits = torch.zeros(4, 5000, device=DEVICE)
    logits[0, 4500], logits[1, 3] = 2e38, -2e38
    logits[2:] = 30.0
    u = [0.5, 3.1 / 4999, 0.0, 1 - 2**-53]
    ids, failed = choose(logits, params(4, seed=[seed_of(x) for x in u]))
    assert ids.tolist() == [4500, 4, 0, 4999]
    assert not failed.any()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_one_token_is_possible(temperature):
    tokens = [0, 1023, 1024, 4095, 4096, 8999]
    logits = torch.full((len(tokens), 9000), -INF)
    logits[range(len(tokens)), tokens] = -50.0
    seeds = [seed_of(u) for u in (0.0, 1 - 2**-53, 0.5, 1 - 2**-53, 0.0, 0.5)]
    p = params(len(tokens), temperature=temperature, seed=seeds)
    ids, failed = choose(logits.to(DEVICE), p)
    assert ids.tolist() == tokens
    assert not failed.any()


@pytest.mark.parametrize("rare", [40, 7000])  # beside the likely one, and in another tile
def test_a_tiny_probability_has_its_share(rare):
    probability, n = 1e-12, 17
    logits = torch.full((1, 9000), -INF)
    logits[0, [20, rare, 8999]] = torch.tensor([0.5, probability, 0.5]).log()
    u = 0.5 + torch.linspace(-2, 2, n, dtype=torch.float64) * probability
    p = params(n, seed=[seed_of(x, 9) for x in u.tolist()], position=9)
    ids, _ = choose(logits.expand(n, -1).contiguous().to(DEVICE), p)
    assert ids.tolist() == sorted(ids.tolist())
    assert (ids[0], ids[-1]) == (20, 8999)
    assert abs((ids == rare).sum() - 4) <= 1  # a quarter of the numbers' range


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_thresholds_keep_what_sorting_keeps(dtype):
    torch.manual_seed(0)
    cases = [(5, 1.0, 0.0), (0, 0.6, 0.0), (0, 1.0, 0.05), (40, 0.8, 0.01), (0, 1e-6, 0.0)]
    cases.append((0, 1.0, 0.0))
    vocab, temperature = 1000, 0.8
    logits = (torch.randn(len(cases), vocab) * 3).to(dtype)
    top_k, top_p, min_p = (list(column) for column in zip(*cases, strict=True))
    p = params(len(cases), temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    out = torch.empty(len(cases), device=DEVICE)
    kernels.thresholds(logits.to(DEVICE), p, out)
    for line, (k, share, least) in enumerate(cases):
        values = logits[line].double().sort(descending=True).values
        probs = (values / temperature).softmax(-1)
        kept = torch.ones(vocab, dtype=torch.bool)
        if k:
            kept &= values >= values[k - 1]
        mass = (probs * kept).cumsum(-1)
        if share < 1:
            kept &= (mass - probs < share * mass[-1]) | (values == values[0])
        kept &= probs >= least * probs[0]
        expected = int((values >= values[kept].min()).sum())  # ties stay
        assert abs(int((logits[line].float() >= out[line].cpu()).sum()) - expected) <= (share < 1)


# The interpreter warns of infinity minus infinity.
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_restricted_rows_stay_inside_and_failures_are_told():
    torch.manual_seed(0)
    logits = torch.randn(12, 300, device=DEVICE)
    p = params(12, top_k=2, position=list(range(12)))
    ids, failed = choose(logits, p, restricted=True)
    best = logits.cpu().topk(2).indices
    assert ((ids[:, None] == best).any(-1)).all()
    assert not failed.any()
    logits[0, 3], logits[1, 4], logits[2] = float("nan"), float("inf"), float("-inf")
    for changed in ({}, {"temperature": 0.0}, {"top_k": 2}):
        ids, failed = choose(logits, params(12, **changed), restricted="top_k" in changed)
        assert failed.nonzero().flatten().tolist() == [0, 1, 2]
        assert ((ids >= 0) & (ids < 300)).all()


@pytest.mark.parametrize("cut", [{"top_k": 3}, {"top_p": 0.99}, {"min_p": 0.01}])
def test_tiles_in_which_no_token_is_allowed(cut):
    torch.manual_seed(0)
    logits = torch.randn(6, 13_000)
    logits[:, [4100, 8000, 8190]] = torch.tensor([20.0, 21.0, 20.5])
    seeds = [seed_of(u) for u in (0.0, 0.1, 0.3, 0.6, 0.9, 1 - 2**-53)]
    ids, _ = choose(logits.to(DEVICE), params(6, seed=seeds, **cut), restricted=True)
    kept = torch.where(logits > 15, logits, -INF)
    assert torch.equal(ids, expected(kept, 1.0, seeds, [0] * 6))


def test_scatter_writes_the_next_input_but_not_past_the_context():
    logits = torch.randn(3, 40, device=DEVICE)
    tokens = torch.full((5, 6), -7, dtype=torch.int32, device=DEVICE)
    rows = torch.tensor([4, 1, -1], dtype=torch.int32, device=DEVICE)
    ids, _ = choose(logits, params(3, temperature=0.0, position=[2, 6, 1]), scatter=(tokens, rows))
    expected = torch.full((5, 6), -7, dtype=torch.int32)
    expected[4, 2] = ids[0]
    assert torch.equal(tokens.cpu(), expected)
