"""The forward pass of `batch_invariant`: the same bits for a token, whatever is computed with it.

Every kernel here computes a row by itself and adds up in a fixed order, so single tokens, chunks
and padded graphs agree bit for bit. Slower than `GpuForward`, which is its specification up to
rounding.

Shape legend: T tokens, S sequences, H query heads, D head dim.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.attention.base import AttentionBatch
from nanovllm.kernels.gpu import fixed_attention, rowwise
from nanovllm.kernels.gpu.fixed_linear import linear
from nanovllm.models.decoder import Decoder
from nanovllm.runner.gpu_forward import GpuForward, _Layer


class InvariantForward(GpuForward):
    """One loaded decoder; max_context_len is the engine's, and fixes how keys are cut."""

    def __init__(self, model: Decoder, max_context_len: int, *, pdl: bool) -> None:
        super().__init__(model, model.attention, pdl=pdl)  # type: ignore[arg-type]
        c = self.config
        self._chunk = fixed_attention.chunk_of(max_context_len)
        self._num_chunks = -(-max_context_len // self._chunk)
        self._fixed_workspace = fixed_attention.FixedWorkspace(
            c.num_heads, c.num_kv_heads, c.head_dim, self._cos_sin.device
        )

    def hidden(self, token_ids: Tensor, batch: AttentionBatch, kv_cache: Tensor) -> Tensor:
        """[T] token ids -> [T, hidden] before the final norm; kv_cache is read and written."""
        if not len(batch.slot_mapping):
            batch = with_slots(batch, kv_cache.shape[4])
        residual = F.embedding(token_ids, self._embed)
        for index, layer in enumerate(self._layers):
            window = self.config.sliding_windows[index]
            self._fixed_layer(layer, residual, batch, kv_cache[index], window)
        return residual

    def logits(self, residual: Tensor) -> Tensor:
        """[S, hidden] before the final norm -> [S, vocabulary] in the model's dtype."""
        return linear(self.final_norm(residual), self._lm_head)

    def next_logits(self, token_ids: Tensor, batch: AttentionBatch, kv_cache: Tensor) -> Tensor:
        return self.logits(self.hidden(token_ids, batch, kv_cache))

    def _fixed_layer(
        self,
        layer: _Layer,
        residual: Tensor,
        batch: AttentionBatch,
        kv_cache: Tensor,
        window: int | None,
    ) -> None:
        """One block; residual [T, hidden] is changed in place."""
        eps = self.config.rms_norm_eps
        normed = rowwise.rms_norm(residual, layer.input_norm, eps)
        qkv = linear(normed, layer.qkv, bias=layer.qkv_bias)
        attended = self._attend_fixed(layer, qkv, batch, kv_cache, window)
        linear(attended, layer.o, bias=layer.o_bias, residual=residual, out=residual)
        normed = rowwise.rms_norm(residual, layer.post_norm, eps)
        active = rowwise.silu_mul(linear(normed, layer.gate_up, bias=layer.gate_up_bias))
        linear(active, layer.down, bias=layer.down_bias, residual=residual, out=residual)

    def _attend_fixed(
        self,
        layer: _Layer,
        qkv: Tensor,
        batch: AttentionBatch,
        kv_cache: Tensor,
        window: int | None,
    ) -> Tensor:
        c = self.config
        q = self._rotate_and_store(layer, qkv, batch, kv_cache)
        out = torch.empty((len(q), c.num_heads, c.head_dim), dtype=q.dtype, device=q.device)
        fixed_attention.attend(
            q, kv_cache, batch.cu_q_lens, batch.context_lens, batch.block_tables,
            c.head_dim**-0.5, window, self._fixed_workspace, out, single=batch.max_q_len == 1,
            chunk=self._chunk, num_chunks=self._num_chunks,
        )  # fmt: skip
        return out.view(len(q), -1)


def with_slots(batch: AttentionBatch, block_size: int) -> AttentionBatch:
    """A batch of single tokens with the positions and slots that the fused kernels do not need.

    On the device, so that a captured graph computes them anew; -1 for padding rows.
    """
    context = batch.context_lens.long()
    positions = (context - 1).clamp(min=0)
    blocks = batch.block_tables.gather(1, (positions // block_size).unsqueeze(1)).squeeze(1)
    slots = blocks.long() * block_size + positions % block_size
    return replace(batch, positions=positions, slot_mapping=torch.where(context > 0, slots, -1))
