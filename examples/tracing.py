"""What the engine decides, step by step: a tracer receives every event."""

from nanovllm import LLM, SamplingParams
from nanovllm.trace.events import ListTracer, SequenceAdmitted, SequenceFinished, StepPlanned


def main(model: str = "demo") -> None:
    tracer = ListTracer()
    with LLM(model, tracer=tracer, max_num_batched_tokens=64) as llm:
        prompts = ["a long prompt goes in chunks, " * 10, "a short one joins the batch"]
        params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (3, 8)]
        llm.generate(prompts, params, use_tqdm=False)
    start = tracer.events[0].time
    for event in tracer.events:
        match event:
            case StepPlanned(time, step_id, num_rows, num_tokens):
                what = f"step {step_id}: {num_tokens} tokens of {num_rows} sequences"
            case SequenceAdmitted(time, request_id, _, num_tokens):
                what = f"{request_id} starts with {num_tokens} tokens"
            case SequenceFinished(time, request_id, _, reason):
                what = f"{request_id} ends: {reason}"
            case _:
                continue
        print(f"{(time - start) * 1000:8.2f} ms  {what}")


if __name__ == "__main__":
    main()
