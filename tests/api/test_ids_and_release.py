"""Request ids of several callers, and what close() lets go of."""

from __future__ import annotations

import asyncio
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, AsyncLLM, InvalidRequestError, SamplingParams
from nanovllm.model_files import ASSETS, find_model

LONG = SamplingParams(max_tokens=200, ignore_eos=True)
OPTIONS: dict[str, Any] = {"skip_tokenizer_init": True, "dtype": "float32", "max_num_seqs": 4}


def test_a_broken_id_is_its_callers_error_alone(models: Any) -> None:
    async def run() -> None:
        llm = AsyncLLM(str(models("llama")), **OPTIONS)
        with pytest.raises(InvalidRequestError, match="request id"):
            async for _ in llm.generate([5], LONG, request_id=["bad"]):  # type: ignore[arg-type]
                pass
        assert len([d async for d in llm.generate([5], SamplingParams(max_tokens=1))]) == 1
        llm.close()

    asyncio.run(run())


def test_a_cancelled_duplicate_leaves_the_first_alone(models: Any) -> None:
    async def run() -> None:
        llm = AsyncLLM(str(models("llama")), **OPTIONS)

        async def first() -> list[str | None]:
            return [d.finish_reason async for d in llm.generate([5], LONG, request_id="x")]

        async def second() -> None:
            async for _ in llm.generate([6], LONG, request_id="x"):
                pass

        one = asyncio.create_task(first())
        await asyncio.sleep(0.05)
        two = asyncio.create_task(second())
        await asyncio.sleep(0)  # it has sent its request, and has not seen the answer
        two.cancel()
        assert (await one)[-1] == "length"
        llm.close()

    asyncio.run(run())


def test_own_ids_do_not_collide_with_automatic_ones(models: Any) -> None:
    with LLM(str(models("llama")), **OPTIONS) as llm:
        llm.add_request([5], SamplingParams(max_tokens=1), request_id="request-1")
        outputs = llm.generate([[5], [6], [7]], max_tokens=1, use_tqdm=False)
        assert [output.finish_reason for output in outputs] == ["length"] * 3


def test_close_lets_go_of_the_model(models: Any) -> None:
    llm = LLM(str(models("llama")), **OPTIONS)
    llm.generate([5], max_tokens=2, use_tqdm=False)
    runner = weakref.ref(llm._engine.core._executor._runner)  # type: ignore[attr-defined]
    assert runner() is not None
    llm.close()
    gc.collect()
    assert runner() is None


def test_the_embedded_model_wins_over_a_folder_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_model("demo").directory == ASSETS / "demo"


def test_a_failed_requests_error_is_on_the_output(models: Any) -> None:
    with LLM(str(models("llama")), **OPTIONS) as llm:
        output = llm.generate([5], max_tokens=1, use_tqdm=False)
        assert output.error is None
        assert output["stop_reason"] is None


@pytest.mark.parametrize("prompts", [None, 5, {"a": 1}])
def test_prompts_of_no_known_kind(models: Any, prompts: Any) -> None:
    with LLM(str(models("llama")), **OPTIONS) as llm:
        with pytest.raises(InvalidRequestError, match="prompts must be"):
            llm.generate(prompts)
        with pytest.raises(InvalidRequestError, match="must be SamplingParams"):
            llm.generate([[5]], [{"max_tokens": 5}])


def test_min_tokens_must_leave_something_allowed(models: Any) -> None:
    with (
        LLM(str(models("llama")), **OPTIONS) as llm,
        pytest.raises(InvalidRequestError, match="min_tokens=1 forbids every token"),
    ):
        llm.generate([5], allowed_token_ids=[3], min_tokens=1)
