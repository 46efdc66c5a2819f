"""The tokenizer: byte-level BPE with every digit alone, and the chat template, trained and saved.

Method: Sennrich et al. 2016 (byte pair encoding), on bytes as in GPT-2.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from tools.demo_model.documents import TOOLS_AFTER, TOOLS_BEFORE, training_document

VOCAB_SIZE = 4096
MAX_LENGTH = 2048
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL = [END_OF_TEXT, TURN_START, TURN_END]
# Plain text to a reader of the answer, so decoding keeps them.
MARKS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]

# Words with at most one sign or space before them, single digits, runs of signs, white space.
PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"

CHAT_TEMPLATE = (
    "{%- set first = messages[0].content if messages[0].role == 'system' else '' %}\n"
    "{%- if tools %}\n"
    "    {{- '<|im_start|>system\\n' + (first + '\\n\\n' if first else '') }}\n"
    "    {{- " + json.dumps(TOOLS_BEFORE) + " }}\n"
    "    {%- for tool in tools %}\n"
    "        {{- '\\n' + (tool | tojson) }}\n"
    "    {%- endfor %}\n"
    "    {{- " + json.dumps(TOOLS_AFTER) + " + '<|im_end|>\\n' }}\n"
    "{%- elif first %}\n"
    "    {{- '<|im_start|>system\\n' + first + '<|im_end|>\\n' }}\n"
    "{%- endif %}\n"
    "{%- for message in messages %}\n"
    "    {%- if message.role == 'tool' %}\n"
    "        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content }}\n"
    "        {{- '\\n</tool_response><|im_end|>\\n' }}\n"
    "    {%- elif message.role == 'system' and loop.first %}\n"
    "    {%- elif message.role in ['system', 'user', 'assistant'] %}\n"
    "        {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}\n"
    "        {%- for entry in message.tool_calls or [] %}\n"
    "            {%- set call = entry.function or entry %}\n"
    "            {{- '\\n' if message.content or not loop.first }}\n"
    '            {{- \'<tool_call>\\n{"name": "\' + call.name + \'", "arguments": \' }}\n'
    "            {{- call.arguments if call.arguments is string else call.arguments | tojson }}\n"
    "            {{- '}\\n</tool_call>' }}\n"
    "        {%- endfor %}\n"
    "        {{- '<|im_end|>\\n' }}\n"
    "    {%- else %}\n"
    "        {{- raise_exception('unknown role: ' + message.role) }}\n"
    "    {%- endif %}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {{- '<|im_start|>assistant\\n' }}\n"
    "{%- endif %}"
)


def train_tokenizer(seed: int, num_documents: int) -> Tokenizer:
    """Learns the vocabulary on the text of the generator alone."""
    rng = random.Random(f"tokenizer {seed}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(MARKS),
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=15,  # bytes; else whole Chinese answers become one token
        show_progress=False,
    )
    texts = (_plain(training_document(rng)) for _ in range(num_documents))
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in MARKS])
    return tokenizer


def _plain(document: list[tuple[str, bool]]) -> str:
    text = "".join(part for part, _ in document)
    for mark in SPECIAL + MARKS:
        text = text.replace(mark, "\n")
    return text


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json with the chat template."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MAX_LENGTH,
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
