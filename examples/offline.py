"""Several prompts at once: outputs come in the order of the prompts."""

from nanovllm import LLM, SamplingParams


def main(model: str = "demo") -> None:
    questions = ["What is a KV cache?", "What is 12 + 30?", "你好，请介绍一下你自己"]
    with LLM(model) as llm:
        prompts = [llm.render_chat([{"role": "user", "content": text}]) for text in questions]
        # One SamplingParams for all, or a list with one for each.
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=100))
    for question, output in zip(questions, outputs, strict=True):
        print(f"{question}\n  {output.text}  [{output.finish_reason}]")


if __name__ == "__main__":
    main()
