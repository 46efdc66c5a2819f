"""Owns the blocks of the KV cache: who uses each, which are free, and which content they hold.

A block is `block_size` slots, one token's keys and values each. It is in one of three states:
used (reference count > 0), cached (count 0, its content registered and ready to be shared), or
empty (count 0, nothing registered). Cached and empty blocks are both free: cached ones are
evicted in least-recently-used order, empty ones are handed out first.

The prefix cache is a hash chain over full blocks: a block's key digests its parent's key, its
token ids and, at the root, the salt of the request (vLLM's automatic prefix caching; 128-bit
BLAKE2b, RFC 7693). A hit is believed only if parent, tokens and salt really are the same, so not
even a colliding hash can hand one request another's KV. Knows no tensors: it hands out numbers.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import blake2b

from nanovllm.engine.sequence import Sequence

HashFn = Callable[[bytes, bytes], bytes]


def chain_hash(parent: bytes, content: bytes) -> bytes:
    """The 128-bit key of a block from its parent's key (or the salt) and its token bytes."""
    return blake2b(content, digest_size=16, key=parent[:64]).digest()


def root_key(salt: bytes) -> bytes:
    """The parent key of first blocks; any two different salts give different roots."""
    return blake2b(salt, digest_size=16).digest()


@dataclass(slots=True)
class _Content:
    """What a registered block holds. Two blocks with equal content share one record."""

    key: bytes
    parent: _Content | bytes  # the salt for a first block
    tokens: bytes


@dataclass(frozen=True, slots=True)
class Reservation:
    """What `reserve` changed: blocks appended, and a shared block replaced by a private copy."""

    new_block_ids: tuple[int, ...] = ()
    replaced_block: tuple[int, int] | None = None  # (index in the block table, new block id)
    copy: tuple[int, int] | None = None  # (source block id, destination block id)


UNCHANGED = Reservation()


class BlockManager:
    """Allocates, shares, registers and frees blocks. All methods are all-or-nothing."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        enable_prefix_caching: bool = True,
        hash_fn: HashFn = chain_hash,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._hash = hash_fn
        self._ref_counts = [0] * num_blocks
        self._contents: list[_Content | None] = [None] * num_blocks
        self._cached: dict[bytes, int] = {}  # key -> the block that is shared on a hit
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks whose content can be shared, used ones included."""
        return len(self._cached)

    def blocks_for(self, num_slots: int) -> int:
        return -(-num_slots // self.block_size)

    # --- the prefix cache -------------------------------------------------------------------

    def find_prefix(self, seq: Sequence) -> list[int]:
        """Blocks that hold the longest cached prefix of seq; changes nothing.

        At least the last token is left to compute, since its logits are wanted.
        """
        if not self.enable_prefix_caching or seq.params.prompt_logprobs is not None:
            return []  # the logits of every prompt position are wanted
        blocks: list[int] = []
        parent: _Content | bytes = seq.salt
        for index in range((len(seq.token_ids) - 1) // self.block_size):
            block = self._cached.get(self._key(seq, index))
            if block is None:
                break
            content = self._contents[block]
            assert content is not None
            if not _holds(content, parent, self._token_bytes(seq, index)):
                break
            blocks.append(block)
            parent = content
        return blocks

    def share(self, seq: Sequence, block_ids: Iterable[int]) -> None:
        """Makes block_ids the start of seq's (empty) block table."""
        assert not seq.block_table
        for block in block_ids:
            self._take(block)
            seq.block_table.append(block)

    def register(self, seq: Sequence) -> None:
        """Offers seq's full blocks, as far as computed and known, for sharing.

        May be called as soon as the step that fills them is planned: a later step cannot
        overtake it, and inside one step keys and values are stored before they are read. But for
        a single token's, which waits for the result (engine/plan.py).
        """
        if not self.enable_prefix_caching:
            return
        full = min(seq.num_computed, len(seq.token_ids)) // self.block_size
        first = full
        while first and self._contents[seq.block_table[first - 1]] is None:
            first -= 1
        for index in range(first, full):
            self._register_block(seq, index)

    def _register_block(self, seq: Sequence, index: int) -> None:
        block, key = seq.block_table[index], self._key(seq, index)
        parent = self._contents[seq.block_table[index - 1]] if index else seq.salt
        assert parent is not None
        tokens = self._token_bytes(seq, index)
        shared = self._cached.get(key)
        if shared is not None:
            content = self._contents[shared]
            assert content is not None
            if _holds(content, parent, tokens):
                self._contents[block] = content  # a duplicate: its children may still be found
                return
            self._forget(shared)  # stale parent or true collision: the newer content wins
        self._contents[block] = _Content(key, parent, tokens)
        self._cached[key] = block

    def reset_prefix_cache(self) -> None:
        """Forgets all content; used blocks stay with their sequences."""
        for block in range(self.num_blocks):
            self._forget(block)

    def _forget(self, block: int) -> None:
        content = self._contents[block]
        if content is None:
            return
        self._contents[block] = None
        if self._cached.get(content.key) == block:
            del self._cached[content.key]
        if block in self._free:
            self._free.move_to_end(block, last=False)

    def _key(self, seq: Sequence, index: int) -> bytes:
        hashes = seq.block_hashes
        while len(hashes) <= index:
            parent = hashes[-1] if hashes else root_key(seq.salt)
            hashes.append(self._hash(parent, self._token_bytes(seq, len(hashes))))
        return hashes[index]

    def _token_bytes(self, seq: Sequence, index: int) -> bytes:
        start = index * self.block_size
        return array("I", seq.token_ids[start : start + self.block_size]).tobytes()

    # --- allocation -------------------------------------------------------------------------

    def can_admit(self, seq: Sequence, prefix: list[int], num_kept: int = 0) -> bool:
        """Whether all known tokens of seq fit beside what is in use, sharing `prefix`, and leave
        num_kept blocks free."""
        revived = sum(self._ref_counts[block] == 0 for block in prefix)
        return self.blocks_for(seq.num_tokens) - len(prefix) + num_kept <= len(self._free) - revived

    def reserve(self, seq: Sequence, num_slots: int) -> Reservation | None:
        """Makes slots [seq.num_computed, num_slots) exist and be writable; None if blocks lack.

        A block that others share, or that the cache offers, is never written: it is replaced by
        a private copy first.
        """
        table = seq.block_table
        first = seq.num_computed // self.block_size
        if num_slots <= len(table) * self.block_size and self._is_private(table[first]):
            return UNCHANGED  # as nearly always
        num_new = max(0, self.blocks_for(num_slots) - len(table))
        shared = first < len(table) and not self._is_private(table[first])
        if num_new + shared > len(self._free):
            return None
        copy = replaced = None
        if shared:
            source, target = table[first], self._pop_free()
            table[first] = target
            self._release(source)
            copy, replaced = (source, target), (first, target)
        new = tuple(self._pop_free() for _ in range(num_new))
        table.extend(new)
        return Reservation(new, replaced, copy)

    def fork(self, parent: Sequence, child: Sequence, num_slots: int) -> None:
        """Shares the blocks that hold parent's first num_slots slots with child."""
        assert not child.block_table
        assert num_slots <= parent.num_computed
        self.share(child, parent.block_table[: self.blocks_for(num_slots)])
        child.num_computed = num_slots

    def free(self, seq: Sequence, discard: bool = False) -> None:
        """Takes all blocks from seq; with `discard`, their content is forgotten as broken."""
        for block in reversed(seq.block_table):  # so that a chain is evicted from its end
            if discard:
                self._forget(block)
            self._release(block)
        seq.block_table.clear()

    def _is_private(self, block: int) -> bool:
        return self._ref_counts[block] == 1 and self._contents[block] is None

    def _take(self, block: int) -> None:
        if self._ref_counts[block] == 0:
            del self._free[block]
        self._ref_counts[block] += 1

    def _pop_free(self) -> int:
        block, _ = self._free.popitem(last=False)
        self._forget(block)
        self._ref_counts[block] = 1
        return block

    def _release(self, block: int) -> None:
        self._ref_counts[block] -= 1
        if self._ref_counts[block]:
            return
        content = self._contents[block]
        if content is not None and self._cached.get(content.key) != block:
            self._contents[block] = content = None  # a duplicate: nobody can find it
        self._free[block] = None
        if content is None:
            self._free.move_to_end(block, last=False)

    # --- invariants -------------------------------------------------------------------------

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Raises AssertionError unless the books agree with `sequences`, all that own blocks."""
        counts = [0] * self.num_blocks
        for seq in sequences:
            assert len(seq.block_table) == len(set(seq.block_table)), f"{seq} owns a block twice"
            assert len(seq.block_table) >= self.blocks_for(seq.num_computed), f"{seq} lacks blocks"
            for block in seq.block_table:
                counts[block] += 1
        assert counts == self._ref_counts, "reference counts differ from the block tables"
        free = {block for block, count in enumerate(counts) if count == 0}
        assert free == set(self._free), "the free list differs from the unreferenced blocks"
        cached = [self._contents[block] is not None for block in self._free]
        assert cached == sorted(cached), "an empty block stands behind a cached one"
        for key, block in self._cached.items():
            content = self._contents[block]
            assert content is not None, f"cached block {block} has no content"
            assert content.key == key, f"cached block {block} has another key"
        for block in free:
            content = self._contents[block]
            assert content is None or self._cached.get(content.key) == block


def _holds(content: _Content, parent: _Content | bytes, tokens: bytes) -> bool:
    same_parent = (
        content.parent is parent if isinstance(parent, _Content) else (content.parent == parent)
    )
    return same_parent and content.tokens == tokens
