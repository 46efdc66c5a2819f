"""Streams, batches and their bookkeeping: what is joined equals what is returned at once."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, Delta, RequestMetrics, RequestOutput, SamplingParams
from nanovllm.engine.sequence import Sequence
from nanovllm.requests import RequestTracker
from nanovllm.trace.events import ListTracer, StepDone, StepPlanned

OPTIONS: dict[str, Any] = {"dtype": "float32", "max_num_seqs": 4, "block_size": 8}
SEEDED = SamplingParams(seed=3, max_tokens=40, ignore_eos=True)


@pytest.fixture(scope="module")
def shared(text_model: Path) -> Iterator[LLM]:
    with LLM(str(text_model), num_kv_blocks=64, max_model_len=256, **OPTIONS) as llm:
        yield llm


@pytest.fixture
def llm(shared: LLM) -> Iterator[LLM]:
    yield shared
    assert num_used(shared) == 0
    assert not shared._tracker.outputs
    assert not shared._tracker._completions


def num_used(llm: LLM) -> int:
    return llm._engine.core.scheduler.blocks.num_used


def joined(deltas: list[Delta], index: int) -> tuple[str, list[int], str | None]:
    mine = [delta for delta in deltas if delta.index == index]
    assert all(delta.finish_reason is None for delta in mine[:-1])
    token_ids = [token_id for delta in mine for token_id in delta.token_ids]
    return "".join(delta.text for delta in mine), token_ids, mine[-1].finish_reason


CASES = {
    "plain": SEEDED,
    "greedy": SamplingParams(temperature=0, max_tokens=40),
    "several": SamplingParams(seed=3, max_tokens=30, n=3, temperature=1.2),
    "stop string": SamplingParams(
        seed=3, max_tokens=40, ignore_eos=True, stop=["o", "好", "\ufffd"]
    ),
    "stop included": SamplingParams(
        seed=3, max_tokens=40, stop="a", include_stop_str_in_output=True
    ),
    "stop token": SamplingParams(seed=3, max_tokens=40, stop_token_ids=list(range(200, 384))),
    "no text": SamplingParams(seed=3, max_tokens=20, ignore_eos=True, detokenize=False),
    "logprobs": SamplingParams(seed=3, max_tokens=5, logprobs=3, prompt_logprobs=2),
}


@pytest.mark.parametrize("name", CASES)
def test_stream_equals_generate(llm: LLM, name: str) -> None:
    params = CASES[name]
    whole = llm.generate("Tell me about 你好", params, use_tqdm=False)
    deltas = list(llm.stream("Tell me about 你好", params))
    assert len(whole.outputs) == params.n
    for output in whole.outputs:
        expected = (output.text, output.token_ids, output.finish_reason)
        assert joined(deltas, output.index) == expected
        assert output.finish_reason in ("stop", "length")
    if params.detokenize and not params.stop and not params.stop_token_ids and params.ignore_eos:
        assert whole.text == llm.tokenizer.decode(whole.token_ids)
    for stop in params.stop or ():
        assert params.include_stop_str_in_output or stop not in whole.text


def test_stop_string_is_reported_and_cut(llm: LLM) -> None:
    text = llm.generate("Hello", SEEDED, use_tqdm=False).text
    stop = text[5:8]
    output = llm.generate(
        "Hello", seed=3, max_tokens=40, ignore_eos=True, stop=stop, use_tqdm=False
    )
    assert output.text == text[: text.index(stop)]
    assert (output.finish_reason, output.outputs[0].stop_reason) == ("stop", stop)


def test_minimum_comes_before_any_end(llm: LLM) -> None:
    options: dict[str, Any] = {"seed": 3, "max_tokens": 30, "use_tqdm": False}
    biased = {"logit_bias": {3: 50.0}}
    assert llm.generate("Hello", **options, **biased).token_ids == [3]
    output = llm.generate("Hello", **options, **biased, min_tokens=7)
    assert len(output.token_ids) == 8
    assert output.token_ids[-1] == 3
    assert output.text == llm.tokenizer.decode(output.token_ids[:-1])


def test_mixed_prompts_keep_their_order(llm: LLM) -> None:
    ids = llm.tokenizer.encode("as ids")
    prompts: list[Any] = [
        "short",
        ids,
        "a much longer prompt than all of the others " * 3,
        [5],
        "x",
    ]
    params = [
        SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (9, 1, 4, 12, 2)
    ]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [len(output.token_ids) for output in outputs] == [9, 1, 4, 12, 2]
    assert [output.prompt for output in outputs] == ["short", None, prompts[2], None, "x"]
    assert outputs[1].prompt_token_ids == ids
    for prompt, p, output in zip(prompts, params, outputs, strict=True):
        assert llm.generate(prompt, p, use_tqdm=False).token_ids == output.token_ids
    assert llm.generate([], use_tqdm=False) == []


def test_shapes_of_results(llm: LLM) -> None:
    one = llm.generate("Hello", SEEDED, use_tqdm=False)
    assert isinstance(one, RequestOutput)
    assert one["text"] == one.text == one.outputs[0].text
    assert one["token_ids"] == one.outputs[0].token_ids
    with pytest.raises(KeyError, match="nothing"):
        one["nothing"]
    with pytest.raises(KeyError, match="one prompt gives one output"):
        one[0]  # type: ignore[index]
    assert isinstance(llm.generate([5, 6, 7], SEEDED, use_tqdm=False), RequestOutput)
    assert isinstance(llm.generate(["Hello"], SEEDED, use_tqdm=False), list)


def test_chat_is_its_rendered_prompt(llm: LLM) -> None:
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    rendered = llm.render_chat(talk)
    text = "<|start|>user\nHi<|end|>\n<|start|>assistant\nHo<|end|>\n<|start|>assistant\n"
    assert rendered == llm.tokenizer.encode(text, add_special_tokens=False)
    assert rendered[0] == 1
    answer = llm.chat(talk, SEEDED)
    assert answer.token_ids == llm.generate(rendered, SEEDED, use_tqdm=False).token_ids
    both = llm.chat([talk, talk[:1]], SEEDED)
    assert both[0].token_ids == answer.token_ids


def test_leaving_a_stream_frees_its_blocks(llm: LLM) -> None:
    stream = llm.stream("Hello", seed=1, max_tokens=100, ignore_eos=True)
    assert num_used(llm) == 0
    next(stream)
    assert num_used(llm) > 0
    stream.close()
    assert num_used(llm) == 0
    assert llm.is_finished()


def test_two_streams_at_once(llm: LLM) -> None:
    alone = [list(llm.stream(prompt, SEEDED)) for prompt in ("one", "two")]
    first, second = llm.stream("one", SEEDED), llm.stream("two", SEEDED)
    mixed: list[list[Delta]] = [[next(first)], [next(second)]]
    mixed[0] += first
    # The second stream's tokens went by while the first was read: none may be lost.
    mixed[1] += second
    for got, expected in zip(mixed, alone, strict=True):
        assert joined(got, 0) == joined(expected, 0)


def test_calls_and_queued_requests_mix(llm: LLM) -> None:
    """generate() advances what was queued before it; step() reports that afterwards."""
    name = llm.add_request("queued", SEEDED)
    expected = llm.generate("queued", SEEDED, use_tqdm=False).token_ids
    llm.generate(["x"] * 3, SEEDED, use_tqdm=False)
    assert not llm.is_finished()
    (output,) = llm.step()
    assert (output.request_id, output.token_ids, output.finished) == (name, expected, True)
    assert llm.is_finished()
    assert llm.step() == []


def test_abort_from_outside_ends_a_stream(llm: LLM) -> None:
    stream = llm.stream("Hello", SEEDED)
    first = next(stream)
    llm.abort(first.request_id)
    rest = list(stream)
    assert rest[-1].finish_reason == "abort"
    assert llm.is_finished()


def test_bad_words_never_appear(llm: LLM) -> None:
    params = SamplingParams(seed=3, max_tokens=60, ignore_eos=True, temperature=0.8)
    text = llm.generate("Hello", params, use_tqdm=False).text
    letters = {letter for letter in text if letter.isascii() and letter.isalpha()}
    words = sorted(letters)[:5]
    tame = SamplingParams(seed=3, max_tokens=60, ignore_eos=True, temperature=0.8, bad_words=words)
    forbidden = {ids for word in words for ids in llm.tokenizer.spellings(word)}
    token_ids = llm.generate("Hello", tame, use_tqdm=False).token_ids
    for length in {len(ids) for ids in forbidden}:
        windows = {tuple(token_ids[i : i + length]) for i in range(len(token_ids))}
        assert not windows & forbidden
    assert len(words) == 5


@pytest.mark.parametrize("num_steps", range(7))
def test_abort_in_every_state(text_model: Path, num_steps: int) -> None:
    """Waiting, in the middle of a chunked prompt, decoding with plans in flight, finished."""
    prompts = [[5, 6, 7] * 5, [8, 9] * 10]
    with LLM(str(text_model), **OPTIONS | {"max_num_seqs": 1}, max_num_batched_tokens=6) as llm:
        expected = llm.generate(prompts[1], max_tokens=5, seed=1, use_tqdm=False).token_ids
        names = [llm.add_request(prompt, SamplingParams(max_tokens=2)) for prompt in prompts]
        for _ in range(num_steps):
            llm.step()
        for name in names:
            llm.abort(name)
        assert num_used(llm) == 0
        ended = llm.step()
        assert llm.is_finished()
        assert all(output.finished for output in ended)
        assert not llm._tracker.outputs
        again = llm.generate(prompts[1], max_tokens=5, seed=1, use_tqdm=False)
        assert again.token_ids == expected


def test_completions_share_the_blocks_of_their_prompt(text_model: Path) -> None:
    with LLM(str(text_model), **OPTIONS, num_kv_blocks=32, enable_prefix_caching=False) as llm:
        llm.add_request([5, 6] * 32, SamplingParams(n=4, max_tokens=8, ignore_eos=True))
        most = 0
        while not llm.is_finished():
            llm.step()
            most = max(most, num_used(llm))
    assert 8 + 4 <= most <= 8 + 2 * 4  # not 4 times 9: a copied block and a new one each


def test_metrics(llm: LLM) -> None:
    prompt = list(range(10, 60))
    llm.generate(prompt, max_tokens=1, use_tqdm=False)
    metrics = llm.generate(prompt, max_tokens=9, ignore_eos=True, use_tqdm=False).metrics
    assert 0 <= metrics.queue_time < metrics.time_to_first_token < metrics.total_time
    assert (metrics.num_prompt_tokens, metrics.num_generated_tokens) == (50, 9)
    assert (metrics.num_cached_tokens, metrics.num_preemptions) == (48, 0)


def test_metrics_are_counted_from_the_arrival() -> None:
    def metrics_of(**stats: float) -> RequestMetrics:
        """Of a request that arrived at 100 and was ended at 160."""
        seq = Sequence(0, [5, 6], SamplingParams(), request_id="a", arrival=100.0)
        tracker = RequestTracker(None, lambda seq: None)
        tracker.add("a", None, [5, 6], seq.params, [seq])
        for name, value in stats.items():
            setattr(seq.stats, name, value)
        seq.token_ids += [7, 8, 9]
        metrics = tracker.end(seq, "abort").metrics
        assert metrics is not None
        return metrics

    assert metrics_of(
        first_scheduled=103.0,
        first_token=110.0,
        finished=160.0,
        num_cached_tokens=1,
        num_preemptions=4,
    ) == RequestMetrics(3.0, 10.0, 60.0, 2, 1, 3, 4)
    # One that never ran waited to its end.
    assert metrics_of(finished=160.0) == RequestMetrics(60.0, 60.0, 60.0, 2, 0, 3, 0)


def test_salts_keep_caches_apart(llm: LLM) -> None:
    def cached(salt: str) -> int:
        name = llm.add_request(list(range(60, 100)), SamplingParams(max_tokens=1), cache_salt=salt)
        while not llm.is_finished():
            for output in llm.step():
                assert output.request_id == name
        return output.metrics.num_cached_tokens

    assert [cached("a"), cached("a"), cached("b"), cached(""), cached("b")] == [0, 32, 0, 0, 32]
    # Text that is no Unicode is a salt as good as any, and not the empty one.
    assert [cached("\ud800"), cached("\ud801"), cached("\ud800")] == [0, 0, 32]


def test_events_tell_the_story(text_model: Path) -> None:
    tracer = ListTracer()
    with LLM(str(text_model), tracer=tracer, **OPTIONS) as llm:
        llm.generate(["Hello", "world"], SEEDED, use_tqdm=False)
    kinds = [type(event).__name__ for event in tracer.events]
    assert kinds.count("SequenceAdmitted") == kinds.count("SequenceFinished") == 2
    planned = [event for event in tracer.events if isinstance(event, StepPlanned)]
    assert [event.step_id for event in planned] == list(range(len(planned)))
    times = [event.time for event in tracer.events]
    assert all(before <= after for before, after in pairwise(times))


@pytest.mark.parametrize("ahead", [True, False])
def test_the_next_step_is_planned_while_one_runs(text_model: Path, ahead: bool) -> None:
    tracer = ListTracer()
    with LLM(str(text_model), tracer=tracer, async_scheduling=ahead, **OPTIONS) as llm:
        llm.generate("Hello", SEEDED, use_tqdm=False)
    order = [
        (type(event).__name__, event.step_id)
        for event in tracer.events
        if isinstance(event, StepPlanned | StepDone)
    ]
    for step_id in range(10):
        done, planned = ("StepDone", step_id), ("StepPlanned", step_id + 1)
        assert (order.index(planned) < order.index(done)) == ahead


def test_two_engines_in_one_process(text_model: Path, models: Any) -> None:
    """They take turns step by step and answer as they do alone."""
    other = str(models("mistral"))
    with LLM(str(text_model), **OPTIONS) as a, LLM(other, skip_tokenizer_init=True, **OPTIONS) as b:
        prompt = [5, 6, 7, 8] * 6
        expected = [engine.generate(prompt, SEEDED, use_tqdm=False).token_ids for engine in (a, b)]
        streams = [engine.stream(prompt, SEEDED) for engine in (a, b)]
        found: list[list[int]] = [[], []]
        for pair in zip(*streams, strict=True):
            for tokens, delta in zip(found, pair, strict=True):
                tokens += delta.token_ids
    assert found == expected
    assert found[0] != found[1]
