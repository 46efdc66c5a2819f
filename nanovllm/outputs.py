"""What the engine gives back: results of requests, and their deltas while they stream.

Log-probabilities are many small objects, and most are never looked at. So a field of them may hold
what makes them instead; whoever reads the field sees them, made at the first look.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token's log-probability at one position; rank 1 is the most likely token."""

    logprob: float
    rank: int
    token: str | None = None


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """Times in seconds, counted from the moment the request was added.

    queue_time ends when the first step that computes for the request is planned; time_to_first
    ends when its first token reaches the host; total_time when the last one does.
    """

    queue_time: float
    time_to_first_token: float
    total_time: float
    num_prompt_tokens: int
    num_cached_tokens: int
    num_generated_tokens: int
    num_preemptions: int


@dataclass(slots=True)
class CompletionOutput:
    """One completion of a prompt.

    finish_reason: "stop" (end token, stop token or stop string), "length" (max_tokens or the end
    of the context), "abort", "error", or None while it runs. stop_reason is the stop string or
    stop token id that matched, None for the model's own end token.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    cumulative_logprob: float | None = None
    metrics: RequestMetrics | None = None
    error: str | None = None


@dataclass(slots=True)
class RequestOutput:
    """Everything known of one request. `output.text` and `output["text"]` are its first completion.

    prompt_logprobs has one entry a prompt token, the first None.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None

    @property
    def finished(self) -> bool:
        return all(output.finish_reason is not None for output in self.outputs)

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> str | None:
        return self.outputs[0].finish_reason

    @property
    def stop_reason(self) -> str | int | None:
        return self.outputs[0].stop_reason

    @property
    def error(self) -> str | None:
        return self.outputs[0].error

    @property
    def logprobs(self) -> list[dict[int, Logprob]] | None:
        return self.outputs[0].logprobs

    @property
    def metrics(self) -> RequestMetrics | None:
        return self.outputs[0].metrics

    def __getitem__(self, name: str) -> Any:
        """`output["text"]`, for code written for engines that return dictionaries."""
        try:
            return getattr(self, name)
        except (AttributeError, TypeError):
            hint = f"no field {name!r}"
            if isinstance(name, int):
                hint = "one prompt gives one output, no list: use output.text, or give [prompt]"
            raise KeyError(hint) from None


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step added to one completion of a request.

    text may be empty while a character or a possible stop string is incomplete. When
    finish_reason is set, this is the last delta of this completion.
    """

    request_id: str
    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: tuple[dict[int, Logprob], ...] | None = None
    metrics: RequestMetrics | None = None
    error: str | None = None


def _make_when_read(cls: type, name: str) -> None:
    """A callable in this slot stands for its result, and is replaced by it at the first look."""
    slot = cls.__dict__[name]

    def read(output: Any) -> Any:
        value = slot.__get__(output)
        if callable(value):
            value = value()
            slot.__set__(output, value)
        return value

    setattr(cls, name, property(read, slot.__set__, slot.__delete__))


_make_when_read(CompletionOutput, "logprobs")
_make_when_read(RequestOutput, "prompt_logprobs")
_make_when_read(Delta, "logprobs")
