"""Block manager, one rule at a time: sharing, eviction order, collisions, copy on write."""

from __future__ import annotations

import pytest

from nanovllm.engine.block_manager import BlockManager, Reservation, chain_hash, root_key
from nanovllm.engine.sequence import Sequence
from nanovllm.sampling_params import SamplingParams

SIZE = 4
LETTERS = list(range(100, 140))


def sequence(token_ids: list[int], salt: bytes = b"", **params: int) -> Sequence:
    return Sequence(0, token_ids, SamplingParams(**params), salt=salt)  # type: ignore[arg-type]


def run(blocks: BlockManager, token_ids: list[int], salt: bytes = b"") -> Sequence:
    """A sequence whose tokens are all computed, on top of what the cache has."""
    seq = sequence(token_ids, salt)
    blocks.share(seq, blocks.find_prefix(seq))
    seq.num_computed = len(seq.block_table) * blocks.block_size
    assert blocks.reserve(seq, len(token_ids)) is not None
    seq.num_computed = len(token_ids)
    blocks.register(seq)
    return seq


def test_hash_is_a_chain_of_128_bits() -> None:
    first = chain_hash(root_key(b""), b"tokens")
    assert len(first) == 16
    assert chain_hash(root_key(b"salt"), b"tokens") != first
    assert chain_hash(first, b"tokens") != first
    assert len({root_key(salt) for salt in (b"", b"\0", b"\0\0", b"a" * 64, b"a" * 65)}) == 5


def test_reserve_is_all_or_nothing() -> None:
    blocks = BlockManager(3, SIZE)
    seq = sequence(LETTERS[:13])
    assert blocks.reserve(seq, 13) is None
    assert (blocks.num_free, seq.block_table) == (3, [])
    assert blocks.reserve(seq, 12) == Reservation((0, 1, 2))
    assert blocks.reserve(seq, 12) == Reservation()
    assert (blocks.num_free, blocks.num_used) == (0, 3)
    blocks.check_integrity([seq])
    blocks.free(seq)
    assert (blocks.num_free, seq.block_table) == (3, [])


@pytest.mark.parametrize(("length", "hits"), [(1, 0), (4, 0), (5, 1), (8, 1), (9, 2), (12, 2)])
def test_a_prefix_leaves_one_token_to_compute(length: int, hits: int) -> None:
    blocks = BlockManager(8, SIZE)
    first = run(blocks, LETTERS[:12])
    found = blocks.find_prefix(sequence(LETTERS[:length]))
    assert found == first.block_table[:hits]


def test_what_is_not_shared() -> None:
    blocks = BlockManager(16, SIZE)
    run(blocks, LETTERS[:12])
    assert blocks.find_prefix(sequence(LETTERS[:12], salt=b"other")) == []
    assert blocks.find_prefix(sequence([1, *LETTERS[1:12]])) == []
    assert blocks.find_prefix(sequence(LETTERS[4:12])) == []
    assert blocks.find_prefix(sequence(LETTERS[:12], prompt_logprobs=1)) == []
    assert len(blocks.find_prefix(sequence([*LETTERS[:8], 1, 2]))) == 2
    disabled = BlockManager(16, SIZE, enable_prefix_caching=False)
    run(disabled, LETTERS[:12])
    assert disabled.find_prefix(sequence(LETTERS[:12])) == []
    assert disabled.num_cached == 0


def test_blocks_that_are_not_full_are_not_offered() -> None:
    blocks = BlockManager(8, SIZE)
    seq = sequence(LETTERS[:12])
    blocks.reserve(seq, 7)
    seq.num_computed = 7
    blocks.register(seq)
    assert blocks.num_cached == 1
    seq.num_pending = 1  # a token whose id nobody knows cannot be in a key
    blocks.reserve(seq, 13)
    seq.num_computed = 13
    blocks.register(seq)
    assert blocks.num_cached == 3


def test_cached_blocks_are_evicted_last_and_the_oldest_first() -> None:
    blocks = BlockManager(5, SIZE)
    old, new = run(blocks, LETTERS[:8]), run(blocks, LETTERS[20:28])
    old_table, new_table = list(old.block_table), list(new.block_table)
    blocks.free(old)
    blocks.free(new)
    seq = sequence([1] * 20)
    order = [blocks.reserve(seq, SIZE * n).new_block_ids[0] for n in range(1, 6)]  # type: ignore[union-attr]
    assert order == [4, *reversed(old_table), *reversed(new_table)]  # chains lose their ends first
    assert blocks.num_cached == 0


def test_a_hit_makes_a_block_young_again() -> None:
    blocks = BlockManager(4, SIZE)
    first, second = run(blocks, LETTERS[:4]), run(blocks, LETTERS[20:24])
    kept = first.block_table[0]
    blocks.free(first)
    blocks.free(second)
    again = run(blocks, LETTERS[:5])
    assert again.block_table[0] == kept
    blocks.free(again)
    filler = sequence([1] * 12)
    blocks.reserve(filler, 12)
    assert blocks.find_prefix(sequence(LETTERS[:5])) == [kept]
    blocks.check_integrity([filler])


def test_admission_counts_what_sharing_takes_from_the_free_list() -> None:
    blocks = BlockManager(3, SIZE)
    blocks.free(run(blocks, LETTERS[:8]))
    fits, too_long = sequence(LETTERS[:12]), sequence(LETTERS[:13])
    assert blocks.can_admit(fits, blocks.find_prefix(fits))
    assert not blocks.can_admit(too_long, blocks.find_prefix(too_long))


def test_fork_shares_and_the_first_writer_copies() -> None:
    blocks = BlockManager(6, SIZE)
    parent, child = run(blocks, LETTERS[:6]), sequence(LETTERS[:6])
    blocks.fork(parent, child, 5)
    assert child.block_table == parent.block_table
    assert blocks.num_used == 2
    shared = parent.block_table[1]
    reserved = blocks.reserve(child, 6)
    assert reserved is not None
    assert reserved.copy == (shared, child.block_table[1])
    assert reserved.replaced_block == (1, child.block_table[1])
    assert reserved.new_block_ids == ()
    assert child.block_table[0] == parent.block_table[0]
    child.num_computed = 6
    assert blocks.reserve(parent, 7) == Reservation()  # it is alone again: no copy
    blocks.check_integrity([parent, child])


def test_a_registered_block_is_never_written() -> None:
    """A fork that ends inside a full block leaves the content that others can find alone."""
    blocks = BlockManager(6, SIZE)
    parent, child = run(blocks, LETTERS[:8]), sequence(LETTERS[:8])
    blocks.fork(parent, child, 7)
    blocks.free(parent)
    offered = child.block_table[1]
    reserved = blocks.reserve(child, 8)
    assert reserved is not None
    assert reserved.copy is not None
    assert reserved.copy[0] == offered
    assert blocks.find_prefix(sequence(LETTERS[:9]))[1] == offered


def test_copying_needs_a_free_block() -> None:
    blocks = BlockManager(2, SIZE)
    parent, child = run(blocks, LETTERS[:6]), sequence(LETTERS[:6])
    blocks.fork(parent, child, 5)
    assert blocks.reserve(child, 6) is None
    assert child.block_table == parent.block_table
    blocks.check_integrity([parent, child])


def test_equal_content_is_offered_once() -> None:
    """Two sequences that computed the same side by side; either may end first."""
    for keep_first in (True, False):
        blocks = BlockManager(8, SIZE)
        pair = [sequence(LETTERS[:8]), sequence(LETTERS[:8])]
        for seq in pair:
            blocks.reserve(seq, 8)
            seq.num_computed = 8
            blocks.register(seq)
        assert blocks.num_cached == 2
        offered = list(pair[0].block_table)
        gone, kept = pair if not keep_first else reversed(pair)
        blocks.free(gone)
        blocks.check_integrity([kept])
        found = blocks.find_prefix(sequence(LETTERS[:9]))
        assert found == offered
        longer = sequence(LETTERS[:12])
        blocks.share(longer, found)
        longer.num_computed = 4 * len(found)
        blocks.reserve(longer, 12)
        longer.num_computed = 12
        blocks.register(longer)
        blocks.check_integrity([kept, longer])


@pytest.mark.parametrize("hash_fn", [lambda parent, content: b"same", lambda p, c: c[:1]])
def test_colliding_hashes_hand_out_nothing_foreign(hash_fn) -> None:  # type: ignore[no-untyped-def]
    blocks = BlockManager(12, SIZE, hash_fn=hash_fn)
    run(blocks, LETTERS[:8])
    for other in ([1, 2, 3, 4, 5], [*LETTERS[4:8], 1], [LETTERS[0], 2, 3, 4, 5]):
        assert blocks.find_prefix(sequence(other)) == []
    assert blocks.find_prefix(sequence([*LETTERS[:8], 1], salt=b"x")) == []


def test_broken_content_is_forgotten() -> None:
    blocks = BlockManager(6, SIZE)
    seq = run(blocks, LETTERS[:8])
    blocks.free(seq, discard=True)
    assert blocks.num_cached == 0
    assert blocks.find_prefix(sequence(LETTERS[:9])) == []
    blocks.check_integrity([])


def test_reset_forgets_content_and_keeps_owners() -> None:
    blocks = BlockManager(6, SIZE)
    used, free = run(blocks, LETTERS[:8]), run(blocks, LETTERS[20:28])
    blocks.free(free)
    blocks.reset_prefix_cache()
    assert (blocks.num_cached, blocks.num_used) == (0, 2)
    blocks.register(used)  # its content is still true
    assert blocks.find_prefix(sequence(LETTERS[:9])) == used.block_table
    blocks.check_integrity([used])


def test_integrity_check_sees_what_is_wrong() -> None:
    blocks = BlockManager(6, SIZE)
    seq = run(blocks, LETTERS[:8])
    with pytest.raises(AssertionError, match="reference counts"):
        blocks.check_integrity([])
    seq.block_table.append(seq.block_table[0])
    with pytest.raises(AssertionError, match="twice"):
        blocks.check_integrity([seq])
    seq.block_table[:] = seq.block_table[:1]
    with pytest.raises(AssertionError, match="lacks blocks"):
        blocks.check_integrity([seq])
