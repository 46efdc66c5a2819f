"""bfloat16 on a GPU beside transformers in bfloat16: both against float32, over the same contexts.

Rounding alone may differ, so our logits may be at most a little further from float32 than those of
transformers; and with a KV cache of 8-bit floats, at most a little further than float32 with such a
cache. `pytest -s` prints the numbers.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from reference import engine_logits, open_model, prompts_of, runner_of, use_torch_ops
from tiny_models import FAMILIES
from torch import Tensor

from nanovllm import LLM
from nanovllm.attention import torch_ref
from nanovllm.model_files import find_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
TEXTS = [
    "The capital of France is Paris, and the capital of Spain is Madrid.",
    "Once upon a time there was a small house at the edge of the forest.",
    "To make a cup of tea, first boil some water, then put the leaves into a pot.",
]


@torch.inference_mode()
def theirs(directory: Path, prompts: list[list[int]], dtype: torch.dtype) -> list[Tensor]:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation="sdpa"
    )
    model = model.eval().to("cuda")
    return [model(torch.tensor([ids], device="cuda")).logits[0].float() for ids in prompts]


def ours(directory: Path, prompts: list[list[int]], chunk: int, **options: Any) -> list[Tensor]:
    """Through the fused forward pass, `chunk` tokens of every prompt a step."""
    changed = {"device": "cuda", "dtype": "bfloat16", "num_kv_blocks": 200, "block_size": 16}
    with open_model(directory, **(changed | options)) as llm:
        runner: Any = runner_of(llm)
        forward = runner._forward
        model = SimpleNamespace(
            forward=forward.hidden, logits=lambda hidden: forward.logits(hidden).float()
        )
        parts = SimpleNamespace(
            rows=runner.rows, kv_cache=runner.kv_cache, device=runner.device, model=model
        )
        with torch.inference_mode():
            return engine_logits(parts, prompts, chunk)  # type: ignore[arg-type]


def with_rounded_cache(directory: Path, prompts: list[list[int]]) -> list[Tensor]:
    """float32 in plain torch on the CPU, keys and values rounded to 8 bits when they are stored."""
    store = torch_ref.store_kv

    def store_rounded(k: Tensor, v: Tensor, kv_cache: Tensor, slots: Tensor) -> None:
        k, v = (x.to(torch.float8_e4m3fn).to(x.dtype) for x in (k, v))
        store(k, v, kv_cache, slots)

    with pytest.MonkeyPatch.context() as patch:
        use_torch_ops(patch)
        patch.setattr(torch_ref, "store_kv", store_rounded)
        with open_model(directory, "torch", num_kv_blocks=200, block_size=16) as llm:
            return engine_logits(runner_of(llm), prompts, 1 << 20)


def compare(name: str, directory: Path, prompts: list[list[int]]) -> None:
    """Asserts and prints errors against float32, and how often the first choice is the same."""
    exact = torch.cat(theirs(directory, prompts, torch.float32))
    peer = torch.cat(theirs(directory, prompts, torch.bfloat16))
    found = {"transformers": peer}
    for label, chunk, options in (
        ("ours, prompts", 1 << 20, {}),
        ("ours, single tokens", 1, {}),
        ("ours, invariant", 1 << 20, {"batch_invariant": True}),
    ):
        found[label] = torch.cat(ours(directory, prompts, chunk, **options))
    errors = {label: float((x - exact).norm() / exact.norm()) for label, x in found.items()}
    best = exact.argmax(-1)
    for label, x in found.items():
        same, as_peer = (float((x.argmax(-1) == y).float().mean()) for y in (best, peer.argmax(-1)))
        print(
            f"{name:<18} {label:<20} error {errors[label]:.2e}, first choice as float32 "
            f"{same:6.1%}, as transformers bf16 {as_peer:6.1%}, {len(best)} positions"
        )
        assert errors[label] < 1.3 * errors["transformers"] + 1e-4
        sure = exact.topk(2).values.diff().abs().squeeze(-1) > 0.1 * exact.std()
        assert torch.equal(x.argmax(-1)[sure], best[sure])


def compare_narrow(name: str, directory: Path, prompts: list[list[int]]) -> None:
    """The same of a KV cache of 8-bit floats, beside float32 with such a cache."""
    exact = torch.cat(theirs(directory, prompts, torch.float32))
    found = {"float32, 8 bits": torch.cat(with_rounded_cache(directory, prompts)).to(exact.device)}
    for label, chunk in (("ours, prompts", 1 << 20), ("ours, single tokens", 1)):
        found[label] = torch.cat(ours(directory, prompts, chunk, kv_cache_dtype="fp8"))
    errors = {label: float((x - exact).norm() / exact.norm()) for label, x in found.items()}
    best = exact.argmax(-1)
    sure = exact.topk(2).values.diff().abs().squeeze(-1) > 0.5 * exact.std()
    for label, x in found.items():
        same = float((x.argmax(-1) == best).float().mean())
        print(
            f"{name:<18} {label:<20} error {errors[label]:.2e} with a cache of 8 bits, "
            f"first choice as float32 {same:6.1%}, {len(best)} positions"
        )
        assert errors[label] < 1.3 * errors["float32, 8 bits"]
        assert torch.equal(x.argmax(-1)[sure], best[sure])


@pytest.mark.parametrize("family", FAMILIES)
def test_random_models(family: str, models: Any) -> None:
    compare(family, models(family), prompts_of([70, 33, 120], seed=2))


@pytest.mark.parametrize("family", FAMILIES)
def test_random_models_with_a_cache_of_8_bit_floats(family: str, models: Any) -> None:
    compare_narrow(family, models(family), prompts_of([70, 33, 120], seed=2))


def test_demo_model() -> None:
    with LLM("demo", device="cuda", dtype="bfloat16", max_model_len=512) as llm:
        outputs = llm.generate(TEXTS, max_tokens=100, temperature=0.0, use_tqdm=False)
        prompts = [[*output.prompt_token_ids, *output.token_ids] for output in outputs]
    compare("demo", find_model("demo").directory, prompts)
    compare_narrow("demo", find_model("demo").directory, prompts)
