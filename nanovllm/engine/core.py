"""The engine's loop over tokens: requests in, plans to the executor, updates out.

Works on token ids alone. Up to `depth` plans are in flight: while one runs, the next is planned
and submitted, and whatever the caller does with the updates overlaps with it. Not thread-safe:
one thread at a time calls its methods.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as TokenIds
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Protocol

from nanovllm.engine.plan import StepPlan, StepResult
from nanovllm.engine.scheduler import Scheduler, SequenceUpdate
from nanovllm.engine.sequence import Sequence, Status
from nanovllm.errors import EngineClosedError, InvalidRequestError
from nanovllm.sampling_params import SamplingParams
from nanovllm.structured_output import StructuredOutput


class StepFuture(Protocol):
    """A submitted step."""

    def result(self) -> StepResult:
        """Waits for the step; raises what it raised. May be called again after an interrupt."""


class Executor(Protocol):
    """Runs plans on the ranks, in the order in which they were submitted."""

    num_blocks: int

    def submit(self, plan: StepPlan) -> StepFuture: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _NotSubmitted:
    """A step that the executor did not take: it fails when its turn comes."""

    error: Exception

    def result(self) -> StepResult:
        raise self.error


class EngineCore:
    """Owns scheduler and executor of one model.

    vocab_size bounds token ids; depth is the number of plans in flight, 1 to plan each step only
    when the last one's result is known; check_structure raises InvalidRequestError for structured
    output that cannot be had.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        *,
        vocab_size: int,
        depth: int = 2,
        seed: int = 0,
        clock: Callable[[], float],
        check_structure: Callable[[StructuredOutput], object] | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.vocab_size = vocab_size
        self._executor = executor
        self._depth = depth
        self._seed = seed
        self._clock = clock
        self._check_structure = check_structure
        self._in_flight: deque[StepFuture] = deque()
        self._groups: dict[str, list[Sequence]] = {}  # unfinished sequences of each request
        self._seq_ids = itertools.count()
        self._num_requests = 0
        self._closed = False
        self._process = os.getpid()

    def add(
        self,
        request_id: str,
        prompt_token_ids: TokenIds[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        salt: bytes = b"",
        arrival: float | None = None,
        validated: bool = False,
    ) -> list[Sequence]:
        """Queues `params.n` sequences that share one prompt; a lower priority value goes first.

        validated: the caller has called `validate`. Raises InvalidRequestError, with nothing
        queued, if the request cannot be served.
        """
        self._check_open()
        if not isinstance(request_id, str) or not request_id:
            raise InvalidRequestError(f"a request id must be a string, got {request_id!r}")
        if request_id in self._groups:
            raise InvalidRequestError(f"request id {request_id!r} is in use")
        if not isinstance(priority, int):
            raise InvalidRequestError(f"priority must be an integer, got {priority!r}")
        if not validated:
            self.validate(prompt_token_ids, params)
        now = self._clock() if arrival is None else arrival
        base = params.seed if params.seed is not None else _mix(self._seed, self._num_requests)
        self._num_requests += 1
        group: list[Sequence] = []
        for index in range(params.n):
            seq = Sequence(
                next(self._seq_ids),
                list(prompt_token_ids),
                params if index == 0 else replace(params, prompt_logprobs=None),
                request_id=request_id,
                index=index,
                seed=base if index == 0 else _mix(base, index),
                salt=salt,
                priority=priority,
                arrival=now,
                fork_of=group[0] if group else None,
            )
            group.append(seq)
        for seq in group:
            self.scheduler.add(seq)
        self._groups[request_id] = list(group)
        return group

    def validate(self, prompt_token_ids: TokenIds[int], params: SamplingParams) -> None:
        """Raises InvalidRequestError if a request with this prompt cannot be served."""
        self._check_prompt(prompt_token_ids)
        self.scheduler.check(len(prompt_token_ids))
        for name in ("logit_bias", "allowed_token_ids", "stop_token_ids"):
            for token_id in getattr(params, name) or ():
                self._check_token_id(f"a token id of {name}", token_id)

        self._check_something_is_left(params)
        self.check_structure(params)

    def _check_prompt(self, token_ids: TokenIds[int]) -> None:
        plain = set(map(type, token_ids)) == {int}
        if plain and min(token_ids) >= 0 and max(token_ids) < self.vocab_size:
            return  # without a look at each: a long prompt's first token waits for this
        for token_id in token_ids:
            if not isinstance(token_id, int) or isinstance(token_id, bool):
                raise InvalidRequestError(f"a prompt token id must be an integer: {token_id!r}")
            self._check_token_id("a prompt token id", token_id)

    def check_structure(self, params: SamplingParams) -> None:
        """The part of `validate` that may take long; what it compiles is kept.

        May be called on any thread.
        """
        if isinstance(params.structured_output, StructuredOutput):
            if self._check_structure is None:
                raise InvalidRequestError("structured_output needs the model's tokenizer")
            self._check_structure(params.structured_output)

    def _check_something_is_left(self, params: SamplingParams) -> None:
        """Refuses allowed_token_ids that min_tokens would forbid altogether."""
        if params.allowed_token_ids is None or not params.min_tokens:
            return
        ends = self.scheduler.eos_token_ids.union(params.stop_token_ids or ())
        if ends.issuperset(params.allowed_token_ids):
            raise InvalidRequestError(
                f"min_tokens={params.min_tokens} forbids every token of allowed_token_ids: "
                "all of them end the text"
            )

    def _check_token_id(self, what: str, token_id: int) -> None:
        if not 0 <= token_id < self.vocab_size:
            raise InvalidRequestError(
                f"{what} must be in [0, {self.vocab_size - 1}], got {token_id}"
            )

    def abort(self, request_id: str) -> list[Sequence]:
        """Ends a request; its blocks are free at once. Returns the sequences that this ended."""
        return [self.stop(seq, "abort") for seq in list(self._groups.get(request_id, ()))]

    def stop(self, seq: Sequence, reason: str) -> Sequence:
        """Ends one sequence now, for a reason that only the caller knows (a stop string)."""
        self.scheduler.finish(seq, reason)
        self._drop(seq)
        return seq

    @property
    def is_finished(self) -> bool:
        return not self._groups

    def step(self) -> list[SequenceUpdate]:
        """Runs until the oldest plan in flight is done; plans ahead before it waits.

        A step that failed in the executor ends its sequences with an error and does not raise.
        An interrupt while waiting leaves the engine as it was.
        """
        self._check_open()
        self._plan_ahead()
        if not self._in_flight:
            return []
        try:
            result = self._in_flight[0].result()
        except Exception as error:
            self._in_flight.popleft()
            updates = self.scheduler.fail_step(f"{type(error).__name__}: {error}")
        else:
            self._in_flight.popleft()
            updates = self.scheduler.update(result)
        for update in updates:
            if update.finish_reason is not None:
                self._drop(update.seq)
        return updates

    def _plan_ahead(self) -> None:
        while len(self._in_flight) < self._depth:
            plan = self.scheduler.schedule()
            if plan is None:
                return
            self._in_flight.append(self._submit(plan))

    def _submit(self, plan: StepPlan) -> StepFuture:
        try:
            return self._executor.submit(plan)
        except Exception as error:  # the scheduler counts on a result for every plan
            return _NotSubmitted(error)

    def _drop(self, seq: Sequence) -> None:
        group = self._groups.get(seq.request_id)
        if group is None:
            return
        group[:] = [other for other in group if other.status is not Status.FINISHED]
        if not group:
            del self._groups[seq.request_id]

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosedError("the engine is closed: make a new one")
        if self._process != os.getpid():  # a fork copies no threads: its steps would never run
            raise EngineClosedError(
                f"the engine belongs to process {self._process}, not to {os.getpid()}, forked from "
                "it: make the engine in the process that uses it"
            )

    def close(self) -> None:
        """Waits for the plans in flight and releases the executor. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        self._executor.close()
        self._in_flight.clear()


def _mix(seed: int, index: int) -> int:
    """A seed in [0, 2**63) for the index-th child of `seed`."""
    digest = blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
