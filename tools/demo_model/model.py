"""The Qwen3 architecture for training on packed documents, named as transformers names it.

One flat row of tokens holds many documents; `cu_lens` separates them. Knows nothing of the data.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int = 64
    vocab: int = 4096
    max_positions: int = 2048
    theta: float = 10000.0
    eps: float = 1e-6


DEMO = Shape(hidden=320, intermediate=768, layers=8, heads=8, kv_heads=2)
DRAFT = Shape(hidden=128, intermediate=384, layers=4, heads=4, kv_heads=2)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, H, D]; cos, sin [T, 1, D / 2]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def before_attention(
    x: Tensor, norm: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, q_norm: Tensor, k_norm: Tensor,
    cos: Tensor, sin: Tensor, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Residual stream [T, hidden] to q, k, v [T, heads, D]; k and v repeated for every head."""
    dim = q_norm.shape[0]
    h = _norm(x, norm, 1e-6).to(dtype)
    q = F.linear(h, wq.to(dtype)).unflatten(-1, (-1, dim))
    k = F.linear(h, wk.to(dtype)).unflatten(-1, (-1, dim))
    v = F.linear(h, wv.to(dtype)).unflatten(-1, (-1, dim))
    q = _rotate(_norm(q, q_norm, 1e-6), cos, sin).to(dtype)
    k = _rotate(_norm(k, k_norm, 1e-6), cos, sin).to(dtype)
    groups = q.shape[1] // k.shape[1]
    return q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)


def after_attention(
    x: Tensor, attended: Tensor, wo: Tensor, norm: Tensor, gate: Tensor, up: Tensor, down: Tensor
) -> Tensor:
    """Adds attention [T, H, D] and the feed-forward network to the residual stream."""
    dtype = attended.dtype
    x = x + F.linear(attended.flatten(1), wo.to(dtype))
    h = _norm(x, norm, 1e-6).to(dtype)
    inner = F.silu(F.linear(h, gate.to(dtype))) * F.linear(h, up.to(dtype))
    return x + F.linear(inner, down.to(dtype))


def attention(q: Tensor, k: Tensor, v: Tensor, cu_lens: Tensor, max_len: int) -> Tensor:
    """Causal attention inside each document; q, k, v [T, H, D]."""
    if q.is_cuda:
        return torch.ops.aten._flash_attention_forward(
            q, k, v, cu_lens, cu_lens, max_len, max_len, 0.0, True, False
        )[0]
    outputs = []
    for start, end in zip(cu_lens[:-1].tolist(), cu_lens[1:].tolist(), strict=True):
        part = (t[start:end].transpose(0, 1) for t in (q, k, v))
        outputs.append(F.scaled_dot_product_attention(*part, is_causal=True).transpose(0, 1))
    return torch.cat(outputs)


class Norm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))


class Attention(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.q_proj = nn.Linear(s.hidden, s.heads * s.head_dim, bias=False)
        self.k_proj = nn.Linear(s.hidden, s.kv_heads * s.head_dim, bias=False)
        self.v_proj = nn.Linear(s.hidden, s.kv_heads * s.head_dim, bias=False)
        self.o_proj = nn.Linear(s.heads * s.head_dim, s.hidden, bias=False)
        self.q_norm, self.k_norm = Norm(s.head_dim), Norm(s.head_dim)


class Mlp(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(s.hidden, s.intermediate, bias=False)
        self.up_proj = nn.Linear(s.hidden, s.intermediate, bias=False)
        self.down_proj = nn.Linear(s.intermediate, s.hidden, bias=False)


class Layer(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(s), Mlp(s)
        self.input_layernorm, self.post_attention_layernorm = Norm(s.hidden), Norm(s.hidden)


class Steps:
    """The two compiled halves of a layer; attention between them is a library call."""

    def __init__(self, compiled: bool) -> None:
        self.before, self.after = before_attention, after_attention
        if compiled:
            self.before = torch.compile(before_attention, dynamic=False)
            self.after = torch.compile(after_attention, dynamic=False)


class Qwen3(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = Norm(shape.hidden)
        half = torch.arange(0, shape.head_dim, 2) / shape.head_dim
        angles = torch.outer(torch.arange(shape.max_positions).float(), shape.theta**-half)
        self.register_buffer("cos", angles.cos()[:, None], persistent=False)
        self.register_buffer("sin", angles.sin()[:, None], persistent=False)
        self._initialize()

    def _initialize(self) -> None:
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                scale = 0.5 / self.shape.layers**0.5 if "o_proj" in name or "down" in name else 1.0
                std = 0.05 if "embed" in name else weight.shape[1] ** -0.5
                nn.init.normal_(weight, std=std * scale)

    def forward(
        self, ids: Tensor, positions: Tensor, cu_lens: Tensor, max_len: int, steps: Steps
    ) -> Tensor:
        """Normed hidden states [T, hidden] of packed documents, ids and positions [T]."""
        dtype = torch.bfloat16 if ids.is_cuda else torch.float32
        cos, sin = self.cos[positions], self.sin[positions]
        x = self.embed_tokens(ids)
        for layer in self.layers:
            a, m = layer.self_attn, layer.mlp
            q, k, v = steps.before(
                x, layer.input_layernorm.weight, a.q_proj.weight, a.k_proj.weight,
                a.v_proj.weight, a.q_norm.weight, a.k_norm.weight, cos, sin, dtype,
            )  # fmt: skip
            x = steps.after(
                x, attention(q, k, v, cu_lens, max_len), a.o_proj.weight,
                layer.post_attention_layernorm.weight, m.gate_proj.weight, m.up_proj.weight,
                m.down_proj.weight,
            )  # fmt: skip
        return _norm(x, self.norm.weight, self.shape.eps).to(dtype)

    def load(self, directory: Path) -> None:
        """Takes the weights of an exported directory. Raises if names or shapes differ."""
        stored = load_file(directory / "model.safetensors")
        self.load_state_dict({k.removeprefix("model."): v.float() for k, v in stored.items()})

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 logits [n, vocab]; the output layer shares the embedding's weight."""
        return F.linear(hidden, self.embed_tokens.weight.to(hidden.dtype)).float()


def num_parameters(model: nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())


def export(model: Qwen3, directory: Path, turn_end: int, pad: int) -> None:
    """Writes config.json, generation_config.json and model.safetensors (bfloat16)."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = {
        f"model.{name}": weight.detach().to("cpu", torch.bfloat16).contiguous()
        for name, weight in model.named_parameters()
    }
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    s = model.shape
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": s.hidden,
        "intermediate_size": s.intermediate,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads,
        "head_dim": s.head_dim,
        "vocab_size": s.vocab,
        "max_position_embeddings": s.max_positions,
        "rope_theta": s.theta,
        "rms_norm_eps": s.eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "eos_token_id": turn_end,
        "pad_token_id": pad,
    }
    generation = {"eos_token_id": turn_end, "pad_token_id": pad, "do_sample": False}
    for name, value in (("config.json", config), ("generation_config.json", generation)):
        (directory / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
