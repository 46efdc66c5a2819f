"""One answer as it is written; leaving the loop early would abort the request."""

from nanovllm import LLM


def main(model: str = "demo") -> None:
    with LLM(model) as llm:
        prompt = llm.render_chat([{"role": "user", "content": "What is continuous batching?"}])
        for delta in llm.stream(prompt, temperature=0, max_tokens=100):
            print(delta.text, end="", flush=True)
            if delta.metrics is not None:  # the last one
                print(f"\n[{delta.finish_reason}, {delta.metrics.total_time:.2f} s]")


if __name__ == "__main__":
    main()
