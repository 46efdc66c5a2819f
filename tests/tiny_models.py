"""Small random models of every family, made by transformers on the spot, and a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SMALL = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": 3,
    "bos_token_id": 1,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3-untied-bias": ("Qwen3", {"head_dim": 16, "attention_bias": True}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
    ),
    "qwen2-yarn": ("Qwen2", {"rope_parameters": YARN | {"rope_theta": 10000.0}}),
    "llama": ("Llama", {}),
    "llama-mha-bias": (
        "Llama",
        {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True},
    ),
    "llama-linear": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
    ),
    "llama3": ("Llama", {"rope_parameters": LLAMA3 | {"rope_theta": 500000.0}}),
    "mistral": ("Mistral", {"sliding_window": 16, "head_dim": 24}),
}


def make_model(directory: Path, family: str, **overrides: Any) -> Path:
    """Writes a random model of a family, spread so that its logits differ clearly."""
    kind, fields = FAMILIES[family]
    config = getattr(transformers, f"{kind}Config")(**(SMALL | fields | overrides))
    torch.manual_seed(7)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.copy_(torch.randn_like(weight) * 0.1 + (0.0 if "bias" in name else 1.0))
            else:
                weight.copy_(torch.randn_like(weight) * 0.12)
    model.save_pretrained(directory)
    return directory


def edit_json(path: Path, **fields: Any) -> None:
    """Changes fields of a JSON object in place."""
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


SPECIAL_TOKENS = ["<|pad|>", "<|start|>", "<|unk|>", "<|end|>"]  # ids 0 to 3; 3 ends a text
CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "你好，世界！请介绍一下你自己。今天天气很好，我们去公园散步吧。",
    "Ça va très bien, merci; naïve café résumé — „Grüße“ aus München.",
    "👋🏽 hello 👨‍👩‍👧‍👦 family 🏳️‍🌈 flags 🇨🇳🇺🇸, e\u0301 and n\u0303 combine.",
    "مرحبا بالعالم שלום עולם नमस्ते दुनिया 안녕하세요 こんにちは",
    'def f(x):\n\treturn {"key": [1, 2, 3]}  # comment\n' * 2,
]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def byte_level_tokenizer(vocab_size: int) -> Tokenizer:
    """Byte-level BPE: every text has an encoding, every sequence of ids some bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    return tokenizer


def make_text_model(directory: Path, **overrides: Any) -> Path:
    """A Qwen3 with tokenizer and chat template. Its answers are noise: all kinds of bytes."""
    make_model(directory, "qwen3", **({"vocab_size": 384} | overrides))
    byte_level_tokenizer(384).save(str(directory / "tokenizer.json"))
    config = {"eos_token": "<|end|>", "chat_template": CHAT_TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory
