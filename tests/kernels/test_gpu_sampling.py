"""Sampling kernels against sorting, a hash in plain integers, and the distribution itself."""

import pytest
import torch
from gpu_device import DEVICE

kernels = pytest.importorskip("nanovllm.kernels.gpu.sampling")

MASK = 0xFFFFFFFF


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


def mix(h):
    h ^= h >> 16
    h = h * 0x85EBCA6B & MASK
    h ^= h >> 13
    h = h * 0xC2B2AE35 & MASK
    return h ^ h >> 16


def gumbel(seed, position, vocab):
    key = mix(seed & MASK ^ mix(seed >> 32 & MASK ^ mix(position + 0x9E3779B9 & MASK)))
    bits = [mix(t * 0x9E3779B1 + key & MASK) for t in range(vocab)]
    u = (torch.tensor(bits, dtype=torch.float64) + 0.5) / 2**32
    return -torch.log(-torch.log1p(-u))


@pytest.mark.parametrize("vocab", [50, 9000])
def test_greedy_takes_the_first_maximum(vocab):
    logits = torch.randn(3, vocab, device=DEVICE)
    logits[1, 7] = logits[1, 40] = 9.0
    ids, failed = choose(logits, params(3, temperature=0.0))
    assert ids.tolist() == [*logits[:1].cpu().argmax(-1), 7, *logits[2:].cpu().argmax(-1)]
    assert not failed.any()


def test_noise_is_the_hash_of_seed_position_and_token():
    torch.manual_seed(0)
    vocab, seeds, positions = 5000, [3, -(2**62), 2**40 + 5], [0, 17, 100_000]
    logits = torch.randn(3, vocab, device=DEVICE)
    ids, _ = choose(logits, params(3, temperature=0.7, seed=seeds, position=positions))
    for line, (seed, position) in enumerate(zip(seeds, positions, strict=True)):
        noisy = logits[line].cpu().double() / 0.7 + gumbel(seed, position, vocab)
        assert int(ids[line]) == int(noisy.argmax())


def test_draws_follow_the_softmax():
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    n = 600
    logits = (2.0 * probs.log()).expand(n, 4).contiguous().to(DEVICE)
    ids, _ = choose(logits, params(n, temperature=2.0, position=list(range(n)), seed=11))
    found = torch.bincount(ids, minlength=4) / n
    assert (found - probs).abs().max() < 0.07  # over three deviations


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


def test_restricted_rows_stay_inside_and_failures_are_told():
    torch.manual_seed(0)
    logits = torch.randn(12, 300, device=DEVICE)
    p = params(12, top_k=2, position=list(range(12)))
    ids, failed = choose(logits, p, restricted=True)
    best = logits.cpu().topk(2).indices
    assert ((ids[:, None] == best).any(-1)).all()
    assert not failed.any()
    logits[0, 3], logits[1, 4], logits[2] = float("nan"), float("inf"), float("-inf")
    _, failed = choose(logits, params(12))
    assert failed.nonzero().flatten().tolist() == [0, 1, 2]


def test_scatter_writes_the_next_input_but_not_past_the_context():
    logits = torch.randn(3, 40, device=DEVICE)
    tokens = torch.full((5, 6), -7, dtype=torch.int32, device=DEVICE)
    rows = torch.tensor([4, 1, -1], dtype=torch.int32, device=DEVICE)
    ids, _ = choose(logits, params(3, temperature=0.0, position=[2, 6, 1]), scatter=(tokens, rows))
    expected = torch.full((5, 6), -7, dtype=torch.int32)
    expected[4, 2] = ids[0]
    assert torch.equal(tokens.cpu(), expected)
