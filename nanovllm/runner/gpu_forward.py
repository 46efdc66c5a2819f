"""A decoder's forward pass on a GPU, with our fused kernels in place of single operators.

Which kernels multiply depends on the rows of a step, as measured: some rows take five launches a
layer, the norms being part of the products (`_few_rows`: kernels.cuda.few or kernels.gpu.linear;
`_some_rows`: kernels.cuda.many), many rows cuBLAS with norms and activation of their own
(`_many_rows`). Single tokens are rotated, stored and attended in one launch, longer rows in two.
The result is that of `Decoder.forward` up to rounding. All lengths are read on the device, so a
batch of single tokens can be captured in a CUDA graph.

Shape legend: T tokens, S sequences, H query heads, G KV heads, D head dim, I intermediate size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from nanovllm.attention.base import AttentionBatch
from nanovllm.attention.triton import TritonAttention
from nanovllm.kernels.cuda import many
from nanovllm.kernels.gpu import attention as attention_kernels
from nanovllm.kernels.gpu import rowwise
from nanovllm.models.decoder import Block, Decoder
from nanovllm.runner.product_choice import ProductChoice


@dataclass(slots=True)
class _Layer:
    """Tensors of one block: weights [N, K] and biases [N] or None."""

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    qk_norms: tuple[Tensor, Tensor] | None
    o: Tensor
    o_bias: Tensor | None
    post_norm: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None

    @classmethod
    def of(cls, block: Block) -> _Layer:
        norms = None
        if block.q_norm is not None and block.k_norm is not None:
            norms = (block.q_norm, block.k_norm)
        qkv, qkv_bias = block.qkv.params
        o, o_bias = block.o.params
        gate_up, gate_up_bias = block.gate_up.params
        down, down_bias = block.down.params
        return cls(
            block.input_norm, qkv, qkv_bias, norms, o, o_bias, block.post_norm,
            gate_up, gate_up_bias, down, down_bias,
        )  # fmt: skip


class GpuForward:
    """One loaded decoder with full-precision weights, and the Triton attention backend.

    pdl: launch each fused kernel before the last one ends (compute capability 9.0).
    """

    def __init__(self, model: Decoder, attention: TritonAttention, *, pdl: bool) -> None:
        self.config = model.config
        self._embed, self._lm_head = model.embed, model.lm_head
        self.dtype = model.embed.dtype
        self._final_norm, self._cos_sin = model.final_norm, model.cos_sin
        self._layers = [_Layer.of(block) for block in model.blocks]
        self._attention = attention
        self._pdl = pdl
        self._choice = ProductChoice.of(model.config, self.dtype, self._embed.device)

    def hidden(self, token_ids: Tensor, batch: AttentionBatch, kv_cache: Tensor) -> Tensor:
        """[T] token ids -> [T, hidden] before the final norm; kv_cache is read and written."""
        rows = len(token_ids)
        if self._choice.some(rows):
            return self._some_rows(token_ids, batch, kv_cache)[0]
        residual = F.embedding(token_ids, self._embed)
        few = batch.max_q_len == 1 and self._choice.few(rows)
        layer_step = self._few_rows if few else self._many_rows
        for index, layer in enumerate(self._layers):
            layer_step(layer, residual, batch, kv_cache[index], self.config.sliding_windows[index])
        return residual

    def logits(self, residual: Tensor) -> Tensor:
        """[S, hidden] before the final norm -> [S, vocabulary] in the model's dtype."""
        product, eps = self._choice.few(len(residual)), self.config.rms_norm_eps
        if product is not None:
            out = residual.new_empty((len(residual), len(self._lm_head)))
            norm = self._final_norm
            return product(residual, self._lm_head, out, norm=norm, eps=eps, pdl=self._pdl)
        return F.linear(self.final_norm(residual), self._lm_head)

    def next_logits(self, token_ids: Tensor, batch: AttentionBatch, kv_cache: Tensor) -> Tensor:
        """[S] single tokens -> logits [S, vocabulary]: `logits` of `hidden`."""
        rows = len(token_ids)
        if not (self._choice.some(rows) and rows <= many.MAX_HEAD_ROWS):
            return self.logits(self.hidden(token_ids, batch, kv_cache))
        _, normed = self._some_rows(token_ids, batch, kv_cache)
        out = normed.scaled.new_empty((rows, len(self._lm_head)))
        return many.product(normed, self._lm_head, out, eps=self.config.rms_norm_eps)

    def final_norm(self, residual: Tensor) -> Tensor:
        return rowwise.rms_norm(residual, self._final_norm, self.config.rms_norm_eps)

    def _few_rows(
        self,
        layer: _Layer,
        residual: Tensor,
        batch: AttentionBatch,
        kv_cache: Tensor,
        window: int | None,
    ) -> None:
        """One block in five launches; residual [S, hidden] is changed in place."""
        c, pdl, rows = self.config, self._pdl, len(residual)
        linear, eps = self._choice.few(rows), c.rms_norm_eps
        assert linear is not None
        qkv = residual.new_empty((rows, len(layer.qkv)))
        linear(
            residual, layer.qkv, qkv, norm=layer.input_norm, eps=eps, bias=layer.qkv_bias, pdl=pdl
        )
        attended = self._attend(layer, qkv, batch, kv_cache, window)
        linear(attended, layer.o, residual, bias=layer.o_bias, residual=residual, pdl=pdl)
        active = residual.new_empty((rows, c.intermediate_size))
        linear(residual, layer.gate_up, active, norm=layer.post_norm, eps=eps, gated=True, pdl=pdl)
        linear(active, layer.down, residual, bias=layer.down_bias, residual=residual, pdl=pdl)

    def _some_rows(
        self, token_ids: Tensor, batch: AttentionBatch, kv_cache: Tensor
    ) -> tuple[Tensor, many.Rows]:
        """All blocks, five launches each: [T, hidden], and the same ready for the LM head."""
        c, eps, rows = self.config, self.config.rms_norm_eps, len(token_ids)
        first = self._layers[0].input_norm
        residual, scaled, squares = rowwise.embed(token_ids, self._embed, first)
        normed = many.Rows(scaled, squares)
        after = [layer.input_norm for layer in self._layers[1:]] + [self._final_norm]
        for index, layer in enumerate(self._layers):
            qkv = residual.new_empty((rows, len(layer.qkv)))
            many.product(normed, layer.qkv, qkv, eps=eps, bias=layer.qkv_bias)
            window = c.sliding_windows[index]
            attended = self._attend(layer, qkv, batch, kv_cache[index], window)
            normed = many.add(residual, attended, layer.o, layer.post_norm, bias=layer.o_bias)
            active = residual.new_empty((rows, c.intermediate_size))
            many.product(normed, layer.gate_up, active, eps=eps, gated=True)
            normed = many.add(residual, active, layer.down, after[index], bias=layer.down_bias)
        return residual, normed

    def _many_rows(
        self,
        layer: _Layer,
        residual: Tensor,
        batch: AttentionBatch,
        kv_cache: Tensor,
        window: int | None,
    ) -> None:
        """One block in eight launches or more; residual [T, hidden] is changed in place."""
        eps, pdl = self.config.rms_norm_eps, self._pdl
        normed = rowwise.rms_norm(residual, layer.input_norm, eps, pdl=pdl)
        qkv = F.linear(normed, layer.qkv, layer.qkv_bias)
        attended = self._attend(layer, qkv, batch, kv_cache, window)
        _add_product(residual, attended, layer.o, layer.o_bias)
        normed = rowwise.rms_norm(residual, layer.post_norm, eps, pdl=pdl)
        active = rowwise.silu_mul(F.linear(normed, layer.gate_up, layer.gate_up_bias), pdl=pdl)
        _add_product(residual, active, layer.down, layer.down_bias)

    def _attend(
        self,
        layer: _Layer,
        qkv: Tensor,
        batch: AttentionBatch,
        kv_cache: Tensor,
        window: int | None,
    ) -> Tensor:
        attend = self._attend_new if batch.max_q_len == 1 else self._attend_chunks
        return attend(layer, qkv, batch, kv_cache, window)

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c = self.config
        heads = qkv.view(len(qkv), -1, c.head_dim)
        q, k, v = heads.split((c.num_heads, c.num_kv_heads, c.num_kv_heads), dim=1)
        return q, k, v

    def _rotate_and_store(
        self, layer: _Layer, qkv: Tensor, batch: AttentionBatch, kv_cache: Tensor
    ) -> Tensor:
        """Norm and rotation in place, new keys and values into the cache; returns q [T, H, D]."""
        q, k, v = self._split(qkv)
        rowwise.rope_store(
            q, k, v, layer.qk_norms, self.config.rms_norm_eps, self._cos_sin, batch.positions,
            kv_cache, batch.slot_mapping,
        )  # fmt: skip
        return q

    def _attend_new(
        self,
        layer: _Layer,
        qkv: Tensor,
        batch: AttentionBatch,
        kv_cache: Tensor,
        window: int | None,
    ) -> Tensor:
        """Norm, rotation, store and attention of single tokens in one launch: [S, H D]."""
        c = self.config
        q, k, v = self._split(qkv)
        new = attention_kernels.FusedInputs(k, v, layer.qk_norms, self._cos_sin, c.rms_norm_eps)
        out = qkv.new_empty((len(qkv), c.num_heads, c.head_dim))
        splits = attention_kernels.num_splits(len(qkv), c.num_kv_heads, batch.max_context_len)
        workspace = self._attention.workspace(c.num_heads, c.head_dim, qkv.device)
        attention_kernels.decode(
            q, kv_cache, batch.cu_q_lens, batch.context_lens, batch.block_tables,
            c.head_dim**-0.5, window, workspace, splits, out, new=new, pdl=self._pdl,
        )  # fmt: skip
        return out.view(len(qkv), -1)

    def _attend_chunks(
        self,
        layer: _Layer,
        qkv: Tensor,
        batch: AttentionBatch,
        kv_cache: Tensor,
        window: int | None,
    ) -> Tensor:
        q = self._rotate_and_store(layer, qkv, batch, kv_cache)
        out = self._attention.attend(q, kv_cache, batch, self.config.head_dim**-0.5, window)
        return out.view(len(qkv), -1)


def _add_product(residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """residual [T, N] += x [T, K] @ weight.T (+ bias)"""
    residual.addmm_(x, weight.t())
    if bias is not None:
        residual += bias
