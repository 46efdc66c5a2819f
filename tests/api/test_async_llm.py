"""AsyncLLM: the same answers as the blocking API, whoever asks, cancels, aborts or closes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from nanovllm import (
    LLM,
    AsyncLLM,
    ConfigError,
    Delta,
    EngineClosedError,
    InvalidRequestError,
    LLMEngine,
    SamplingParams,
    StructuredOutput,
)
from nanovllm.grammar.compiler import GrammarCompiler

OPTIONS: dict[str, Any] = {"dtype": "float32", "max_num_seqs": 4, "block_size": 8}
PROMPTS: list[Any] = ["Hello", [5, 6, 7] * 9, "你好，世界", "x" * 50, [200], "last"]
PARAMS = SamplingParams(seed=4, max_tokens=20, ignore_eos=True, n=2)
ENDLESS = SamplingParams(seed=4, max_tokens=400, ignore_eos=True)


@pytest.fixture(scope="module")
def expected(text_model: Path) -> list[list[str]]:
    with LLM(str(text_model), **OPTIONS) as llm:
        outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
        return [[one.text for one in output.outputs] for output in outputs]


@pytest.fixture
def llm(text_model: Path) -> Iterator[AsyncLLM]:
    llm = AsyncLLM(str(text_model), **OPTIONS)
    yield llm
    llm.close()
    assert not llm._thread.is_alive()


def num_used(llm: AsyncLLM) -> int:
    return llm._engine.core.scheduler.blocks.num_used


async def collect(llm: AsyncLLM, prompt: Any, params: SamplingParams = PARAMS) -> list[str]:
    texts = [""] * params.n
    async for delta in llm.generate(prompt, params):
        texts[delta.index] += delta.text
    return texts


async def until_idle(llm: AsyncLLM) -> None:
    """Waits for the engine's thread to have done what it was told."""
    for _ in range(2000):
        if num_used(llm) == 0 and not llm._sinks and llm._commands.empty():
            return
        await asyncio.sleep(0.005)
    pytest.fail(f"{num_used(llm)} blocks are still in use, streams: {list(llm._sinks)}")


def test_many_at_once(llm: AsyncLLM, expected: list[list[str]]) -> None:
    async def main() -> None:
        found = await asyncio.gather(*(collect(llm, prompt) for prompt in PROMPTS))
        assert found == expected
        await until_idle(llm)
        assert not llm._tracker.outputs

    asyncio.run(main())


def test_threads_with_loops_of_their_own(llm: AsyncLLM, expected: list[list[str]]) -> None:
    found: dict[int, list[list[str]]] = {}

    def work(number: int) -> None:
        async def main() -> list[list[str]]:
            return list(await asyncio.gather(*(collect(llm, prompt) for prompt in PROMPTS)))

        found[number] = asyncio.run(main())

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert found == dict.fromkeys(range(3), expected)


def test_wrong_use(llm: AsyncLLM, expected: list[list[str]]) -> None:
    bad: list[tuple[Any, dict[str, Any]]] = [
        ("", {}),
        ([384], {}),
        ([5] * 1000, {}),
        ("a", {"priority": "high"}),
        ("a", {"cache_salt": 5}),
        ("a", {"sampling_params": {"max_tokens": 3}}),
    ]

    async def main() -> None:
        for prompt, options in bad:
            with pytest.raises(InvalidRequestError):
                await anext(llm.generate(prompt, **options))
        stream = llm.generate("a", ENDLESS, request_id="mine")
        await anext(stream)
        with pytest.raises(InvalidRequestError, match="'mine' is in use"):
            await anext(llm.generate("b", request_id="mine"))
        await anext(stream)  # and it goes on
        await stream.aclose()
        assert await collect(llm, PROMPTS[0]) == expected[0]
        await until_idle(llm)

    asyncio.run(main())


def test_unknown_option(text_model: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'max_num_seqs'"):
        AsyncLLM(str(text_model), max_num_seq=1)


def test_cancelled_tasks_free_their_blocks(llm: AsyncLLM) -> None:
    """More tasks than rows: some are cancelled while they wait, some while they run."""

    async def main() -> None:
        tasks = [asyncio.create_task(collect(llm, prompt, ENDLESS)) for prompt in PROMPTS]
        while num_used(llm) < 4:
            await asyncio.sleep(0.001)
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results)
        await until_idle(llm)

    asyncio.run(main())


def test_leaving_a_stream_frees_its_blocks(llm: AsyncLLM) -> None:
    async def main() -> None:
        async for delta in llm.generate("Hello", ENDLESS):
            assert delta.finish_reason is None
            break
        await until_idle(llm)

    asyncio.run(main())


def test_abort_ends_the_stream(llm: AsyncLLM) -> None:
    async def main() -> list[Delta]:
        deltas = []
        async for delta in llm.generate("Hello", ENDLESS, request_id="mine"):
            if not deltas:
                await llm.abort("mine")
                await llm.abort("nobody's")
            deltas.append(delta)
        await until_idle(llm)
        return deltas

    deltas = asyncio.run(main())
    assert deltas[-1].finish_reason == "abort"
    assert len(deltas) < 400


def test_close_ends_all_streams(text_model: Path) -> None:
    llm = AsyncLLM(str(text_model), **OPTIONS)

    async def main() -> None:
        streams = [llm.generate(prompt, ENDLESS) for prompt in PROMPTS[:2]]
        for stream in streams:
            await anext(stream)
        await asyncio.to_thread(llm.close)
        for stream in streams:
            with pytest.raises(EngineClosedError):
                async for _ in stream:
                    pass
        with pytest.raises(EngineClosedError):
            await anext(llm.generate("too late"))

    asyncio.run(main())
    llm.close()


@pytest.mark.parametrize("error", [None, ValueError, asyncio.CancelledError])
def test_the_end_of_a_block_closes_it(text_model: Path, error: type[BaseException] | None) -> None:
    async def main() -> None:
        llm = AsyncLLM(str(text_model), **OPTIONS)
        with nullcontext() if error is None else pytest.raises(error):
            async with llm as same:
                assert same is llm
                stream = llm.generate(PROMPTS[0], ENDLESS)
                await anext(stream)
                if error is not None:
                    raise error
        assert not llm._thread.is_alive()
        with pytest.raises(EngineClosedError):
            async for _ in stream:
                pass

    asyncio.run(main())


def test_a_step_that_raises_ends_its_streams_alone(llm: AsyncLLM) -> None:
    runner: Any = llm._engine.core._executor._runner  # type: ignore[attr-defined]
    copy_blocks = runner._copy_blocks

    def broken(plan: Any) -> None:
        runner._copy_blocks = copy_blocks
        raise RuntimeError("out of magic")

    async def main() -> None:
        runner._copy_blocks = broken
        deltas = [delta async for delta in llm.generate("Hello", PARAMS)]
        ends = [delta for delta in deltas if delta.finish_reason is not None]
        assert [end.finish_reason for end in ends].count("error") >= 1
        assert "out of magic" in str([end.error for end in ends])
        assert len(await collect(llm, "Hello")) == 2
        await until_idle(llm)

    asyncio.run(main())


@pytest.mark.parametrize("kind", [AsyncLLM, LLMEngine])
def test_others_go_on_while_a_form_is_compiled(
    kind: type, text_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiling waits here for another request to be answered, which must not wait for it."""
    compiling, answered = threading.Event(), threading.Event()
    compile_form = GrammarCompiler._compile

    def slow(self: GrammarCompiler, structure: StructuredOutput) -> Any:
        compiling.set()
        assert answered.wait(timeout=60), "the other request waited for the form"
        return compile_form(self, structure)

    monkeypatch.setattr(GrammarCompiler, "_compile", slow)
    form = SamplingParams(structured_output={"choice": ["yes"]})
    plain = SamplingParams(max_tokens=3, ignore_eos=True)
    engine = kind(str(text_model), **OPTIONS)

    async def ask() -> list[str]:
        task = asyncio.create_task(collect(engine, "x", form))
        await asyncio.to_thread(compiling.wait, 60)
        await collect(engine, "Hello", plain)
        answered.set()
        return await task

    try:
        if isinstance(engine, AsyncLLM):
            assert asyncio.run(ask()) == ["yes"]
            return
        with ThreadPoolExecutor(1) as pool:
            call = pool.submit(engine.add_request, "x", form)
            assert compiling.wait(timeout=60)
            engine.generate("Hello", plain)
            answered.set()
            call.result(timeout=60)
        outputs = [
            output for _ in range(99) if not engine.is_finished() for output in engine.step()
        ]
        assert outputs[-1].text == "yes"
    finally:
        answered.set()
        engine.close()


def test_chat_prompts(llm: AsyncLLM, text_model: Path) -> None:
    talk = [{"role": "user", "content": "Hi"}]
    with LLM(str(text_model), **OPTIONS) as blocking:
        assert llm.render_chat(talk) == blocking.render_chat(talk)
    with pytest.raises(InvalidRequestError):
        llm.render_chat([])
