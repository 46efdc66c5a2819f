"""Structured output through the whole engine: forms hold whatever else happens in a batch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from schemas import DIGIT, SCHEMAS, UNBOUNDED, items, record

from nanovllm import LLM, InvalidRequestError, LLMEngine, SamplingParams

FORM = record("name", "n", name={"type": "string", "maxLength": 8}, n=items(DIGIT, 2, 5))
END = 3  # of the tiny model's texts
FREE = SamplingParams(temperature=1.0, seed=5, max_tokens=24, ignore_eos=True, logprobs=1)


def formed(structure: dict[str, Any], **more: Any) -> SamplingParams:
    defaults = {"temperature": 1.0, "seed": 7, "max_tokens": 220}
    return SamplingParams(**(defaults | more), structured_output=structure)


def open_tiny(directory: Path, **options: Any) -> LLM:
    defaults: dict[str, Any] = {"dtype": "float32", "max_model_len": 256, "block_size": 8}
    return LLM(str(directory), **(defaults | options))


@pytest.fixture(scope="module")
def tiny(text_model: Path) -> Iterator[LLM]:
    with open_tiny(text_model, max_num_seqs=32) as llm:
        yield llm


@pytest.fixture(scope="module")
def demo() -> Iterator[LLM]:
    with LLM("demo", max_model_len=512) as llm:
        yield llm


def check(text: str, schema: Any) -> None:
    jsonschema.Draft202012Validator(
        schema, format_checker=jsonschema.FormatChecker(["date", "ipv4", "uuid"])
    ).validate(json.loads(text))


@pytest.mark.parametrize("model", ["tiny", "demo"])
def test_outputs_satisfy_their_schemas(model: str, request: pytest.FixtureRequest) -> None:
    """All schemas in one batch, four samples of each, at temperature 1."""
    assert len(SCHEMAS) >= 50
    llm: LLM = request.getfixturevalue(model)
    params = [formed({"json": schema}, n=4) for schema in SCHEMAS.values()]
    outputs = llm.generate(["Give me an example: "] * len(SCHEMAS), params, use_tqdm=False)
    for (name, schema), output in zip(SCHEMAS.items(), outputs, strict=True):
        for sample in output.outputs:
            assert sample.error is None
            if sample.finish_reason == "length":
                assert name in UNBOUNDED, (name, sample.text)
            else:
                assert sample.finish_reason == "stop"
                check(sample.text, schema)


def test_samples_differ_and_seeds_repeat(tiny: LLM) -> None:
    params = formed({"json": FORM}, n=4)
    first, second = (tiny.generate("x", params, use_tqdm=False) for _ in range(2))
    texts = [sample.text for sample in first.outputs]
    assert len(set(texts)) == 4
    assert texts == [sample.text for sample in second.outputs]
    for text in texts:
        check(text, FORM)


def test_greedy(tiny: LLM) -> None:
    params = formed({"regex": "[a-z]{5}"}, temperature=0)
    first, second = (tiny.generate("x", params, use_tqdm=False).text for _ in range(2))
    assert first == second
    assert re.fullmatch("[a-z]{5}", first)


def tokens_of(outputs: list[Any]) -> list[Any]:
    return [(o.token_ids, o.text, o.logprobs) for output in outputs for o in output.outputs]


def test_free_rows_do_not_notice(text_model: Path) -> None:
    """Bit-identical tokens and log-probabilities with and without constrained neighbours."""
    prompts = ["The quick brown", "你好", "x", "a b c d e f g"]
    with open_tiny(text_model) as llm:
        alone = llm.generate(prompts, FREE, use_tqdm=False)
        mixed_prompts = [p for prompt in prompts for p in (prompt, prompt)]
        params = [FREE, formed({"json": FORM})] * len(prompts)
        mixed = llm.generate(mixed_prompts, params, use_tqdm=False)
    assert tokens_of(mixed[::2]) == tokens_of(alone)
    for output in mixed[1::2]:
        check(output.text, FORM)


def test_the_same_whatever_happens(text_model: Path) -> None:
    """Preempted in the middle, chunked, cached, planned ahead or not, alone or not."""
    prompt, params = "The quick brown fox jumps", formed({"json": FORM}, n=2, logprobs=0)
    found = []
    for ahead in (True, False):
        for preempted in (False, True):
            for others in (0, 5):
                with open_tiny(
                    text_model,
                    async_scheduling=ahead,
                    max_num_batched_tokens=16,
                    max_num_seqs=8,
                    enable_prefix_caching=others > 0,
                ) as llm:
                    found.append(steps(llm, prompt, params, others, preempted))
    for text in found[0]:
        check(text[0], FORM)
    assert all(other == found[0] for other in found)


def steps(llm: LLM, prompt: str, params: SamplingParams, others: int, preempted: bool) -> Any:
    core = llm._engine.core
    for i in range(others):
        llm.add_request(f"other {i}", FREE if i % 2 else formed({"json": FORM}, seed=i))
    name = llm.add_request(prompt, params)
    sequences = list(core._groups[name])
    done = None
    while not llm.is_finished():
        for output in llm.step():
            if output.request_id == name and output.finished:
                done = output
        for seq in sequences if preempted else ():
            if seq.num_output_tokens >= 5 and seq.block_table and not seq.stats.num_preemptions:
                core.scheduler._preempt(seq)  # as if another needed its blocks
    assert done is not None
    assert all((o.metrics.num_preemptions > 0) == preempted for o in done.outputs)
    return [(o.text, o.token_ids) for o in done.outputs]


def test_a_pool_too_small_for_all(text_model: Path) -> None:
    """Real preemption: more rows than blocks."""
    with open_tiny(text_model, num_kv_blocks=24, max_num_seqs=16) as llm:
        outputs = llm.generate(["abc"] * 12, formed({"json": FORM}, seed=None), use_tqdm=False)
        assert sum(output.metrics.num_preemptions for output in outputs) > 0
        for output in outputs:
            assert output.finish_reason == "stop"
            check(output.text, FORM)
        llm._engine.core.scheduler.check_integrity()


def test_the_end_comes_when_the_form_is_complete(tiny: LLM) -> None:
    output = tiny.generate("x", formed({"choice": ["yes"]}, max_tokens=None), use_tqdm=False)
    assert (output.text, output.finish_reason, output.stop_reason) == ("yes", "stop", None)
    assert output.token_ids[-1] == END
    short = tiny.generate("x", formed({"regex": "a{20}"}, max_tokens=5), use_tqdm=False)
    assert short.finish_reason == "length"
    assert set(short.text) == {"a"}


def test_wishes_give_way_to_the_form(tiny: LLM) -> None:
    """min_tokens and bad words count only where the form leaves a choice."""
    for more in (
        {"min_tokens": 50},
        {"bad_words": ["yes", "y", "e", "s"]},
        {"stop_token_ids": [5]},
    ):
        output = tiny.generate("x", formed({"choice": ["yes"]}, **more), use_tqdm=False)
        assert (output.text, output.finish_reason) == ("yes", "stop")
    letters = formed({"regex": "[ab]{30}"}, bad_words=["a"], n=4)
    for sample in tiny.generate("x", letters, use_tqdm=False).outputs:
        assert sample.text == "b" * 30
    longer = formed({"regex": "a*"}, min_tokens=20, n=4, max_tokens=60)
    for sample in tiny.generate("x", longer, use_tqdm=False).outputs:
        assert len(sample.token_ids) >= 20
    liked = formed({"regex": "[ab]{30}"}, logit_bias={tiny.tokenizer.encode("a")[0]: 100})
    assert tiny.generate("x", liked, use_tqdm=False).text.count("a") > 20


def test_cuts_and_penalties_apply_to_what_is_allowed(tiny: LLM) -> None:
    for more in (
        {"top_k": 1},
        {"top_p": 0.01},
        {"min_p": 1.0},
        {"temperature": 0},
        {"repetition_penalty": 1.3, "presence_penalty": 1.0, "frequency_penalty": -1.0},
    ):
        output = tiny.generate("x", formed({"json": FORM}, **more), use_tqdm=False)
        assert output.finish_reason == "stop"
        check(output.text, FORM)


def test_logprobs_are_of_the_free_distribution(tiny: LLM) -> None:
    output = tiny.generate("x", formed({"regex": "[a-c]{6}"}, logprobs=2), use_tqdm=False)
    assert output.logprobs is not None
    assert len(output.logprobs) == len(output.token_ids)
    for entry, token in zip(output.logprobs, output.token_ids, strict=True):
        assert next(iter(entry)) == token
        assert entry[token].logprob <= max(other.logprob for other in entry.values())
    assert any(next(iter(entry.values())).rank > 1 for entry in output.logprobs)


def test_stop_strings_end_before_the_form_does(tiny: LLM) -> None:
    output = tiny.generate("x", formed({"regex": "[ab]{60}"}, stop="b"), use_tqdm=False)
    assert output.finish_reason == "stop"
    assert set(output.text) <= {"a"}


def test_abort_in_the_middle(tiny: LLM) -> None:
    name = tiny.add_request("x", formed({"regex": "a{100}"}))
    for _ in range(6):
        tiny.step()
    tiny.abort(name)
    while not tiny.is_finished():
        tiny.step()
    assert tiny.generate("x", formed({"choice": ["ok"]}), use_tqdm=False).text == "ok"


def test_cached_prefixes_are_shared_with_free_rows(text_model: Path) -> None:
    with open_tiny(text_model) as llm:
        prompt = "The quick brown fox jumps over the lazy dog"
        first = llm.generate(prompt, FREE, use_tqdm=False)
        output = llm.generate(prompt, formed({"json": FORM}), use_tqdm=False)
        assert output.metrics.num_cached_tokens > 0
        check(output.text, FORM)
        assert tokens_of([llm.generate(prompt, FREE, use_tqdm=False)]) == tokens_of([first])


def test_a_form_that_grows_too_complex_ends_its_own_request(
    tiny: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanovllm.grammar.compiler.MAX_MASK_SECONDS", -1.0)
    monkeypatch.setattr("nanovllm.grammar.compiler.GrammarCompiler._probe", lambda self, m: None)
    params = [formed({"regex": "z{3}|never seen before"}), FREE]
    bad, good = tiny.generate(["x", "x"], params, use_tqdm=False)
    assert bad.finish_reason == "error"
    assert "a mask took" in bad.error
    assert good.finish_reason == "length"


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"structured_output": {"regex": "("}}, "regex"),
        ({"structured_output": {"json": {"type": 1}}}, "json"),
        ({"structured_output": {}}, "exactly one"),
        ({"structured_output": "json"}, "mapping"),
        ({"structured_output": {"regx": "a"}}, "'regex'"),
        ({"structured_output": {"regex": "a"}, "ignore_eos": True}, "ignore_eos"),
        ({"structured_output": {"regex": "a"}, "allowed_token_ids": [7]}, "allowed_token_ids"),
    ],
)
def test_what_is_refused(tiny: LLM, options: dict[str, Any], word: str) -> None:
    with pytest.raises(InvalidRequestError, match=word):
        tiny.generate("x", use_tqdm=False, **options)
    assert tiny.is_finished()


def test_without_a_tokenizer(text_model: Path) -> None:
    with (
        LLMEngine(str(text_model), skip_tokenizer_init=True, max_model_len=64) as engine,
        pytest.raises(InvalidRequestError, match="tokenizer"),
    ):
        engine.add_request([5], formed({"regex": "a"}))
