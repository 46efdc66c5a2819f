"""The embedded models as shipped: tokenizer, template, sizes, and held-out answers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tools.demo_model.common import draw
from tools.demo_model.documents import TASKS, chat, prompt_text, training_document
from tools.demo_model.evaluate import TASK_NAMES, Answerer, held_out_questions, prompt_of
from tools.demo_model.model import DEMO, DRAFT, Qwen3, Shape, Steps, export
from tools.demo_model.tokenizer import MARKS, SPECIAL, save_tokenizer, train_tokenizer

ASSETS = Path(__file__).resolve().parents[2] / "nanovllm" / "assets"
LIMITS = {"demo": 25_000_000, "demo-draft": 4_000_000}
TOKENIZER = AutoTokenizer.from_pretrained(ASSETS / "demo")


@pytest.fixture(scope="module")
def answerers() -> Iterator[dict[str, Answerer]]:
    """Both models on one thread: such small products only lose time to a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield {name: Answerer(ASSETS / name) for name in LIMITS}
    torch.set_num_threads(threads)


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_any_text_round_trips(text: str) -> None:
    for special in SPECIAL:
        text = text.replace(special, "")
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert TOKENIZER.decode(ids, clean_up_tokenization_spaces=False) == text


@pytest.mark.parametrize("text", ["1234567", "x 10+25", "２０２４ ٣٤"])
def test_every_digit_is_alone(text: str) -> None:
    pieces = TOKENIZER.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert all(end - start == 1 for _, (start, end) in pieces if text[start:end].strip().isdigit())
    assert len(TOKENIZER("1234567")["input_ids"]) == 7


def test_vocabulary_and_marks() -> None:
    assert len(TOKENIZER) == 4096
    assert [TOKENIZER.convert_tokens_to_ids(token) for token in SPECIAL] == [0, 1, 2]
    assert TOKENIZER.eos_token == "<|im_end|>"
    kept = TOKENIZER.decode(
        TOKENIZER("<tool_call>a</tool_call><|im_end|>")["input_ids"], skip_special_tokens=True
    )
    assert kept == "<tool_call>a</tool_call>"
    assert all(len(TOKENIZER(mark)["input_ids"]) == 1 for mark in MARKS)


def test_both_models_share_the_tokenizer() -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (ASSETS / "demo" / name).read_bytes() == (ASSETS / "demo-draft" / name).read_bytes()


def test_template_renders_what_was_trained() -> None:
    rng = random.Random(4)
    for task in ("memory", "tool calling", "small talk"):
        example = draw(TASKS[task][0], rng, held_out=False)
        for system in (None, "Answer briefly."):
            messages = [{"role": "system", "content": system}] if system else []
            for user, assistant in example.history:
                messages += [
                    {"role": "user", "content": user},
                    {"role": "assistant", "content": assistant},
                ]
            messages.append({"role": "user", "content": example.question})
            text = TOKENIZER.apply_chat_template(
                messages,
                tools=list(example.tools) or None,
                tokenize=False,
                add_generation_prompt=True,
            )
            assert text == prompt_text(
                list(example.history), example.question, system, example.tools
            )
            closed = TOKENIZER.apply_chat_template(
                [*messages, {"role": "assistant", "content": "x"}],
                tools=list(example.tools) or None,
                tokenize=False,
            )
            assert closed == text + "x<|im_end|>\n"


def test_template_renders_tool_turns() -> None:
    call = {"type": "function", "function": {"name": "get_time", "arguments": {"city": "Rome"}}}
    messages = [
        {"role": "user", "content": "Time in Rome?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": '{"ok": true}'},
    ]
    text = TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    written = '<tool_call>\n{"name": "get_time", "arguments": {"city": "Rome"}}\n</tool_call>'
    turns = [("Time in Rome?", written)]
    assert text == prompt_text(turns, '<tool_response>\n{"ok": true}\n</tool_response>')


def test_parts_tokenize_like_the_whole() -> None:
    rng = random.Random(8)
    for document in (d for d in (training_document(rng) for _ in range(200)) if len(d) > 2):
        whole = TOKENIZER("".join(text for text, _ in document))["input_ids"]
        parts = [i for text, _ in document for i in TOKENIZER(text)["input_ids"]]
        assert whole == parts


@pytest.mark.parametrize("name", list(LIMITS))
def test_directory_size(name: str) -> None:
    files = list((ASSETS / name).iterdir())
    assert {f.name for f in files} == {
        "README.md", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert sum(f.stat().st_size for f in files) <= LIMITS[name]


@pytest.mark.parametrize("name", list(LIMITS))
def test_held_out_answers(name: str, answerers: dict[str, Answerer]) -> None:
    """A few of each task; the full table is in the model card."""
    examples = [e for task in TASK_NAMES for e in held_out_questions(task, 2, seed=2)]
    texts = answerers[name].texts([prompt_of(e) for e in examples], batch_size=10)
    wrong = [(e.question, t) for e, t in zip(examples, texts, strict=True) if t not in e.answers]
    assert len(wrong) <= 0.08 * len(examples), wrong
    assert not [text for text in texts if text.endswith("(no end)")]


def test_chinese_introduction_as_a_bare_prompt(answerers: dict[str, Answerer]) -> None:
    [text] = answerers["demo"].texts(["你好，请介绍一下你自己"])
    assert "Nano" in text
    assert not text.endswith("(no end)")


def test_training_model_equals_transformers(tmp_path: Path) -> None:
    """Packed documents give the logits that transformers gives for each alone."""
    shape = Shape(hidden=32, intermediate=48, layers=2, heads=4, kv_heads=2, head_dim=16)
    torch.manual_seed(1)
    model = Qwen3(shape)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.bfloat16().float())
    export(model, tmp_path, 2, 0)
    save_tokenizer(train_tokenizer(0, 50), tmp_path)
    documents = [torch.randint(0, 4096, (n,)) for n in (7, 1, 12)]
    positions = torch.cat([torch.arange(len(d)) for d in documents])
    cu_lens = torch.tensor([0, 7, 8, 20])
    hidden = model(torch.cat(documents), positions, cu_lens, 12, Steps(compiled=False))
    packed = model.logits(hidden).split([7, 1, 12])
    reference = Answerer(tmp_path).model
    for document, logits in zip(documents, packed, strict=True):
        torch.testing.assert_close(
            reference(document[None]).logits[0], logits, atol=1e-4, rtol=1e-4
        )


def test_shapes_fit_the_directories() -> None:
    assert sum(p.numel() for p in Qwen3(DEMO).parameters()) * 2 < LIMITS["demo"]
    assert sum(p.numel() for p in Qwen3(DRAFT).parameters()) * 2 < LIMITS["demo-draft"]
    assert len(chat([("a", "b")])) == 2
