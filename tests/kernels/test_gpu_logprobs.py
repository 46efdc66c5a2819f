"""Log-probabilities of chosen tokens against a sort in float64."""

import pytest
import torch
from gpu_device import DEVICE

kernels = pytest.importorskip("nanovllm.kernels.gpu.logprobs")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("vocab", "count"), [(50, 1), (5000, 5), (9000, 20)])
def test_logprobs_ranks_and_best_tokens(vocab, count, dtype):
    torch.manual_seed(0)
    logits = (torch.randn(6, vocab, device=DEVICE) * 4).to(dtype)
    logits[2, 5:] = float("-inf")
    logits[4] = 1.0  # all alike: the lowest ids are the best
    lines = torch.tensor([4, 0, 2, 5], device=DEVICE)
    chosen = torch.tensor([7, 1, 3, 3, 11, vocab - 1], device=DEVICE)
    found = kernels.logprobs(logits, lines, chosen, count).cpu()
    half = (found.shape[1] - 3) // 2
    assert half >= count
    for line, row in zip(lines.tolist(), found, strict=True):
        exact = logits[line].cpu().double().log_softmax(-1)
        token = int(chosen[line])
        assert int(row[0]) == token
        assert float(row[1]) == pytest.approx(float(exact[token]), abs=1e-5)
        assert int(row[2]) == 1 + int((logits[line] > logits[line, token]).sum())
        order = sorted(range(vocab), key=lambda t: (-float(logits[line, t]), t))[:count]
        ids = row[3 + half : 3 + half + count].long().tolist()
        assert ids == order
        torch.testing.assert_close(row[3 : 3 + count], exact[ids], rtol=0, atol=1e-5)
