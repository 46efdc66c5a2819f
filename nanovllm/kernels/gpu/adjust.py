"""What a request may ask of its logits before a token is chosen: biases, bans, penalties.

Only the lines that ask are copied, to float32, and changed there. The dense kernel applies the
penalties to every token; tokens with a bias or a ban are then written again, so no order between
programs matters. `Sampler.adjust` in runner/sampler.py is the specification.

Shape legend: n special lines, L lines of logits, V vocabulary, E entries, R rows, C context.
"""

# mypy: disable-error-code="no-untyped-def, attr-defined, misc"
from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

TILE = 4096
IN_PROMPT = tl.constexpr(1 << 30)  # above any count of output tokens


@dataclass(frozen=True, slots=True)
class LineParams:
    """Device tensors [n] of the special lines; lengths count the tokens that exist, ids or not."""

    lines: Tensor  # int32: which line of the logits
    rows: Tensor  # int32: which row of the token table
    num_tokens: Tensor  # int32
    num_prompt: Tensor  # int32
    only_listed: Tensor  # int32: 1 if no token but those with an entry may be chosen
    repetition: Tensor  # float32
    presence: Tensor  # float32
    frequency: Tensor  # float32


@triton.jit
def _count_kernel(
    tokens_ptr, row_ptr, num_tokens_ptr, num_prompt_ptr, counts_ptr, tokens_stride, V,
    TILE: tl.constexpr,
):  # fmt: skip
    """Grid (n, tiles of C): how often each token occurs in the output, and a bit for the prompt."""
    i = tl.program_id(0)
    position = tl.program_id(1) * TILE + tl.arange(0, TILE)
    here = position < tl.load(num_tokens_ptr + i)
    row = tl.load(row_ptr + i).to(tl.int64)
    token = tl.load(tokens_ptr + row * tokens_stride + position, mask=here, other=0)
    prompt = position < tl.load(num_prompt_ptr + i)
    spot = counts_ptr + i.to(tl.int64) * V + token
    tl.atomic_or(spot, IN_PROMPT, mask=here & prompt, sem="relaxed")
    tl.atomic_add(spot, 1, mask=here & (prompt == 0), sem="relaxed")


@triton.jit
def _penalized(x, count, repetition, presence, frequency):
    """Divides or multiplies what was seen, then subtracts once and per occurrence."""
    scaled = tl.where(x > 0, x / repetition, x * repetition)
    x = tl.where(count > 0, scaled, x)
    times = count & (IN_PROMPT - 1)
    return tl.where(times > 0, x - (presence + frequency * times.to(tl.float32)), x)


@triton.jit
def _dense_kernel(
    logits_ptr, out_ptr, counts_ptr, line_ptr, only_ptr, repetition_ptr, presence_ptr,
    frequency_ptr, logits_stride, V, TILE: tl.constexpr, PENALTIES: tl.constexpr,
):  # fmt: skip
    """Grid (n, tiles of V): the line's logits with penalties, or -inf throughout."""
    i = tl.program_id(0)
    token = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = token < V
    line = tl.load(line_ptr + i).to(tl.int64)
    x = tl.load(logits_ptr + line * logits_stride + token, mask=mask, other=0.0).to(tl.float32)
    if PENALTIES:
        count = tl.load(counts_ptr + i.to(tl.int64) * V + token, mask=mask, other=0)
        x = _penalized(
            x, count, tl.load(repetition_ptr + i), tl.load(presence_ptr + i),
            tl.load(frequency_ptr + i),
        )  # fmt: skip
    x = tl.where(tl.load(only_ptr + i) > 0, float("-inf"), x)
    tl.store(out_ptr + i.to(tl.int64) * V + token, x, mask=mask)


@triton.jit
def _entries_kernel(
    logits_ptr, out_ptr, counts_ptr, line_ptr, repetition_ptr, presence_ptr, frequency_ptr,
    index_ptr, token_ptr, bias_ptr, num_entries, logits_stride, V,
    TILE: tl.constexpr, PENALTIES: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of E): single tokens of special lines, with their bias; -inf forbids one."""
    e = tl.program_id(0) * TILE + tl.arange(0, TILE)
    mask = e < num_entries
    i = tl.load(index_ptr + e, mask=mask, other=0)
    token = tl.load(token_ptr + e, mask=mask, other=0)
    line = tl.load(line_ptr + i).to(tl.int64)
    x = tl.load(logits_ptr + line * logits_stride + token, mask=mask, other=0.0).to(tl.float32)
    x += tl.load(bias_ptr + e, mask=mask, other=0.0)
    spot = i.to(tl.int64) * V + token
    if PENALTIES:
        count = tl.load(counts_ptr + spot, mask=mask, other=0)
        x = _penalized(
            x, count, tl.load(repetition_ptr + i), tl.load(presence_ptr + i),
            tl.load(frequency_ptr + i),
        )  # fmt: skip
    tl.store(out_ptr + spot, x, mask=mask)


@triton.jit
def _bad_words_kernel(
    out_ptr, tokens_ptr, row_ptr, num_tokens_ptr, index_ptr, begin_ptr, spelling_ptr,
    tokens_stride, V, TILE: tl.constexpr,
):  # fmt: skip
    """Grid (spellings): forbids a spelling's last token if the row ends with the others."""
    s = tl.program_id(0)
    i = tl.load(index_ptr + s)
    begin = tl.load(begin_ptr + s)
    head = tl.load(begin_ptr + s + 1) - begin - 1
    row = tl.load(row_ptr + i).to(tl.int64)
    start = tl.load(num_tokens_ptr + i) - head
    if start < 0:
        return
    differing = 0
    for base in range(0, head, TILE):
        j = base + tl.arange(0, TILE)
        mask = j < head
        known = tl.load(tokens_ptr + row * tokens_stride + start + j, mask=mask, other=0)
        wanted = tl.load(spelling_ptr + begin + j, mask=mask, other=0)
        differing += tl.sum((mask & (known != wanted)).to(tl.int32), 0)
    if differing == 0:
        last = tl.load(spelling_ptr + begin + head)
        tl.store(out_ptr + i.to(tl.int64) * V + last, float("-inf"))


def count_tokens(tokens: Tensor, p: LineParams, counts: Tensor) -> None:
    """counts [n, V] int32 from the token table [R, C] int32."""
    counts.zero_()
    tile = 1024
    grid = (len(counts), triton.cdiv(tokens.shape[1], tile))
    _count_kernel[grid](
        tokens, p.rows, p.num_tokens, p.num_prompt, counts, tokens.stride(0), counts.shape[1],
        tile, num_warps=4,
    )  # fmt: skip


def adjust(logits: Tensor, p: LineParams, counts: Tensor | None, out: Tensor) -> None:
    """out [n, V] float32 from the special lines of logits [L, V]; counts only for penalties."""
    vocab = logits.shape[1]
    _dense_kernel[(len(out), triton.cdiv(vocab, TILE))](
        logits, out, counts, p.lines, p.only_listed, p.repetition, p.presence, p.frequency,
        logits.stride(0), vocab, TILE, counts is not None, num_warps=8,
    )  # fmt: skip


def set_entries(
    logits: Tensor, p: LineParams, counts: Tensor | None, out: Tensor, entries: tuple[Tensor, ...]
) -> None:
    """entries: (index into n, token, bias) [E]; a token of a line has one entry at most."""
    index, token, bias = entries
    tile = 256
    _entries_kernel[(triton.cdiv(len(index), tile),)](
        logits, out, counts, p.lines, p.repetition, p.presence, p.frequency, index, token, bias,
        len(index), logits.stride(0), logits.shape[1], tile, counts is not None, num_warps=2,
    )  # fmt: skip


def forbid_words(
    tokens: Tensor, p: LineParams, out: Tensor, index: Tensor, begin: Tensor, spellings: Tensor
) -> None:
    """Spelling s of line index[s] is spellings[begin[s]:begin[s + 1]]."""
    _bad_words_kernel[(len(index),)](
        out, tokens, p.rows, p.num_tokens, index, begin, spellings, tokens.stride(0), out.shape[1],
        32, num_warps=1,
    )  # fmt: skip
