"""Rows with biases, bans and penalties: adjusted on the device as the sampler does it."""

import numpy as np
import pytest
import torch
from gpu_device import DEVICE

from nanovllm import SamplingParams
from nanovllm.engine.plan import NewRow, StepPlan
from nanovllm.runner.rows import RowState
from nanovllm.runner.sampler import BadWords, Sampler, token_logprobs

special = pytest.importorskip("nanovllm.runner.gpu_special")

VOCAB, STOPS = 5000, (3, 4)
SPELLINGS = {"a": [(7,), (8, 9)], "b": [(21, 22, 23)]}
PARAMS = [
    SamplingParams(temperature=0.0, logit_bias={5: 3.0, 6: -2.0}),
    SamplingParams(temperature=0.0, allowed_token_ids=[10, 11, 3], logit_bias={11: 9.0, 12: 50.0}),
    SamplingParams(temperature=0.0, min_tokens=6, stop_token_ids=[99]),
    SamplingParams(temperature=0.0, repetition_penalty=1.7),
    SamplingParams(temperature=0.0, presence_penalty=1.5, frequency_penalty=0.5, min_tokens=9),
    SamplingParams(temperature=0.0, bad_words=["a", "b"], repetition_penalty=0.5),
    SamplingParams(temperature=0.8, seed=4, top_k=3, frequency_penalty=-1.0, logit_bias={22: 4.0}),
]
PROMPT = [1, 5, 5, 12, 21]


def make(params):
    """Rows whose output is 22, 8 and some more, and the sampler that is the specification."""
    torch.manual_seed(0)
    rows = RowState(len(params) + 2, 64, 16, torch.device(DEVICE))
    words = BadWords(SPELLINGS.__getitem__)
    sampling_of = special.RowSampling(len(params) + 2)
    on_device = special.SpecialRows(rows, sampling_of, STOPS, words)
    ids = []
    for i, p in enumerate(params):
        row = len(params) + 1 - i
        output = [30, 22, 22, 21, 22] if i % 2 else [22, 8]
        new = NewRow(row, (*PROMPT, *output), len(PROMPT), 0, (), p, 1000 + i)
        rows.apply(StepPlan(0, (), (new,)))
        sampling_of.start(new)
        on_device.start(new)
        ids.append(row)
    return rows, on_device, Sampler(rows, STOPS, words), np.array(ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adjusted_logits_are_those_of_the_sampler(dtype):
    _, on_device, sampler, ids = make(PARAMS)
    logits = (torch.randn(len(PARAMS) + 3, VOCAB, device=DEVICE) * 3).to(dtype)
    lines = np.arange(len(PARAMS)) + 2
    *_, found = on_device.adjusted(logits, lines, ids, len(logits))
    for line, row, p, ours in zip(lines, ids, PARAMS, found, strict=True):
        want = logits[int(line)].float()
        sampler.adjust(want, int(row), p)
        torch.testing.assert_close(ours, want, rtol=1e-6, atol=1e-6)


def test_only_special_lines_are_chosen_again():
    rows, on_device, sampler, ids = make(PARAMS)
    logits = torch.randn(len(PARAMS) + 3, VOCAB, device=DEVICE) * 3
    lines = np.arange(len(PARAMS))[::-1] + 1
    choice = torch.full((2, 16), -7, dtype=torch.int64, device=DEVICE)
    rows_of_lines = np.zeros(len(logits), np.int64)
    rows_of_lines[lines] = ids
    lines_of = special.SpecialLines(rows_of_lines, lines, np.zeros(0, np.int64), False)
    assert on_device.choose(logits, lines_of, choice) == {}
    others = [i for i in range(16) if i not in lines]
    assert (choice[:, others] == -7).all()
    assert not choice[1, lines.copy()].any()
    for line, row, p in zip(lines, ids, PARAMS, strict=True):
        want = logits[int(line)].clone()
        sampler.adjust(want, int(row), p)
        token = int(choice[0, int(line)])
        assert want[token] >= want.topk(3).values[-1] if p.top_k else token == int(want.argmax())
        assert int(rows.tokens[row, rows.num_tokens[row]]) == token  # the next step's input


def test_min_tokens_counts_at_first_only():
    rows, on_device, _, ids = make(PARAMS)
    s = on_device._sampling
    num = rows.num_tokens[ids]
    assert s.special(ids, num).tolist() == [True] * 7
    assert not s.special(ids[2:3], np.array([len(PROMPT) + 6])).any()
    assert s.special(ids[2:3], np.array([len(PROMPT) + 5])).all()


@pytest.mark.skipif(DEVICE == "cpu", reason="downloads need page-locked memory")
def test_logprobs_are_those_of_the_sampler():
    params = [SamplingParams(temperature=0.0, logprobs=n) for n in (0, 3, 20)]
    _, on_device, _, ids = make(params)
    logits = torch.randn(9, VOCAB, device=DEVICE)
    choice = torch.arange(18, device=DEVICE).view(2, 9)
    lines = np.array([7, 1, 4])
    rows_of_lines = np.zeros(len(logits), np.int64)
    rows_of_lines[lines] = ids
    lines_of = special.SpecialLines(rows_of_lines, np.zeros(0, np.int64), lines, False)
    found = on_device.logprobs(logits, lines_of, choice).take()
    want = token_logprobs(logits[lines.tolist()], choice[0, lines.tolist()], [0, 3, 20])
    for line, wanted in zip(lines.tolist(), want, strict=True):
        ours = found[line]
        assert (ours.token_id, ours.rank) == (wanted.token_id, wanted.rank)
        assert ours.logprob == pytest.approx(wanted.logprob, abs=1e-5)
        assert [token for token, _ in ours.top] == [token for token, _ in wanted.top]
