"""Log-probabilities are made when they are read; nobody can tell."""

from __future__ import annotations

import copy
import gc
import pickle
import struct
import weakref
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pytest

from nanovllm import Delta, Logprob, RequestOutput, SamplingParams, requests
from nanovllm.engine.plan import TokenLogprobs
from nanovllm.engine.scheduler import SequenceUpdate
from nanovllm.engine.sequence import Sequence
from nanovllm.requests import RequestTracker

PROMPT = [5, 6, 7]
PARAMS = SamplingParams(logprobs=2, prompt_logprobs=0)


def record(token_id: int, rank: int = 1) -> TokenLogprobs:
    packed = struct.pack("=4d", 8, -0.25, token_id if rank == 2 else 9, -0.5)
    return TokenLogprobs(token_id, -0.5 * rank, rank, packed)


def entry(token_id: int, rank: int = 1) -> dict[int, Logprob]:
    """Whatever else is said of the token itself, its own numbers count."""
    own = {token_id: Logprob(-0.5 * rank, rank)}
    found = own | {8: Logprob(-0.25, 1)} | own
    return found if rank == 2 else found | {9: Logprob(-0.5, 2)}


class Request:
    """One request, whose updates are given by hand."""

    def __init__(self) -> None:
        self.tracker = RequestTracker(None, stop=print)
        self.seq = Sequence(0, list(PROMPT), PARAMS, request_id="a")
        self.output = self.tracker.add("a", None, PROMPT, PARAMS, [self.seq])

    def grow(self, token_id: int, rank: int = 1, **more: Any) -> Delta:
        self.seq.token_ids.append(token_id)
        update = SequenceUpdate(self.seq, (token_id,), (record(token_id, rank),), **more)
        delta = self.tracker.apply(update)
        assert delta is not None
        return delta


def test_deltas_and_outputs() -> None:
    request = Request()
    deltas = [request.grow(3, 2), request.grow(4), request.grow(8)]
    output = request.output
    assert [delta.logprobs for delta in deltas] == [(entry(3, 2),), (entry(4),), (entry(8),)]
    assert output.logprobs == [entry(3, 2), entry(4), entry(8)]
    assert [list(found) for found in output.logprobs] == [[3, 8], [4, 8, 9], [8, 9]]
    assert all(type(rank) is int for found in output.logprobs for rank in found)
    assert output.outputs[0].cumulative_logprob == -2.0
    assert type(output.logprobs) is list
    assert type(deltas[0].logprobs) is tuple
    assert deltas[0].logprobs is deltas[0].logprobs


def test_a_list_that_was_read_grows_on() -> None:
    request = Request()
    found = request.output.logprobs
    assert found == []
    for token_id in (3, 4):
        request.grow(token_id)
        assert found[-1] == entry(token_id)
    assert request.output.logprobs is found
    assert len(found) == 2


def test_prompts_in_pieces() -> None:
    """A preempted prompt is computed again, from wherever its cached blocks end."""
    request = Request()
    plain = [TokenLogprobs(token_id, -1.0, 4) for token_id in PROMPT]
    for start, stop in ((1, 2), (1, 3)):
        update = SequenceUpdate(
            request.seq, prompt_logprobs=tuple(plain[start:stop]), prompt_start=start
        )
        assert request.tracker.apply(update) is None
    expected = [None, {6: Logprob(-1.0, 4)}, {7: Logprob(-1.0, 4)}]
    assert request.output.prompt_logprobs == expected


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), replace]
)
def test_copies(copied: Callable[[Any], Any]) -> None:
    request = Request()
    delta, output = request.grow(3), request.output
    assert copied(delta) == delta
    assert copied(output) == output
    assert copied(output).outputs[0].logprobs == [entry(3)]
    other: RequestOutput = Request().output
    assert other != output


def test_as_dictionaries() -> None:
    request = Request()
    delta = request.grow(3)
    plain = {token_id: asdict(logprob) for token_id, logprob in entry(3).items()}
    assert asdict(delta)["logprobs"] == (plain,)
    assert asdict(request.output)["outputs"][0]["logprobs"] == [plain]
    assert "logprobs=({3: Logprob(" in repr(delta)


def test_an_interrupted_look(monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request()
    for token_id in (3, 4, 5):
        request.grow(token_id)
    calls = iter(range(100))

    def interrupted(tokenizer: Any, token_id: int) -> None:
        if next(calls) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(requests, "_token_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        len(request.output.logprobs or ())
    request.grow(6)
    assert request.output.logprobs == [entry(3), entry(4), entry(5), entry(6)]


def test_unread_outputs_keep_no_engine_alive() -> None:
    request = Request()
    output, delta = request.output, request.grow(3)
    gone = weakref.ref(request.tracker)
    del request
    gc.collect()
    assert gone() is None
    assert output.logprobs == [entry(3)]
    assert delta.logprobs == (entry(3),)
