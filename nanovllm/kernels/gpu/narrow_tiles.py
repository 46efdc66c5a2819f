"""Attention of a row of one query over cached keys of 8-bit floats, part of `decode_kernel`.

Bytes cost half of what 16-bit keys cost, so widening them must cost next to nothing:

- to float16, which holds every 8-bit float, by one instruction for two (bfloat16 would take three);
- everything is transposed, so that keys and values are the left operands of the products: the
  heads then need 8 columns instead of 16 rows;
- a matrix instruction wants two keys of one dimension side by side, and a byte transpose on the
  way from shared memory does not exist. Values are therefore read as words of two dimensions,
  which `ldmatrix` can transpose, and even and odd dimensions become two products.

Shape legend: G KV heads, R query heads of one of them, D head dim, P slots a block.
"""

# mypy: disable-error-code="no-untyped-def, attr-defined, misc"
from __future__ import annotations

import triton
import triton.language as tl

from nanovllm.kernels.gpu.paged import as_float16, tile_offsets


@triton.jit
def _even_odd(words, KIND: tl.constexpr, PTX: tl.constexpr):
    """The low and the high bytes of words, floats of type KIND, as two tensors in float16.

    With PTX a register of two words (two keys) takes three instructions. What the other branch,
    which says the same, is compiled to takes nine.
    """
    if PTX and tl.float8e4nv == KIND:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 bytes;
            .reg .b16 low, high;
            prmt.b32 bytes, $2, 0, 0x3120;
            mov.b32 {low, high}, bytes;
            cvt.rn.f16x2.e4m3x2 $0, low;
            cvt.rn.f16x2.e4m3x2 $1, high;
            }""",
            "=r,=r,r",
            [words],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        even = words.to(tl.int8).to(KIND, bitcast=True).to(tl.float16)
        odd = (words >> 8).to(tl.int8).to(KIND, bitcast=True).to(tl.float16)
        return even, odd


@triton.jit
def narrow_tiles(
    q, acc, total, top, cache_ptr, table_ptr, group, first, start, stop, scale,
    G: tl.constexpr, R_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, P: tl.constexpr,
    BLOCK_N: tl.constexpr, WINDOW: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Online softmax (Milakov and Gimelshein 2018) over the cached keys [start, stop)."""
    PAIRS: tl.constexpr = D_PAD // 2
    d = tl.arange(0, D_PAD)
    pair = tl.arange(0, PAIRS)
    offs_n = tl.arange(0, BLOCK_N)
    q, scale = as_float16(q, scale)
    q, scale = q.T, scale.T
    even, odd = tl.split(acc.T.reshape(PAIRS, 2, R_PAD).permute(0, 2, 1))
    words_ptr = cache_ptr.to(tl.pointer_type(tl.int16), bitcast=True) + G * P * D // 2
    for n in range(start, stop, BLOCK_N):
        inside = n + offs_n < stop
        if WINDOW:
            inside &= n + offs_n >= first
        offset = tile_offsets(table_ptr, n, stop, offs_n, group, P, G, D, BLOCK_N)
        key_mask = inside[:, None]
        word_mask = inside[None, :]
        if D != D_PAD:
            key_mask = key_mask & (d < D)[None, :]
            word_mask = word_mask & (pair < D // 2)[:, None]
        keys = tl.load(cache_ptr + offset[:, None] + d[None, :], mask=key_mask, other=0.0)
        scores = tl.dot(keys.to(tl.float16), q) * scale
        scores = tl.where(inside[:, None], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 0))
        weights = tl.exp2(scores - new_top[None, :])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 0)
        words = tl.load(words_ptr + offset[None, :] // 2 + pair[:, None], mask=word_mask, other=0)
        even_values, odd_values = _even_odd(words, cache_ptr.dtype.element_ty, PTX)
        weights = weights.to(tl.float16)
        even = tl.dot(even_values, weights, even * shrink[None, :])
        odd = tl.dot(odd_values, weights, odd * shrink[None, :])
        top = new_top
    acc = tl.join(even, odd).permute(0, 2, 1).reshape(D_PAD, R_PAD).T
    return acc, total, top
