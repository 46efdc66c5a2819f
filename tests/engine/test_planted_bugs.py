"""The state machine is worth its time only if it finds bugs: here it finds planted ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from engine_machine import EngineMachine
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from nanovllm.engine import block_manager, scheduler
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence

SETTINGS = settings(
    max_examples=3000,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    report_multiple_bugs=False,
    print_blob=False,
)
Patch = Callable[[pytest.MonkeyPatch], Any]


def fork_without_counting(patch: pytest.MonkeyPatch) -> None:
    def fork(self: BlockManager, parent: Sequence, child: Sequence, num_slots: int) -> None:
        child.block_table[:] = parent.block_table[: self.blocks_for(num_slots)]
        child.num_computed = num_slots

    patch.setattr(BlockManager, "fork", fork)


def free_what_others_use(patch: pytest.MonkeyPatch) -> None:
    def release(self: BlockManager, block: int) -> None:
        self._ref_counts[block] -= 1
        self._free[block] = None

    patch.setattr(BlockManager, "_release", release)


def ignore_the_salt(patch: pytest.MonkeyPatch) -> None:
    holds = block_manager._holds
    patch.setattr(block_manager, "root_key", lambda salt: b"")
    patch.setattr(
        block_manager,
        "_holds",
        lambda content, parent, tokens: holds(
            content, content.parent if isinstance(parent, bytes) else parent, tokens
        ),
    )


def believe_every_hash(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(block_manager, "_holds", lambda content, parent, tokens: True)


def compare_tokens_but_not_the_parent(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(block_manager, "_holds", lambda content, parent, tokens: content.tokens == tokens)


def write_shared_blocks(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockManager, "_is_private", lambda self, block: True)


def register_before_computed(patch: pytest.MonkeyPatch) -> None:
    def register(self: BlockManager, seq: Sequence) -> None:
        full = len(seq.token_ids) // self.block_size
        for index in range(min(full, len(seq.block_table)) if self.enable_prefix_caching else 0):
            self._register_block(seq, index)

    patch.setattr(BlockManager, "register", register)


def hand_out_used_blocks(patch: pytest.MonkeyPatch) -> None:
    def take(self: BlockManager, block: int) -> None:
        self._ref_counts[block] += 1  # and it stays in the free list

    patch.setattr(BlockManager, "_take", take)


def keep_evicted_content(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockManager, "_forget", lambda self, block: None)


def copy_what_this_step_computes(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(scheduler._Draft, "num_tokens_of", lambda self, seq: 0)


def go_on_with_blocks_of_a_failed_step(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Scheduler, "_started_on_shared_blocks", lambda self: ())


def keep_the_cache_of_a_failed_step(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockManager, "reset_prefix_cache", lambda self: None)


def forget_to_give_back(patch: pytest.MonkeyPatch) -> None:
    def free(self: BlockManager, seq: Sequence, discard: bool = False) -> None:
        for block in seq.block_table[:-1]:
            self._release(block)
        seq.block_table.clear()

    patch.setattr(BlockManager, "free", free)


def compute_the_whole_prompt_from_cache(patch: pytest.MonkeyPatch) -> None:
    find = BlockManager.find_prefix

    def find_prefix(self: BlockManager, seq: Sequence) -> list[int]:
        seq.token_ids.append(1)
        try:
            return find(self, seq)
        finally:
            seq.token_ids.pop()
            del seq.block_hashes[len(seq.token_ids) // self.block_size :]

    patch.setattr(BlockManager, "find_prefix", find_prefix)


def readmit_before_the_result(patch: pytest.MonkeyPatch) -> None:
    def admit_waiting(self: Scheduler, draft: Any, forks_only: bool = False) -> None:
        while self.waiting and draft.budget and self._free_rows and not forks_only:
            parent = self.waiting[0].fork_of
            if parent is not None and parent.num_computed < parent.num_prompt_tokens:
                break
            if not self._admit(self.waiting[0], draft):
                break  # a preempted sequence whose last token is still pending comes back

    patch.setattr(Scheduler, "_admit_waiting", admit_waiting)


def end_one_token_late(patch: pytest.MonkeyPatch) -> None:
    limit = Scheduler._limit
    patch.setattr(Scheduler, "_limit", lambda self, seq: limit(self, seq) + 1)


def offer_what_a_single_token_is_about_to_fill(patch: pytest.MonkeyPatch) -> None:
    plan_row = Scheduler._plan_row

    def plan_and_offer(self: Scheduler, seq: Sequence, *rest: Any) -> None:
        plan_row(self, seq, *rest)
        self.blocks.register(seq)

    patch.setattr(Scheduler, "_plan_row", plan_and_offer)


BUGS: list[Patch] = [
    offer_what_a_single_token_is_about_to_fill,
    readmit_before_the_result,
    end_one_token_late,
    fork_without_counting,
    free_what_others_use,
    ignore_the_salt,
    believe_every_hash,
    compare_tokens_but_not_the_parent,
    write_shared_blocks,
    register_before_computed,
    hand_out_used_blocks,
    keep_evicted_content,
    copy_what_this_step_computes,
    go_on_with_blocks_of_a_failed_step,
    keep_the_cache_of_a_failed_step,
    forget_to_give_back,
    compute_the_whole_prompt_from_cache,
]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
@pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning")
def test_found(bug: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    bug(monkeypatch)
    with pytest.raises((AssertionError, LookupError)):
        run_state_machine_as_test(EngineMachine, settings=SETTINGS)
