"""Two tokenizers, as the two kinds that models have, and texts that are hard for them."""

from __future__ import annotations

from functools import cache

import hypothesis.strategies as st
from tiny_models import CORPUS, SPECIAL_TOKENS, byte_level_tokenizer
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, normalizers, trainers

from nanovllm.text.tokenizer import Tokenizer

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
# What a decoder of bytes must not break: several code points that are one sign, and long ones.
SIGNS = [
    *("a", " ", "\n", "  ", "é", "e\u0301", "ñ", "n\u0303", "ß", "İ"),
    *("你", "好", "，", "。", "龘", "𠮷", "ｱ", "が", "か\u3099", "안", "녕", "ก็", "नि"),
    *("👋", "👋🏽", "👨‍👩‍👧‍👦", "🏳️‍🌈", "🇨🇳", "☃️", "\u200b", "\u00a0", "\ufffd", "\u202e", "س"),
    *("<|end|>", "<0xE4>", "▁", "Ġ"),
]
TEXTS = st.one_of(
    st.text(max_size=30),
    st.lists(st.sampled_from(SIGNS), max_size=20).map("".join),
    st.sampled_from(CORPUS).flatmap(lambda text: st.integers(0, len(text)).map(lambda n: text[n:])),
)


@cache
def byte_level() -> Tokenizer:
    """GPT-2's kind: every token is a sequence of bytes."""
    return Tokenizer(byte_level_tokenizer(500), {})


@cache
def byte_fallback() -> Tokenizer:
    """SentencePiece's kind: spaces are marked, unknown characters go byte by byte."""
    fast = FastTokenizer(models.BPE(unk_token="<|unk|>", fuse_unk=True, byte_fallback=True))
    fast.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    fast.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=[*SPECIAL_TOKENS, *BYTES],
        limit_alphabet=60,
        show_progress=False,
    )
    words = [word + " " for text in CORPUS for word in text.split()]
    fast.train_from_iterator(words * 4, trainer)
    # The byte tokens are plain tokens of the model, not special ones that decoding skips.
    state = fast.to_str().replace('"special":true', '"special":false')
    keep = FastTokenizer.from_str(state)
    keep.add_special_tokens(SPECIAL_TOKENS)
    return Tokenizer(keep, {})


def writes_bytes(text: str) -> bool:
    """Texts that spell byte tokens are left out for the second kind.

    Its decoder turns a whole run of bytes into replacement characters when they are not UTF-8,
    the complete characters before them too; a stream has shown those already and keeps them.
    """
    return "<0x" in text


KINDS = {"byte level": byte_level, "byte fallback": byte_fallback}
