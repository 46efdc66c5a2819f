"""Prompts that begin alike share KV blocks: the second one computes only what is new."""

from nanovllm import LLM, SamplingParams

DOCUMENT = "The engine keeps keys and values of every token in blocks of a fixed size. " * 8


def main(model: str = "demo") -> None:
    params = SamplingParams(temperature=0, max_tokens=20)
    with LLM(model) as llm:
        for question in ("What does it keep?", "In what size?", "For which token?"):
            metrics = llm.generate(DOCUMENT + question, params, use_tqdm=False).metrics
            print(
                f"{question:<20} {metrics.num_cached_tokens:>4} of {metrics.num_prompt_tokens} "
                f"tokens cached, first token after {metrics.time_to_first_token * 1000:.1f} ms"
            )


if __name__ == "__main__":
    main()
