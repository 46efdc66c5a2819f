"""The decoder that all our families share: pre-norm blocks of attention and a gated MLP.

The residual stream is carried beside the block's output, so that each norm is one fused
add-and-normalise. State comes in as arguments: the batch, the KV cache, the operators.

Shape legend: T tokens, H query heads, G KV heads, D head dim, I intermediate size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nanovllm.attention.base import AttentionBackend, AttentionBatch
from nanovllm.layers.linear import FullPrecision, Linear, LinearMethod
from nanovllm.layers.ops import Ops
from nanovllm.layers.rotary_embedding import cos_sin_table
from nanovllm.models.config import DecoderConfig


@dataclass(frozen=True, slots=True)
class Parameter:
    """One stored tensor: the checkpoint's pieces, stacked along their first dimension.

    layer is None outside the blocks; field is the attribute that receives it.
    """

    layer: int | None
    field: str
    pieces: tuple[tuple[str, tuple[int, ...]], ...]  # (name in the checkpoint, shape)

    @property
    def shape(self) -> tuple[int, ...]:
        rows = sum(shape[0] for _, shape in self.pieces)
        return (rows, *self.pieces[0][1][1:])


@dataclass(slots=True)
class Block:
    """Weights of one block; those of linear layers are `Linear`, norms are [hidden] or [D]."""

    tensors: dict[str, Any] = field(default_factory=dict)
    input_norm: Tensor = None  # type: ignore[assignment]
    qkv: Linear = None  # type: ignore[assignment]  # [(H + 2 G) D, hidden]
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    o: Linear = None  # type: ignore[assignment]  # [hidden, H D]
    post_norm: Tensor = None  # type: ignore[assignment]
    gate_up: Linear = None  # type: ignore[assignment]  # [2 I, hidden]: gate rows, then up rows
    down: Linear = None  # type: ignore[assignment]  # [hidden, I]


class Decoder:
    """Embedding, blocks, final norm and LM head of one model on one device."""

    def __init__(
        self,
        config: DecoderConfig,
        ops: Ops,
        attention: AttentionBackend,
        linear: LinearMethod | None = None,
    ) -> None:
        self.config = config
        self.ops = ops
        self.attention = attention
        self.linear = linear or FullPrecision(ops)
        self.blocks = [Block() for _ in range(config.num_layers)]
        self.embed: Any = None  # in the operators' packed form
        self.final_norm: Tensor = None  # type: ignore[assignment]
        self.lm_head: Any = None  # packed; the embedding itself if they are tied
        self.cos_sin: Tensor = None  # type: ignore[assignment]

    # --- weights ----------------------------------------------------------------------------

    def parameters(self) -> Iterator[Parameter]:
        """All parameters in the order in which they are best loaded."""
        c = self.config
        yield Parameter(
            None, "embed", (("model.embed_tokens.weight", (c.vocab_size, c.hidden_size)),)
        )
        for index in range(c.num_layers):
            yield from _block_parameters(c, index)
        yield Parameter(None, "final_norm", (("model.norm.weight", (c.hidden_size,)),))
        if not c.tie_word_embeddings:
            yield Parameter(None, "lm_head", (("lm_head.weight", (c.vocab_size, c.hidden_size)),))

    def set_parameter(self, parameter: Parameter, tensor: Tensor) -> None:
        """Stores a tensor of `parameter.shape`. A bias must come before its weight."""
        if parameter.layer is None:
            packed = parameter.field in ("embed", "lm_head")
            setattr(self, parameter.field, self.ops.pack(tensor) if packed else tensor)
            return
        block = self.blocks[parameter.layer]
        if parameter.field.endswith("_bias"):
            block.tensors[parameter.field] = tensor
        elif parameter.field in ("qkv", "o", "gate_up", "down"):
            bias = block.tensors.pop(f"{parameter.field}_bias", None)
            linear = Linear(self.linear, self.linear.params(tensor, bias))
            setattr(block, parameter.field, linear)
        else:
            setattr(block, parameter.field, tensor)

    def finish_loading(self, device: torch.device, max_model_len: int) -> None:
        """Called once, after every parameter is set."""
        c = self.config
        if c.tie_word_embeddings:
            self.lm_head = self.embed
        self.cos_sin = cos_sin_table(c.rope, c.head_dim, max_model_len).to(device)

    # --- computation ------------------------------------------------------------------------

    def forward(self, token_ids: Tensor, batch: AttentionBatch, kv_cache: Tensor) -> Tensor:
        """[T] token ids -> [T, hidden] after the final norm.

        kv_cache [layers, blocks, 2, G, slots, D] is read and written.
        """
        c, ops = self.config, self.ops
        self.attention.plan(batch)
        residual = ops.embedding(self.embed, token_ids)
        hidden = ops.rms_norm(residual, self.blocks[0].input_norm, c.rms_norm_eps)
        for index, block in enumerate(self.blocks):
            if index:
                hidden = ops.add_rms_norm(hidden, residual, block.input_norm, c.rms_norm_eps)
            hidden = self._attend(index, block, hidden, batch, kv_cache[index])
            hidden = ops.add_rms_norm(hidden, residual, block.post_norm, c.rms_norm_eps)
            hidden = block.down(ops.silu_mul(block.gate_up(hidden)))
        return ops.add_rms_norm(hidden, residual, self.final_norm, c.rms_norm_eps)

    def _attend(
        self, index: int, block: Block, hidden: Tensor, batch: AttentionBatch, kv_cache: Tensor
    ) -> Tensor:
        c, ops = self.config, self.ops
        heads = block.qkv(hidden).view(-1, c.num_heads + 2 * c.num_kv_heads, c.head_dim)
        q, k, v = heads.split((c.num_heads, c.num_kv_heads, c.num_kv_heads), dim=1)
        if block.q_norm is None or block.k_norm is None:
            ops.rope(q, k, self.cos_sin, batch.positions)
        else:
            norms = block.q_norm, block.k_norm, c.rms_norm_eps
            ops.qk_norm_rope(q, k, *norms, self.cos_sin, batch.positions)
        out = self.attention.forward(
            q, k, v, kv_cache, batch, c.head_dim**-0.5, c.sliding_windows[index]
        )
        return block.o(out.reshape(-1, c.num_heads * c.head_dim))

    def logits(self, hidden: Tensor) -> Tensor:
        """[S, hidden] -> [S, vocabulary] float32."""
        return self.ops.linear(hidden, self.lm_head).float()


def _block_parameters(c: DecoderConfig, index: int) -> Iterator[Parameter]:
    """Names as Hugging Face's Llama, Qwen and Mistral checkpoints spell them."""
    prefix = f"model.layers.{index}"
    widths = {"q": c.num_heads * c.head_dim, "k": c.num_kv_heads * c.head_dim}
    widths["v"] = widths["k"]

    def norm(target: str, name: str, size: int) -> Parameter:
        return Parameter(index, target, ((f"{prefix}.{name}.weight", (size,)),))

    def linear(target: str, rows: dict[str, int], columns: int, bias: bool) -> Iterator[Parameter]:
        if bias:
            pieces = tuple((f"{prefix}.{name}.bias", (n,)) for name, n in rows.items())
            yield Parameter(index, f"{target}_bias", pieces)
        pieces_2d = tuple((f"{prefix}.{name}.weight", (n, columns)) for name, n in rows.items())
        yield Parameter(index, target, pieces_2d)

    yield norm("input_norm", "input_layernorm", c.hidden_size)
    qkv = {f"self_attn.{name}_proj": width for name, width in widths.items()}
    yield from linear("qkv", qkv, c.hidden_size, c.qkv_bias)
    if c.qk_norm:
        yield norm("q_norm", "self_attn.q_norm", c.head_dim)
        yield norm("k_norm", "self_attn.k_norm", c.head_dim)
    yield from linear("o", {"self_attn.o_proj": c.hidden_size}, widths["q"], c.o_bias)
    yield norm("post_norm", "post_attention_layernorm", c.hidden_size)
    mlp = {"mlp.gate_proj": c.intermediate_size, "mlp.up_proj": c.intermediate_size}
    yield from linear("gate_up", mlp, c.hidden_size, c.mlp_bias)
    yield from linear("down", {"mlp.down_proj": c.hidden_size}, c.intermediate_size, c.mlp_bias)
