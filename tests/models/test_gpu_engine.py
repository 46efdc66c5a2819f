"""The engine on a GPU against the engine on a CPU, in float32."""

import pytest
import torch
from tiny_models import FAMILIES, make_model, make_text_model

from nanovllm import LLM, SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
GENERATOR = torch.Generator().manual_seed(3)
PROMPTS = [
    torch.randint(5, 199, (n,), generator=GENERATOR).tolist() for n in (1, 7, 33, 120, 64, 90)
]
GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
OPTIONS = {"dtype": "float32", "skip_tokenizer_init": True, "num_kv_blocks": 64}


def tokens(model, params, prompts=PROMPTS, **options):
    with LLM(str(model), **(OPTIONS | options)) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [output.outputs[0].error for output in outputs] == [None] * len(prompts)
    return [output.token_ids for output in outputs]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_the_cpu(family, directory):
    model = make_model(directory / family, family)
    want = tokens(model, GREEDY, device="cpu", block_size=32)
    assert tokens(model, GREEDY, device="cuda") == want
    chunked = {"max_num_batched_tokens": 50, "block_size": 16, "max_num_seqs": 3}
    assert tokens(model, GREEDY, device="cuda", **chunked) == want
    assert tokens(model, GREEDY, device="cuda", enforce_eager=True) == want


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.02},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5},
        {"min_tokens": 10, "logit_bias": {9: 2.0}},
    ],
)
def test_seeded_rows_do_not_depend_on_the_batch_or_on_graphs(changed, directory):
    model = make_model(directory / "sampled", "qwen3")
    params = SamplingParams(temperature=0.9, seed=5, max_tokens=20, ignore_eos=True, **changed)
    alone = tokens(model, params, PROMPTS[2:3], device="cuda")[0]
    assert len(set(alone)) > 3
    plain = SamplingParams(temperature=1.0, max_tokens=20, ignore_eos=True)
    mixed = [params if i == 2 else plain for i in range(len(PROMPTS))]
    assert tokens(model, mixed, device="cuda")[2] == alone
    assert tokens(model, mixed, device="cuda", enforce_eager=True)[2] == alone


SPECIAL = [
    {"repetition_penalty": 1.3, "frequency_penalty": 0.4},
    {"logit_bias": {9: 3.0, 17: -4.0}, "min_tokens": 12, "stop_token_ids": [9, 17]},
    {"allowed_token_ids": list(range(20, 60)), "logprobs": 2},
    {},
    {"presence_penalty": 1.5, "logprobs": 0},
    {"prompt_logprobs": 1, "repetition_penalty": 0.8},
]


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("rows", [1, 6, 30])
def test_rows_with_wishes_of_their_own_are_those_of_the_cpu(rows, eager, directory):
    model = make_model(directory / "wishes", "qwen3")
    prompts = [PROMPTS[i % 6] for i in range(rows)]
    wishes = [SPECIAL[(i + i // 6) % 6] for i in range(rows)]
    params = [
        SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, **wish) for wish in wishes
    ]
    want = tokens(model, params, prompts, device="cpu", block_size=32, num_kv_blocks=400)
    options = {"device": "cuda", "enforce_eager": eager, "num_kv_blocks": 400}
    assert tokens(model, params, prompts, **options) == want


def test_structured_rows_are_those_of_the_cpu(directory):
    """Beside rows without a form, with penalties of their own, eagerly and captured."""
    pytest.importorskip("llguidance")
    model = make_text_model(directory / "structured")
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    wishes = [
        {"structured_output": {"choice": ["left", "right"]}},
        {},
        {"structured_output": {"json": schema}, "logprobs": 1},
        {"structured_output": {"regex": "[a-c]{3,9}"}, "repetition_penalty": 1.2},
        {"frequency_penalty": 0.5},
    ] * 3
    params = [SamplingParams(temperature=0.0, max_tokens=16, **wish) for wish in wishes]
    prompts = [f"Question {i}:" for i in range(len(params))]
    found = []
    for options in ({"device": "cpu", "block_size": 32}, {}, {"enforce_eager": True}):
        changed = {"device": "cuda", "skip_tokenizer_init": False} | options
        with LLM(str(model), **(OPTIONS | changed)) as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
        found.append([(o.text, o.token_ids, o.finish_reason, o.outputs[0].error) for o in outputs])
    assert found[0][0][0] in ("left", "right")
    assert found[1] == found[0]
    assert found[2] == found[0]


def test_logprobs_are_those_of_the_cpu(directory):
    model = make_model(directory / "logprobs", "llama")
    params = SamplingParams(
        temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=3, prompt_logprobs=2
    )
    found = []
    for options in ({"device": "cpu", "block_size": 32}, {"device": "cuda"}):
        with LLM(str(model), **(OPTIONS | options)) as llm:
            found.append(llm.generate(PROMPTS, params, use_tqdm=False))
    for cpu, gpu in zip(*found, strict=True):
        assert gpu.token_ids == cpu.token_ids
        for ours, theirs in zip(gpu.logprobs, cpu.logprobs, strict=True):
            assert [*ours] == [*theirs]
            for token, entry in ours.items():
                assert entry.logprob == pytest.approx(theirs[token].logprob, abs=1e-3)


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[3:4]])
def test_bfloat16_logprobs_are_near_those_of_float32(prompts, directory):
    model = make_model(directory / "bfloat16", "qwen3", head_dim=64)
    params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=1, prompt_logprobs=0)
    found = []
    for dtype in ("float32", "bfloat16"):
        with LLM(str(model), **(OPTIONS | {"dtype": dtype, "device": "cuda"})) as llm:
            found.append(llm.generate(prompts, params, use_tqdm=False))
    for wide, narrow in zip(*found, strict=True):
        for ours, theirs in zip(narrow.prompt_logprobs[1:], wide.prompt_logprobs[1:], strict=True):
            for token, entry in ours.items():
                assert entry.logprob == pytest.approx(theirs[token].logprob, abs=0.15)


def test_fp8_cache_changes_logprobs_a_little(directory):
    model = make_model(directory / "fp8", "qwen3", head_dim=64)
    params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=1, prompt_logprobs=0)
    found = []
    for dtype in ("auto", "fp8"):
        with LLM(str(model), **(OPTIONS | {"kv_cache_dtype": dtype, "device": "cuda"})) as llm:
            found.append(llm.generate(PROMPTS, params, use_tqdm=False))
    gaps = [
        abs(entry.logprob - theirs[token].logprob)
        for exact, rounded in zip(*found, strict=True)
        for ours, theirs in zip(rounded.prompt_logprobs[1:], exact.prompt_logprobs[1:], strict=True)
        for token, entry in ours.items()
    ]
    assert 0 < sum(gaps) / len(gaps) < 0.1


def test_demo_model_answers_as_on_the_cpu():
    prompts = ["The capital of France is", "Once upon a time", "1 + 1 ="]
    params = SamplingParams(temperature=0.0, max_tokens=24)
    texts = []
    for device in ("cpu", "cuda"):
        with LLM("demo", device=device, dtype="float32", max_model_len=256) as llm:
            texts.append([output.text for output in llm.generate(prompts, params, use_tqdm=False)])
    assert texts[0] == texts[1]
