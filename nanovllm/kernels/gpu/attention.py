"""Paged attention in Triton: one kernel for rows of one query, one for longer rows.

Both read the cache of one layer, [B, 2, G, P, D] contiguous, and leave slots outside a context
unread or masked before use. A batch that mixes both kinds of rows runs both kernels: each skips
the other's rows.
"""

from nanovllm.kernels.gpu.decode_attention import (
    MAX_SPLIT_PROGRAMS,
    DecodeWorkspace,
    FusedInputs,
    decode,
    num_splits,
)
from nanovllm.kernels.gpu.paged import LOG2_E, precision, store_kv
from nanovllm.kernels.gpu.prefill_attention import prefill

__all__ = [
    "LOG2_E",
    "MAX_SPLIT_PROGRAMS",
    "DecodeWorkspace",
    "FusedInputs",
    "decode",
    "num_splits",
    "precision",
    "prefill",
    "store_kv",
]
