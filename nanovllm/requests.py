"""Requests as users see them: token updates become text, deltas and outputs.

Sits between the engine, which knows token ids, and the public API. Pure host code.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from nanovllm.engine.plan import TokenLogprobs
from nanovllm.engine.scheduler import SequenceUpdate
from nanovllm.engine.sequence import Sequence
from nanovllm.outputs import CompletionOutput, Delta, Logprob, RequestMetrics, RequestOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.text.detokenizer import IncrementalDetokenizer, StopStrings
from nanovllm.text.tokenizer import Tokenizer

STRIDE = 1 + len(TokenLogprobs._fields)  # of a position and its record, side by side


@dataclass(slots=True)
class _Completion:
    """The text side of one sequence; detokenizer is None where no text is wanted."""

    output: CompletionOutput
    detokenizer: IncrementalDetokenizer | None
    stops: StopStrings
    logprobs: _Unread | None
    prompt_logprobs: _Unread | None


class _Unread:
    """A list of log-probabilities by position, made when it is first read.

    From then on it grows with each `add`. One thread adds, several may read.
    """

    def __init__(self, make: Callable[[TokenLogprobs], Any], entries: list[Any]) -> None:
        self._make = make
        self._entries = entries
        self._read = False
        self._reading = threading.Lock()
        # Flat, of what the garbage collector does not follow: many records would keep it busy.
        self._waiting: list[Any] = []

    def add(self, start: int, records: Iterable[TokenLogprobs]) -> None:
        for position, record in enumerate(records, start):
            self._waiting += (position, *record)
        if self._read:
            self()

    def __call__(self) -> list[Any]:
        self._read = True  # before the look: what is added after it, `add` itself makes readable
        with self._reading:
            while self._waiting:
                found = self._waiting.copy()
                for i in range(0, len(found), STRIDE):
                    position, *fields = found[i : i + STRIDE]
                    self._entries[position : position + 1] = [self._make(TokenLogprobs(*fields))]
                del self._waiting[: len(found)]  # at the end: interrupted, it is done again
        return self._entries


class RequestTracker:
    """Owns the outputs of unfinished requests.

    `stop` is called with a sequence whose text has reached a stop string.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop: Callable[[Sequence], object]) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        # No method: unread outputs must not keep the tracker, and by `stop` the engine, alive.
        self._readable = partial(_readable, tokenizer)
        self.outputs: dict[str, RequestOutput] = {}
        self._completions: dict[int, _Completion] = {}  # by sequence id

    def add(
        self,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        sequences: list[Sequence],
    ) -> RequestOutput:
        completions = [CompletionOutput(index=seq.index) for seq in sequences]
        request = RequestOutput(request_id, prompt, prompt_token_ids, completions)
        of_prompt = None
        if params.prompt_logprobs is not None:
            of_prompt = _Unread(self._readable, [None] * len(prompt_token_ids))
            request.prompt_logprobs = cast(Any, of_prompt)
        text = self._tokenizer is not None and params.detokenize
        for seq, output in zip(sequences, completions, strict=True):
            logprobs = None
            if params.logprobs is not None:
                logprobs = _Unread(self._readable, [])
                output.logprobs, output.cumulative_logprob = cast(Any, logprobs), 0.0
            detokenizer = IncrementalDetokenizer(self._tokenizer) if text else None  # type: ignore[arg-type]
            stops = StopStrings(params.stop or (), include=params.include_stop_str_in_output)
            self._completions[seq.seq_id] = _Completion(
                output, detokenizer, stops, logprobs, of_prompt
            )
        self.outputs[request_id] = request
        return request

    def apply(self, update: SequenceUpdate) -> Delta | None:
        """What the update adds to its request, or None if it adds nothing."""
        seq = update.seq
        completion = self._completions[seq.seq_id]
        if completion.prompt_logprobs is not None:
            completion.prompt_logprobs.add(update.prompt_start, update.prompt_logprobs)
        if not update.token_ids and update.finish_reason is None:
            return None
        text, stop = self._text_of(completion, update)
        reason: str | None = update.finish_reason
        stop_reason: str | int | None = update.stop_token_id
        if stop is not None:
            reason, stop_reason = "stop", stop
            self._stop(seq)
        return self._emit(seq, completion, update, text, reason, stop_reason)

    def end(self, seq: Sequence, reason: str) -> Delta:
        """The last delta of a sequence that was ended from outside."""
        completion = self._completions[seq.seq_id]
        update = SequenceUpdate(seq, finish_reason=reason)
        text, _ = self._text_of(completion, update)
        return self._emit(seq, completion, update, text, reason, None)

    def forget(self, request_id: str) -> None:
        """Drops a finished request."""
        self.outputs.pop(request_id, None)

    def _emit(
        self,
        seq: Sequence,
        completion: _Completion,
        update: SequenceUpdate,
        text: str,
        reason: str | None,
        stop_reason: str | int | None,
    ) -> Delta:
        output = completion.output
        logprobs: Any = None
        if update.logprobs and completion.logprobs is not None:
            # The delta's own, made when it is read.
            logprobs = partial(_all_readable, self._tokenizer, update.logprobs)
            completion.logprobs.add(seq.num_output_tokens - len(update.token_ids), update.logprobs)
            for entry in update.logprobs:
                output.cumulative_logprob += entry.logprob  # type: ignore[operator]
        output.text += text
        output.token_ids += update.token_ids
        if reason is not None:
            output.finish_reason, output.stop_reason = reason, stop_reason
            output.error = update.error
            output.metrics = _metrics(seq)
            del self._completions[seq.seq_id]
        return Delta(
            seq.request_id,
            seq.index,
            text,
            update.token_ids,
            reason,
            stop_reason,
            logprobs,
            output.metrics,
            update.error,
        )

    def _text_of(self, completion: _Completion, update: SequenceUpdate) -> tuple[str, str | None]:
        """(new text, the stop string that was found)."""
        if completion.detokenizer is None:
            return "", None
        token_ids = update.token_ids
        if update.finish_reason == "stop":
            token_ids = token_ids[:-1]  # the end token is not part of the text
        new = completion.detokenizer.push(token_ids)
        min_tokens = update.seq.params.min_tokens
        if update.seq.num_output_tokens < min_tokens and update.finish_reason is None:
            return completion.stops.skip(new), None
        text, stop = completion.stops.push(new)
        if stop is None and update.finish_reason is not None:
            rest, stop = completion.stops.push(completion.detokenizer.flush())
            text += rest
            if stop is None:
                text += completion.stops.flush()
        return text, stop


def _all_readable(
    tokenizer: Tokenizer | None, entries: Iterable[TokenLogprobs]
) -> tuple[dict[int, Logprob], ...]:
    return tuple(_readable(tokenizer, entry) for entry in entries)


def _readable(tokenizer: Tokenizer | None, entry: TokenLogprobs) -> dict[int, Logprob]:
    own = entry.token_id
    found = {own: Logprob(entry.logprob, entry.rank, _token_text(tokenizer, own))}
    for rank, (token_id, logprob) in enumerate(entry.top, 1):
        if token_id != own:
            found[token_id] = Logprob(logprob, rank, _token_text(tokenizer, token_id))
    return found


def _token_text(tokenizer: Tokenizer | None, token_id: int) -> str | None:
    return None if tokenizer is None else tokenizer.token_text(token_id)


def _metrics(seq: Sequence) -> RequestMetrics:
    stats = seq.stats
    end = stats.finished if stats.finished is not None else stats.arrival
    first = stats.first_token if stats.first_token is not None else end
    scheduled = stats.first_scheduled if stats.first_scheduled is not None else end
    return RequestMetrics(
        queue_time=scheduled - stats.arrival,
        time_to_first_token=first - stats.arrival,
        total_time=end - stats.arrival,
        num_prompt_tokens=seq.num_prompt_tokens,
        num_cached_tokens=stats.num_cached_tokens,
        num_generated_tokens=seq.num_output_tokens,
        num_preemptions=stats.num_preemptions,
    )
