"""Requests of several coroutines share the engine's batches; one that is left early is aborted."""

import asyncio
import contextlib

from nanovllm import AsyncLLM, SamplingParams


async def ask(llm: AsyncLLM, question: str) -> str:
    prompt = llm.render_chat([{"role": "user", "content": question}])
    params = SamplingParams(temperature=0, max_tokens=60)
    return "".join([delta.text async for delta in llm.generate(prompt, params)])


async def start_of(llm: AsyncLLM, question: str) -> str:
    """Leaves the stream early: the request is aborted and its memory is free at once."""
    prompt = llm.render_chat([{"role": "user", "content": question}])
    stream = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=60))
    async with contextlib.aclosing(stream) as deltas:
        return (await anext(deltas)).text


async def main(model: str = "demo") -> None:
    async with AsyncLLM(model) as llm:
        questions = ["What is prefix caching?", "What is preemption?", "Sort 3, 1, 2"]
        answers = await asyncio.gather(*(ask(llm, question) for question in questions))
        for question, answer in zip(questions, answers, strict=True):
            print(f"{question}\n  {answer}")
        print("the first word of another:", await start_of(llm, "Tell me a joke"))


if __name__ == "__main__":
    asyncio.run(main())
