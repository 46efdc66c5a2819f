"""The public API for code that waits: `LLMEngine` step by step, `LLM` for whole calls.

Thin: feeds the same engine as everything else. Several threads may use an instance: they take
turns, step by step, so that their requests share the engine's steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn, Self

from nanovllm.build import EngineInfo, build_engine
from nanovllm.config import EngineConfig
from nanovllm.errors import InvalidRequestError
from nanovllm.interrupts import Turns
from nanovllm.outputs import Delta, RequestOutput
from nanovllm.progress import NullProgress, Progress
from nanovllm.prompts import (
    EncodedPrompt,
    Prompt,
    encode_prompt,
    encode_salt,
    params_for,
    split_batch,
)
from nanovllm.requests import RequestTracker
from nanovllm.sampling_params import SamplingParams
from nanovllm.text.chat import Message, check_variables
from nanovllm.text.tokenizer import Tokenizer
from nanovllm.trace.events import Tracer


class OpenModel:
    """What the public classes own: an engine, and the outputs of its unfinished requests.

    Takes the options of `EngineConfig` as keywords. Raises ConfigError for an unknown option,
    ModelLoadError for a broken model directory, OutOfMemoryError if the model cannot fit.
    """

    def __init__(
        self, model: str = "demo", *, tracer: Tracer | None = None, **options: Any
    ) -> None:
        self._engine = build_engine(EngineConfig(model=model, **options), tracer)
        core = self._engine.core
        self._tracker = RequestTracker(
            self._engine.tokenizer, stop=lambda seq: core.stop(seq, "stop")
        )
        self._ids = itertools.count()

    @property
    def info(self) -> EngineInfo:
        """Device, dtype, backends and why, KV blocks, context, and what was fitted down."""
        return self._engine.info

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._engine.tokenizer

    def render_chat(self, messages: Sequence[Message], **options: Any) -> list[int]:
        """The token ids of a conversation, with the model's own template."""
        if self.tokenizer is None:
            raise InvalidRequestError("chat needs a tokenizer: skip_tokenizer_init is set")
        text = self._engine.chat_template.render(messages, **options)
        return self.tokenizer.encode(text, add_special_tokens=False)

    def __reduce__(self) -> NoReturn:
        name = type(self).__name__
        raise TypeError(
            f"{name} cannot be pickled or copied: its engine owns threads and the model's memory. "
            f"Make one {name} in each process, or keep one and send prompts, SamplingParams and "
            "outputs, which can be pickled"
        )


class LLMEngine(OpenModel):
    """Requests in, steps, outputs out; takes the options of `EngineConfig` as keywords."""

    def __init__(
        self, model: str = "demo", *, tracer: Tracer | None = None, **options: Any
    ) -> None:
        super().__init__(model, tracer=tracer, **options)
        self._turns = Turns()
        self._unreported: dict[str, RequestOutput] = {}  # changed outside of `step`
        self._streams: dict[str, list[Delta]] = {}  # not yet read; of the streams that are open

    def add_request(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        **sampling: Any,
    ) -> str:
        """Queues a prompt (text or token ids) and returns the request's id.

        Sampling options may be given as keywords instead of SamplingParams. Requests with
        different cache_salt never share KV blocks; a lower priority value goes first. Raises
        InvalidRequestError, with nothing queued, if it cannot be served.
        """
        (params,) = params_for(1, sampling_params, sampling)
        encoded = self._encode(prompt, params)  # all that may take long, before the turn
        salt = encode_salt(cache_salt)
        return self._add(encoded, params, request_id, priority, salt).request_id

    def _add(
        self,
        encoded: EncodedPrompt,
        params: SamplingParams,
        request_id: str | None = None,
        priority: int = 0,
        salt: bytes = b"",
    ) -> RequestOutput:
        """Queues what `_encode` has returned."""
        text, token_ids = encoded
        core = self._engine.core
        with self._turns.taken():
            request_id = self._new_id() if request_id is None else request_id
            sequences = core.add(
                request_id, token_ids, params, priority=priority, salt=salt, validated=True
            )
            return self._tracker.add(request_id, text, token_ids, params, sequences)

    def _new_id(self) -> str:
        names = (f"request-{number}" for number in self._ids)
        return next(name for name in names if name not in self._tracker.outputs)

    def step(self) -> list[RequestOutput]:
        """Advances the engine by one step; the requests that changed, with all they have so far."""
        self._advance()  # a turn of its own: interrupted, it leaves its outputs to the next step
        with self._turns.taken():
            changed, self._unreported = self._unreported, {}
            for request_id, output in changed.items():
                if output.finished:
                    self._tracker.forget(request_id)
            return list(changed.values())

    def is_finished(self) -> bool:
        """Whether nothing is left to do."""
        return self._engine.core.is_finished and not self._unreported

    def abort(self, request_id: str) -> None:
        """Ends a request; its KV blocks are free at once. An unknown id is ignored."""
        with self._turns.taken():
            for seq in self._engine.core.abort(request_id):
                self._to_stream(self._tracker.end(seq, "abort"))
                self._unreported[request_id] = self._tracker.outputs[request_id]

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = False,
        **sampling: Any,
    ) -> Any:
        """Completes prompts; the outputs are in their order.

        A single string (or list of token ids) gives one RequestOutput, a list of prompts a list.
        Sampling options may be given as keywords instead of SamplingParams. Raises
        InvalidRequestError before anything runs if any of the prompts cannot be served. When
        interrupted, the prompts' requests are aborted and the engine stays usable.
        """
        batch, single = split_batch(prompts)
        params = params_for(len(batch), sampling_params, sampling)
        encoded = [self._encode(*pair) for pair in zip(batch, params, strict=True)]
        outputs: list[RequestOutput] = []
        try:
            with self._turns.taken():
                for one, p in zip(encoded, params, strict=True):
                    outputs.append(self._add(one, p))  # one by one: what was added is known
            with Progress(len(outputs)) if use_tqdm else NullProgress() as progress:
                while not all(output.finished for output in outputs):
                    progress.update(self._advance(), outputs)
        finally:
            self._release(outputs)
        return outputs[0] if single else outputs

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, **sampling: Any
    ) -> Iterator[Delta]:
        """Completes one prompt and yields what each step adds.

        With n > 1 the deltas of the completions alternate: `delta.index` tells them apart.
        Errors are raised at once, work starts with the first delta; leaving the loop early
        aborts the request.
        """
        (params,) = params_for(1, sampling_params, sampling)
        return self._stream(self._encode(prompt, params), params)

    def _encode(self, prompt: Prompt, params: SamplingParams) -> EncodedPrompt:
        encoded = encode_prompt(self.tokenizer, prompt, params)
        self._engine.core.validate(encoded[1], params)
        return encoded

    def _stream(self, encoded: EncodedPrompt, params: SamplingParams) -> Iterator[Delta]:
        outputs: list[RequestOutput] = []
        try:
            with self._turns.taken():
                outputs.append(self._add(encoded, params))
                unread = self._streams[outputs[0].request_id] = []
            finished = False
            while not finished:
                with self._turns.taken():
                    if not unread and not outputs[0].finished:
                        self._advance()
                    finished, deltas = outputs[0].finished, unread.copy()
                    unread.clear()
                yield from deltas
        finally:
            self._release(outputs)

    def _advance(self) -> list[Delta]:
        """One step of the engine; the deltas of all requests. `step` reports them later.

        Ctrl-C is handled at the end of the step.
        """
        with self._turns.taken():
            updates = (self._tracker.apply(update) for update in self._engine.core.step())
            deltas = [delta for delta in updates if delta is not None]
            for delta in deltas:
                self._to_stream(delta)
                self._unreported[delta.request_id] = self._tracker.outputs[delta.request_id]
        return deltas

    def _to_stream(self, delta: Delta) -> None:
        if delta.request_id in self._streams:
            self._streams[delta.request_id].append(delta)

    def _release(self, outputs: list[RequestOutput]) -> None:
        with self._turns.taken():
            for output in outputs:
                if not output.finished:
                    self.abort(output.request_id)
                self._unreported.pop(output.request_id, None)
                self._streams.pop(output.request_id, None)
                self._tracker.forget(output.request_id)

    def close(self) -> None:
        """Releases threads and memory; later calls raise EngineClosedError."""
        with self._turns.taken():
            self._engine.core.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class LLM(LLMEngine):
    """The same engine for whole calls: a progress bar by default, and chats."""

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        **sampling: Any,
    ) -> Any:
        return super().generate(prompts, sampling_params, use_tqdm, **sampling)

    generate.__doc__ = LLMEngine.generate.__doc__

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = False,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> Any:
        """Answers a conversation, or each of several; messages are {"role": ..., "content": ...}.

        A content is a string or a list of parts {"type": "text", "text": ...}, joined by newlines.

        Raises InvalidRequestError if the model has no chat template, or it refuses the messages.
        """
        variables = {} if chat_template_kwargs is None else chat_template_kwargs
        check_variables(variables, "chat_template_kwargs")
        several = isinstance(messages, Sequence) and not isinstance(messages, (str, bytes))
        single = not several or not messages or isinstance(messages[0], Mapping)
        conversations: Any = [messages] if single else messages
        prompts = [
            self.render_chat(
                conversation,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                **variables,
            )
            for conversation in conversations
        ]
        outputs = self.generate(prompts, sampling_params, use_tqdm, **sampling)
        return outputs[0] if single else outputs
