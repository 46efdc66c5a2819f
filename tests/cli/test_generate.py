"""`nanovllm generate`: the answer alone on stdout, from arguments, stdin, and the default."""

from __future__ import annotations

import io
import itertools
import json
import signal
from pathlib import Path
from typing import Any

import pytest

import nanovllm
from nanovllm.cli import generate, session
from nanovllm.errors import ModelLoadError
from nanovllm.server import service

SHORT = ("--max-tokens", "8", "--ignore-eos")


@pytest.fixture(scope="module")
def expected(tiny: Path) -> str:
    """The greedy continuation of "abc" without a template."""
    with nanovllm.LLM(str(tiny)) as llm:
        return llm.generate(
            "abc", max_tokens=8, temperature=0, ignore_eos=True, use_tqdm=False
        ).text


def test_the_answer_is_all_of_stdout(cli: Any, tiny: Path, expected: str) -> None:
    result = cli("generate", "abc", "--raw", "--model", tiny, *SHORT)
    assert result.status == 0
    assert result.out == expected + "\n"
    assert "8 tokens" in result.err
    assert "ended by length" in result.err


def test_quiet_says_nothing_else(cli: Any, tiny: Path) -> None:
    assert cli("generate", "abc", "--model", tiny, "--quiet", *SHORT).err == ""


NOTED = ("generate", "abc", "--raw", "--max-tokens", "2", "--num-kv-blocks", "4")


@pytest.mark.parametrize("quiet", [True, False])
def test_a_note_of_the_engine_is_shown_once(cli: Any, tiny: Path, quiet: bool) -> None:
    flags = ("--quiet",) if quiet else ()
    for _ in range(2):  # a second run in one process shows it no oftener
        result = cli(*NOTED, "--block-size", "16", "--model", tiny, *flags)
        notes = [line for line in result.err.splitlines() if "max_model_len is 64" in line]
        assert [line.startswith("nanovllm: warning: ") for line in notes] == [True] * (not quiet)


def test_the_chat_template_and_the_system_message_are_used(cli: Any, tiny: Path) -> None:
    arguments = ("generate", "abc", "--system", "be", "--json", "--model", tiny, *SHORT)
    ids = json.loads(cli(*arguments).out)["prompt_token_ids"]
    with nanovllm.LLM(str(tiny)) as llm:
        messages = [{"role": "system", "content": "be"}, {"role": "user", "content": "abc"}]
        assert ids == llm.render_chat(messages)


def test_json_holds_everything(cli: Any, tiny: Path, expected: str) -> None:
    arguments = ("generate", "abc", "--raw", "--json", "--logprobs", "1")
    answer = json.loads(cli(*arguments, "--model", tiny, *SHORT).out)
    assert [c["text"] for c in answer["completions"]] == [expected]
    assert answer["completions"][0]["finish_reason"] == "length"
    assert len(answer["completions"][0]["logprobs"]) == 8
    assert answer["metrics"]["num_prompt_tokens"] == len(answer["prompt_token_ids"]) == 3


def test_several_completions_are_paragraphs(cli: Any, tiny: Path, expected: str) -> None:
    result = cli("generate", "abc", "--raw", "--n", "2", "--model", tiny, *SHORT)
    assert result.out == f"{expected}\n\n{expected}\n"


def test_a_seed_fixes_the_answer(cli: Any, tiny: Path) -> None:
    line = ("generate", "abc", "--model", tiny, "--temperature", "2", *SHORT)
    texts = [cli(*line, "--seed", seed).out for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("flags", [(), ("--raw",)])
def test_invalid_utf8_is_one_line(
    cli: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
) -> None:
    prompt = io.BytesIO(b"What is \xff\xfe 2+2?")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(prompt, encoding="utf-8"))
    result = cli("generate", "-", "--model", tiny, *SHORT, *flags)
    assert (result.status, result.out) == (2, "")
    assert "not valid Unicode: '\\udcff' after " in result.err
    assert "What is ' is half of" in result.err
    assert "--raw" not in result.err  # it would not help
    assert len(result.err.splitlines()) == 1


def test_stdin_is_the_prompt(
    cli: Any, tiny: Path, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("abc\n"))
    result = cli("generate", "-", "--raw", "--model", tiny, *SHORT)
    assert result.out == expected + "\n"


@pytest.mark.parametrize("given", ["", "\n"])
def test_an_empty_stdin_that_was_asked_for_is_refused(
    cli: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(given))
    result = cli("generate", "-", "--model", tiny, *SHORT)
    assert (result.status, result.out) == (2, "")
    assert "stdin is empty" in result.err


def test_a_redirected_file_is_the_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prompt").write_text("from a file\n")
    with (tmp_path / "prompt").open() as file:
        monkeypatch.setattr("sys.stdin", file)
        assert generate._prompt(None) == ("from a file", False)
        assert generate._prompt("said") == ("said", False)


def test_without_a_prompt_there_is_a_question(cli: Any, tiny: Path) -> None:
    result = cli("generate", "--model", tiny, *SHORT)
    assert result.status == 0
    assert f"> {generate.DEFAULT_QUESTION}" in result.err


def test_a_prompt_that_is_too_long_is_one_line(cli: Any, tiny: Path) -> None:
    result = cli("generate", "x" * 300, "--raw", "--model", tiny)
    assert result.status == 2
    assert result.out == ""
    assert "300" in result.err
    assert "256" in result.err


def test_a_failed_step_is_an_error(cli: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object, plan: object) -> None:
        raise RuntimeError("a wire came loose")

    monkeypatch.setattr("nanovllm.runner.model_runner.ModelRunner.execute", fail)
    result = cli("generate", "abc", "--model", tiny, "--quiet")
    assert result.status == 2
    assert "a wire came loose" in result.err


def test_ctrl_c_ends_the_answer_and_keeps_what_there_is(
    cli: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = nanovllm.LLM.step
    count = itertools.count()

    def interrupted(self: nanovllm.LLM) -> Any:
        if next(count) == 20:
            signal.raise_signal(signal.SIGINT)
        return step(self)

    monkeypatch.setattr(nanovllm.LLM, "step", interrupted)
    result = cli("generate", "abc", "--model", tiny, "--ignore-eos")
    assert result.status == 130
    assert len(result.out) > 1
    assert "ended by abort" in result.err


DEFAULTS: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ({}, {}, {"temperature": 0.0}),
    ({"temperature": 0.7, "top_k": 20}, {}, {"temperature": 0.0}),
    ({"do_sample": True, "top_k": 20}, {}, {"temperature": 1.0, "top_k": 20}),
    ({"do_sample": True, "temperature": 0.6}, {"top_p": 0.5}, {"temperature": 0.6, "top_p": 0.5}),
    ({"do_sample": True, "temperature": 0.6}, {"temperature": 0.0}, {"temperature": 0.0}),
    ({}, {"top_p": 0.5}, {"temperature": 1.0, "top_p": 0.5}),
]


@pytest.mark.parametrize(("generation", "wanted", "result"), DEFAULTS)
def test_default_sampling(
    generation: dict[str, Any], wanted: dict[str, Any], result: dict[str, Any]
) -> None:
    assert session.sampling_defaults(generation, wanted) == {"max_tokens": None} | result


def test_recommended_sampling_that_is_wrong_is_named() -> None:
    wrong = {"do_sample": True, "temperature": "hot"}
    with pytest.raises(ModelLoadError, match=r"generation_config\.json: temperature .*got 'hot'"):
        session.sampling_defaults(wrong, {})
    with pytest.raises(ModelLoadError, match=r"generation_config\.json: temperature .*got 'hot'"):
        service._sampling_defaults(wrong)
