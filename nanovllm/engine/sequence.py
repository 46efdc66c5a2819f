"""The engine's unit of work: tokens, how many of them are computed, and a block table.

A sequence knows nothing of prefill or decode: a step computes some more of its tokens, and when
the last known one is computed a new one is sampled. Between planning a step and receiving its
result a sampled token is *pending*: it exists, its id is not known on the host yet.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence as TokenIds
from dataclasses import dataclass

from nanovllm.sampling_params import SamplingParams


class Status(enum.Enum):
    WAITING = "waiting"  # new or preempted: owns neither row nor blocks
    RUNNING = "running"  # owns a row and blocks
    FINISHED = "finished"  # owns nothing


@dataclass(slots=True)
class SequenceStats:
    """Times are of the engine's clock, in seconds; None until they happened."""

    arrival: float
    first_scheduled: float | None = None
    first_token: float | None = None
    finished: float | None = None
    num_cached_tokens: int = 0
    num_preemptions: int = 0


class Sequence:
    """One completion of one prompt.

    Invariants: num_computed <= len(token_ids) + num_pending, and block_table covers slots
    [0, num_computed) while the sequence runs.
    """

    __slots__ = (
        "block_hashes",
        "block_table",
        "finish_reason",
        "fork_of",
        "index",
        "max_tokens",
        "num_computed",
        "num_pending",
        "num_prompt_tokens",
        "params",
        "priority",
        "request_id",
        "row",
        "salt",
        "seed",
        "seq_id",
        "stats",
        "status",
        "token_ids",
    )

    def __init__(
        self,
        seq_id: int,
        prompt_token_ids: TokenIds[int],
        params: SamplingParams,
        *,
        request_id: str = "",
        index: int = 0,
        seed: int = 0,
        salt: bytes = b"",
        priority: int = 0,
        arrival: float = 0.0,
        fork_of: Sequence | None = None,
    ) -> None:
        self.seq_id = seq_id
        self.request_id = request_id
        self.index = index
        self.params = params
        self.seed = seed
        self.salt = salt
        self.priority = priority
        self.fork_of = fork_of
        self.token_ids = list(prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.max_tokens = 0  # set when it is queued; the last one is sampled, never computed
        self.num_computed = 0
        self.num_pending = 0
        self.block_table: list[int] = []
        self.block_hashes: list[bytes] = []  # of full blocks, as far as they were needed
        self.row: int | None = None
        self.status = Status.WAITING
        self.finish_reason: str | None = None
        self.stats = SequenceStats(arrival)

    @property
    def num_tokens(self) -> int:
        """Tokens that exist, the pending ones included."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_output_tokens(self) -> int:
        """Generated tokens whose ids are known."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    def __repr__(self) -> str:
        return (
            f"Sequence({self.seq_id}, {self.status.value}, tokens={len(self.token_ids)}"
            f"+{self.num_pending}, computed={self.num_computed}, blocks={self.block_table})"
        )
