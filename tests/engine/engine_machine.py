"""A state machine that does to an engine all that users, memory and devices can do to it."""

from __future__ import annotations

import itertools
from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from simulated_kv import EOS, VOCAB_SIZE, SimulatedKV, answer

from nanovllm.engine.block_manager import BlockManager, chain_hash
from nanovllm.engine.core import EngineCore
from nanovllm.engine.scheduler import Scheduler, SequenceUpdate
from nanovllm.engine.sequence import Sequence, Status
from nanovllm.errors import InvalidRequestError
from nanovllm.sampling_params import SamplingParams

HASHES = {
    "real": chain_hash,
    "constant": lambda parent, content: b"same",
    "two bits": lambda parent, content: bytes([sum(chain_hash(parent, content)) & 3]),
}
PROMPTS = st.lists(st.integers(1, VOCAB_SIZE - 1), min_size=1, max_size=14)
MAX_STEPS_OF_A_SEQUENCE = 100  # 14 prompt and 23 output tokens one by one, preempted now and then


class EngineMachine(RuleBasedStateMachine):
    """Compares everything that comes out with what `answer` says, and the books after each rule."""

    @initialize(
        num_blocks=st.integers(2, 9),
        block_size=st.integers(1, 4),
        max_num_seqs=st.integers(1, 4),
        more_budget=st.integers(0, 9),
        max_model_len=st.integers(4, 24),
        depth=st.integers(1, 3),
        caching=st.sampled_from([True, True, True, False]),
        hashing=st.sampled_from(sorted(HASHES)),
    )
    def start(
        self,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        more_budget: int,
        max_model_len: int,
        depth: int,
        caching: bool,
        hashing: str,
    ) -> None:
        budget = max_num_seqs + more_budget
        self.kv = SimulatedKV(num_blocks, block_size, max_num_seqs, budget)
        self.blocks = BlockManager(num_blocks, block_size, caching, HASHES[hashing])
        ticks = itertools.count()
        self.scheduler = Scheduler(
            self.blocks,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_model_len=max_model_len,
            eos_token_ids=frozenset([EOS]),
            clock=lambda: float(next(ticks)),
        )
        self.core = EngineCore(
            self.scheduler,
            self.kv,
            vocab_size=VOCAB_SIZE,
            depth=depth,
            clock=lambda: float(next(ticks)),
        )
        self.limit = min(max_model_len, num_blocks * block_size)
        self.requests: dict[str, list[Sequence]] = {}
        self.tokens: dict[int, list[int]] = {}
        self.ends: Counter[int] = Counter()

    # --- what may happen --------------------------------------------------------------------

    @rule(
        prompt=PROMPTS,
        n=st.sampled_from([1, 1, 2, 3]),
        max_tokens=st.one_of(st.none(), st.integers(1, 10)),
        min_tokens=st.integers(0, 2),
        ignore_eos=st.booleans(),
        stop_letter=st.sampled_from([None, None, 1]),
        prompt_logprobs=st.sampled_from([None, None, None, 0]),
        priority=st.sampled_from([0, 0, 1]),
        salt=st.sampled_from([b"", b"", b"a"]),
    )
    def add(
        self,
        prompt: list[int],
        n: int,
        max_tokens: int | None,
        min_tokens: int,
        ignore_eos: bool,
        stop_letter: int | None,
        prompt_logprobs: int | None,
        priority: int,
        salt: bytes,
    ) -> None:
        params = SamplingParams(
            n=n,
            max_tokens=max_tokens,
            min_tokens=min(min_tokens, max_tokens or min_tokens),
            ignore_eos=ignore_eos,
            stop_token_ids=() if stop_letter is None else (stop_letter,),
            prompt_logprobs=prompt_logprobs,
        )
        name = f"request {len(self.requests)}"
        if len(prompt) >= self.limit:
            waiting = list(self.scheduler.waiting)
            with pytest.raises(InvalidRequestError, match=str(len(prompt))):
                self.core.add(name, prompt, params, priority=priority, salt=salt)
            assert self.scheduler.waiting == waiting, "a refused request was queued"
            return
        self._queue(name, prompt, params, priority, salt)

    @precondition(lambda self: self.scheduler.running)
    @rule(data=st.data(), more=st.integers(1, VOCAB_SIZE - 1))
    def follow(self, data: st.DataObject, more: int) -> None:
        """A prompt that begins with all that a running sequence has."""
        seq = data.draw(st.sampled_from(self.scheduler.running))
        prompt = [*seq.token_ids, more]
        if len(prompt) < self.limit:
            params = SamplingParams(max_tokens=4)
            self._queue(f"request {len(self.requests)}", prompt, params, 0, seq.salt)
            self.step()

    def _queue(
        self, name: str, prompt: list[int], params: SamplingParams, priority: int, salt: bytes
    ) -> None:
        group = self.core.add(name, prompt, params, priority=priority, salt=salt)
        assert len(group) == params.n
        assert len({seq.seed for seq in group}) == params.n
        self.kv.know(group)
        self.requests[name] = group
        self.tokens |= {seq.seq_id: [] for seq in group}

    @rule()
    def step(self) -> None:
        busy, before = not self.core.is_finished, len(self.kv.delivered)
        updates = self.core.step()
        if busy:
            assert len(self.kv.delivered) == before + 1, "there is work and no step was made"
        wrong = self.kv.delivered[-1].wrong if len(self.kv.delivered) > before else {}
        for update in updates:
            self._take(update, wrong)

    @rule(num_steps=st.integers(2, 8))
    def several_steps(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.step()

    @precondition(lambda self: self.core._groups)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(list(self.core._groups)))
        alive = [seq for seq in self.requests[name] if seq.status is not Status.FINISHED]
        ended = self.core.abort(name)
        assert ended == alive
        for seq in ended:
            self._end(seq, "abort")
        assert self.core.abort(name) == []

    @precondition(lambda self: self.scheduler.running)
    @rule(data=st.data())
    def stop_string(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(self.scheduler.running))
        self._end(self.core.stop(seq, "stop"), "stop")

    @rule()
    def next_step_fails(self) -> None:
        self.kv.fail_next = True

    @rule()
    def next_row_fails(self) -> None:
        self.kv.row_errors = 1

    @rule()
    def forget_cached_content(self) -> None:
        self.blocks.reset_prefix_cache()

    # --- what must hold ---------------------------------------------------------------------

    def _take(self, update: SequenceUpdate, wrong: dict[int, str]) -> None:
        seq = update.seq
        assert self.ends[seq.seq_id] == 0, f"{seq} went on after its end"
        if update.error is not None:
            assert update.finish_reason == "error"
            assert not update.token_ids
        else:
            assert seq.seed not in wrong, wrong[seq.seed]
        self.tokens[seq.seq_id] += update.token_ids
        if update.finish_reason is not None:
            self._end(seq, update.finish_reason)

    def _end(self, seq: Sequence, reason: str) -> None:
        self.ends[seq.seq_id] += 1
        assert self.ends[seq.seq_id] == 1, f"{seq} ended twice"
        assert seq.status is Status.FINISHED
        assert seq.finish_reason == reason
        assert not seq.block_table
        tokens = self.tokens[seq.seq_id]
        assert seq.output_token_ids == tokens
        prompt = seq.token_ids[: seq.num_prompt_tokens]
        assert tokens == answer(prompt, seq.salt, seq.seed, len(tokens))
        if reason == "length":
            assert len(tokens) == self._max_output(seq)
        elif reason == "stop" and tokens:
            assert len(tokens) <= self._max_output(seq)

    def _max_output(self, seq: Sequence) -> int:
        room = self.limit - seq.num_prompt_tokens
        return room if seq.params.max_tokens is None else min(room, seq.params.max_tokens)

    @invariant()
    def books_agree(self) -> None:
        if hasattr(self, "core"):
            self.scheduler.check_integrity()

    def teardown(self) -> None:
        if not hasattr(self, "core"):
            return
        unfinished = sum(len(group) for group in self.core._groups.values())
        for _ in range(MAX_STEPS_OF_A_SEQUENCE * unfinished):
            if self.core.is_finished:
                break
            self.step()
            self.books_agree()
        assert self.core.is_finished, "requests starve"
        self.core.step()  # what is still in flight was computed in vain
        self.core.step()
        self.scheduler.check_integrity()
        assert self.blocks.num_used == 0, "blocks leak"
        assert not self.scheduler.running
        assert not self.scheduler.waiting
        everyone = [seq.seq_id for group in self.requests.values() for seq in group]
        assert sorted(self.ends) == everyone, "some request never ended"
        self.core.close()
        assert self.kv.closed
