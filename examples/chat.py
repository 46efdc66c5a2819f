"""A conversation: the answers become part of the next prompt."""

from nanovllm import LLM


def main(model: str = "demo") -> None:
    messages = [{"role": "system", "content": "You are a helpful assistant."}]
    with LLM(model) as llm:
        for text in ("Hello! My name is Anna.", "What is my name?"):
            messages.append({"role": "user", "content": text})
            answer = llm.chat(messages, temperature=0, max_tokens=60).text
            messages.append({"role": "assistant", "content": answer})
    for message in messages:
        print(f"{message['role']}: {message['content']}")


if __name__ == "__main__":
    main()
