"""The engine's unit of work: tokens, how many of them are computed, and a block table.

A sequence knows nothing of prefill or decode: a step computes some more of its tokens, and when
the last known one is computed a new one is sampled. Between planning a step and receiving its
result a sampled token is *pending*: it exists, its id is not known on the host yet.
"""

from __future__ import annotations

import enum
from dataclasses import KW_ONLY, InitVar, dataclass, field

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


@dataclass(slots=True, eq=False, repr=False)
class Sequence:
    """One completion of one prompt; made with the prompt's token ids.

    Invariants: num_computed <= len(token_ids) + num_pending, and block_table covers slots
    [0, num_computed) while the sequence runs.
    """

    seq_id: int
    token_ids: list[int]  # its own: the prompt's, then what was generated and is known
    params: SamplingParams
    _: KW_ONLY
    request_id: str = ""
    index: int = 0
    seed: int = 0
    salt: bytes = b""
    priority: int = 0
    fork_of: Sequence | None = None  # shares its prompt's blocks, as long as it runs
    arrival: InitVar[float] = 0.0
    num_prompt_tokens: int = field(init=False)
    max_tokens: int = field(init=False, default=0)  # set when queued; the last is never computed
    num_computed: int = field(init=False, default=0)
    num_pending: int = field(init=False, default=0)
    block_table: list[int] = field(init=False, default_factory=list)
    block_hashes: list[bytes] = field(init=False, default_factory=list)  # as far as needed
    row: int | None = field(init=False, default=None)
    status: Status = field(init=False, default=Status.WAITING)
    finish_reason: str | None = field(init=False, default=None)
    stats: SequenceStats = field(init=False)

    def __post_init__(self, arrival: float) -> None:
        self.num_prompt_tokens = len(self.token_ids)
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
