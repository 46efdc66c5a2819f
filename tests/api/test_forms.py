"""The forms in which prompts and sampling options may come, all with the same result."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nanovllm import LLM, AsyncLLM, InvalidRequestError, RequestOutput, SamplingParams

OPTIONS: dict[str, Any] = {"dtype": "float32", "max_num_seqs": 4, "block_size": 8}
IDS = [5, 6, 7, 8]
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
KEYWORDS: dict[str, Any] = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}


@pytest.fixture(scope="module")
def llm(text_model: Path) -> Iterator[LLM]:
    with LLM(str(text_model), **OPTIONS) as llm:
        yield llm


@pytest.mark.parametrize(
    "prompt",
    [tuple(IDS), range(5, 9), np.array(IDS), np.array(IDS, np.uint8), list(np.array(IDS)),
     torch.tensor(IDS)],
    ids=lambda prompt: type(prompt).__name__,
)  # fmt: skip
def test_token_ids(llm: LLM, prompt: Any) -> None:
    expected = llm.generate(IDS, GREEDY, use_tqdm=False)
    output = llm.generate(prompt, GREEDY, use_tqdm=False)
    assert isinstance(output, RequestOutput)
    assert output.token_ids == expected.token_ids
    assert output.prompt_token_ids == IDS
    assert {type(token_id) for token_id in output.prompt_token_ids} == {int}
    (batched,) = llm.generate([prompt], GREEDY, use_tqdm=False)
    assert batched.token_ids == expected.token_ids
    deltas = llm.stream(prompt, GREEDY)
    assert [i for delta in deltas for i in delta.token_ids] == expected.token_ids


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_batches(llm: LLM, kind: Any) -> None:
    expected = llm.generate([IDS, IDS[::-1]], GREEDY, use_tqdm=False)
    outputs = llm.generate(kind([IDS, IDS[::-1]]), GREEDY, use_tqdm=False)
    assert [o.token_ids for o in outputs] == [o.token_ids for o in expected]
    assert llm.generate([], GREEDY, use_tqdm=False) == []


@pytest.mark.parametrize(
    "prompt", [np.array([1.0, 2.0]), torch.tensor([True]), np.array(5), {5: 6}, np.array(["a"])],
    ids=str,
)  # fmt: skip
def test_what_is_neither_text_nor_ids(llm: LLM, prompt: Any) -> None:
    with pytest.raises(InvalidRequestError, match="prompt"):
        llm.generate([prompt], GREEDY, use_tqdm=False)
    with pytest.raises(InvalidRequestError, match="prompt"):
        llm.add_request(prompt, GREEDY)
    assert llm.is_finished()


def test_sampling_keywords_everywhere(llm: LLM, text_model: Path) -> None:
    expected = llm.generate(IDS, GREEDY, use_tqdm=False).token_ids
    assert llm.generate(IDS, use_tqdm=False, **KEYWORDS).token_ids == expected
    request_id = llm.add_request(IDS, **KEYWORDS)
    while not llm.is_finished():
        (output,) = llm.step()
    assert (output.request_id, output.token_ids) == (request_id, expected)

    async def run() -> list[int]:
        engine = AsyncLLM(str(text_model), **OPTIONS)
        try:
            with pytest.raises(InvalidRequestError, match="did you mean 'max_tokens'"):
                await anext(engine.generate(IDS, max_token=5))
            deltas = engine.generate(np.array(IDS), **KEYWORDS)
            return [token_id async for delta in deltas for token_id in delta.token_ids]
        finally:
            engine.close()

    assert asyncio.run(run()) == expected


def test_wrong_sampling_params_queue_nothing(llm: LLM) -> None:
    for given, message in (
        ({"max_tokens": 3}, "must be SamplingParams, got {'max"),
        (5, "must be SamplingParams, got 5"),
        ([GREEDY, GREEDY], "1 prompts but 2"),
    ):
        with pytest.raises(InvalidRequestError, match=message):
            llm.add_request(IDS, given)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="not both"):
        llm.add_request(IDS, GREEDY, max_tokens=3)
    assert llm.is_finished()
