"""Streams of text against decoding everything at once, on texts that are hard to cut."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis.strategies as st
import pytest
from hypothesis import assume, example, given, settings
from tokenizers_of_all_kinds import KINDS, TEXTS, byte_fallback, byte_level, writes_bytes

from nanovllm.engine.scheduler import SequenceUpdate
from nanovllm.engine.sequence import Sequence
from nanovllm.outputs import Delta
from nanovllm.requests import RequestTracker
from nanovllm.sampling_params import SamplingParams
from nanovllm.text.detokenizer import IncrementalDetokenizer, StopStrings
from nanovllm.text.tokenizer import Tokenizer

FAST = settings(deadline=None, derandomize=True, database=None, max_examples=200)
CUTS = st.lists(st.integers(1, 4), max_size=80)


def pieces(token_ids: list[int], cuts: list[int]) -> Iterator[list[int]]:
    """token_ids in pieces of the given lengths, then one by one."""
    position = 0
    for length in cuts + [1] * len(token_ids):
        yield token_ids[position : position + length]
        position += length


def assert_stream_is_whole(tokenizer: Tokenizer, token_ids: list[int], cuts: list[int]) -> str:
    """The pieces joined are the whole text, and each moment shows a beginning of it."""
    detokenizer = IncrementalDetokenizer(tokenizer)
    whole, shown = tokenizer.decode(token_ids), ""
    for piece in pieces(token_ids, cuts):
        shown += detokenizer.push(piece)
        assert whole.startswith(shown)
    shown += detokenizer.flush()
    assert shown == whole
    assert detokenizer.flush() == ""
    return shown


@pytest.mark.parametrize("kind", KINDS)
@FAST
@given(text=TEXTS, cuts=CUTS)
@example(text="🏳️‍🌈" * 3, cuts=[])
@example(text="a\ufffdb\ufffd", cuts=[])
@example(text="  two  spaces ", cuts=[1, 1])
def test_any_text(kind: str, text: str, cuts: list[int]) -> None:
    assume(kind == "byte level" or not writes_bytes(text))
    tokenizer = KINDS[kind]()
    shown = assert_stream_is_whole(tokenizer, tokenizer.encode(text), cuts)
    assert shown == text.replace("<|end|>", "").replace("<|unk|>", "") or kind != "byte level"


@pytest.mark.parametrize("kind", KINDS)
@FAST
@given(text=TEXTS)
@example(text="<|unk|>" * 3)
def test_tokens_stand_for_a_bounded_number_of_characters(kind: str, text: str) -> None:
    tokenizer = KINDS[kind]()
    assert len(text) <= len(tokenizer.encode(text)) * tokenizer.most_characters()


@FAST
@given(token_ids=st.lists(st.integers(0, 499), max_size=40), cuts=CUTS)
def test_any_tokens_of_bytes(token_ids: list[int], cuts: list[int]) -> None:
    """A model may write any tokens: halves of characters, bytes that are none, special ones."""
    assert_stream_is_whole(byte_level(), token_ids, cuts)


@FAST
@given(texts=st.lists(TEXTS, max_size=5), cuts=CUTS, special=st.integers(0, 3))
def test_texts_with_special_tokens_between(texts: list[str], cuts: list[int], special: int) -> None:
    assume(not any(map(writes_bytes, texts)))
    for tokenizer in (byte_level(), byte_fallback()):
        token_ids: list[int] = [special]
        for text in texts:
            token_ids += [*tokenizer.encode(text), special]
        assert_stream_is_whole(tokenizer, token_ids, cuts)


@pytest.mark.parametrize("kind", KINDS)
@FAST
@given(text=TEXTS, missing=st.integers(1, 3))
def test_an_answer_cut_inside_a_character(kind: str, text: str, missing: int) -> None:
    """What was complete is shown as it is; of the rest, replacement characters at most."""
    assume(kind == "byte level" or not writes_bytes(text))
    tokenizer = KINDS[kind]()
    complete = tokenizer.encode(text + " ")
    whole = tokenizer.encode(text + " 🏳")
    tail = whole[len(complete) : len(whole) - missing]
    if whole[: len(complete)] != complete or not tail:
        return
    detokenizer = IncrementalDetokenizer(tokenizer)
    shown = detokenizer.push(complete + tail)
    assert tokenizer.decode(complete).startswith(shown.rstrip("\ufffd"))
    shown += detokenizer.flush()
    assert shown.rstrip("\ufffd") == tokenizer.decode(complete).rstrip("\ufffd")


def test_characters_appear_with_their_last_token() -> None:
    tokenizer = byte_level()
    detokenizer = IncrementalDetokenizer(tokenizer)
    token_ids = tokenizer.encode("龘𠮷x")
    shown = [detokenizer.push([token_id]) for token_id in token_ids]
    assert [text for text in shown if text] == ["龘", "𠮷", "x"]
    assert len(shown) > 3


# --- stop strings ---------------------------------------------------------------------------

LETTERS = st.text(alphabet="abö", max_size=30)
STOPS = st.lists(st.text(alphabet="abö", min_size=1, max_size=4), min_size=1, max_size=3)


def first_stop(text: str, stops: list[str]) -> tuple[int, str] | None:
    found = [(text.find(stop), -len(stop), stop) for stop in stops if stop in text]
    return (min(found)[0], min(found)[2]) if found else None


@FAST
@given(text=LETTERS, stops=STOPS, cuts=CUTS, include=st.booleans())
def test_stop_strings(text: str, stops: list[str], cuts: list[int], include: bool) -> None:
    finder, shown, so_far = StopStrings(stops, include=include), "", ""
    for piece in pieces([ord(letter) for letter in text], cuts):
        so_far += "".join(map(chr, piece))
        new, stop = finder.push("".join(map(chr, piece)))
        shown += new
        expected = first_stop(so_far, stops)
        if expected is not None:
            at, matched = expected
            assert stop == matched
            assert shown == so_far[:at] + (matched if include else "")
            return
        assert stop is None
        held = so_far[len(shown) :]
        assert so_far == shown + held
        starts = [so_far[i:] for i in range(len(so_far))]
        possible = [end for end in starts if any(s.startswith(end) for s in stops)]
        assert held == max(possible, key=len, default="")  # all that may become one, and no more
    assert shown + finder.flush() == text


def test_text_before_the_minimum_is_not_searched() -> None:
    finder = StopStrings(["ab"])
    assert finder.skip("xab") == "xab"
    assert finder.push("a") == ("", None)
    assert finder.skip("b") == "ab"
    assert finder.push("ab") == ("", "ab")


@pytest.mark.parametrize("kind", KINDS)
@FAST
@given(data=st.data(), text=TEXTS, include=st.booleans(), reason=st.sampled_from(["length", None]))
def test_requests_with_stop_strings(
    kind: str, data: st.DataObject, text: str, include: bool, reason: str | None
) -> None:
    """Tokens to deltas as the engine does it: cut at the first stop string, nothing leaks."""
    assume(kind == "byte level" or not writes_bytes(text))
    tokenizer = KINDS[kind]()
    token_ids = tokenizer.encode(text)
    whole = tokenizer.decode(token_ids)
    at = data.draw(st.integers(0, max(0, len(whole) - 1)))
    stop = whole[at : at + data.draw(st.integers(1, 3))] or "nothing"
    params = SamplingParams(stop=stop, include_stop_str_in_output=include)
    seq, stopped = Sequence(0, [1], params, request_id="r"), []
    tracker = RequestTracker(tokenizer, stop=stopped.append)
    output = tracker.add("r", None, [1], params, [seq])
    deltas: list[Delta] = []
    for position, token_id in enumerate(token_ids):
        seq.token_ids.append(token_id)
        end = reason if position == len(token_ids) - 1 else None
        delta = tracker.apply(SequenceUpdate(seq, (token_id,), finish_reason=end))
        assert delta is not None
        deltas.append(delta)
        if delta.finish_reason is not None:
            break
    else:
        deltas.append(tracker.end(seq, "abort"))
    assert output.finished
    assert not tracker._completions
    assert "".join(delta.text for delta in deltas) == output.text
    if stop in whole:
        assert output.text == whole[: whole.index(stop)] + (stop if include else "")
        assert deltas[-1].finish_reason in ("stop", "abort")  # a last character may be held back
    else:
        assert output.text == whole


def test_stop_strings_count_from_min_tokens_on() -> None:
    tokenizer, stopped = byte_level(), []
    params = SamplingParams(stop="X", min_tokens=3)
    seq = Sequence(0, [1], params, request_id="r")
    tracker = RequestTracker(tokenizer, stopped.append)
    request = tracker.add("r", None, [1], params, [seq])
    for number, letter in enumerate("aXbX", 1):
        assert not stopped, f"after {number - 1} tokens"
        (token_id,) = tokenizer.encode(letter)
        seq.token_ids.append(token_id)
        tracker.apply(SequenceUpdate(seq, (token_id,)))
    assert stopped == [seq]
    assert (request.text, request.finish_reason, request.stop_reason) == ("aXb", "stop", "X")
