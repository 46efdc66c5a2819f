"""`nanovllm chat`: commands, context overflow, files, and a real terminal."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pexpect
import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.cli import terminal, turns
from nanovllm.cli.conversation import ChatError, Conversation
from nanovllm.cli.session import answer
from nanovllm.cli.turns import history_file

SHORT = ("--max-tokens", "8", "--ignore-eos")


@pytest.fixture
def talk(cli: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """talk("line", ...) is the result of a chat with these lines of input."""

    def run(*lines: str, flags: tuple[str, ...] = SHORT) -> Any:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
        return cli("chat", "--model", tiny, *flags)

    return run


def test_answers_on_stdout_and_the_rest_on_stderr(talk: Any) -> None:
    result = talk("hello", "again")
    assert result.status == 0
    assert len(result.out) >= 2
    assert result.err.count("8 tokens") == 2
    assert "context" in result.err
    assert "max_tokens=8 reached" in result.err


def test_several_lines_are_one_message(talk: Any, tmp_path: Path) -> None:
    talk("one \\", "two", '"""', "three", "", 'four"""', f"/save {tmp_path / 'c.json'}")
    messages = json.loads((tmp_path / "c.json").read_text())["messages"]
    assert [m["content"] for m in messages[::2]] == ["one \ntwo", "three\n\nfour"]


def test_commands_answer(talk: Any) -> None:
    result = talk("/help", "/system be brief", "/system", "/set top_p 0.5", "/stats", "/quit", "hi")
    assert result.out == ""  # nothing after /quit
    for words in ("/save FILE", "system: be brief", "top_p = 0.5", "0 answers", "KV cache"):
        assert words in result.err


@pytest.mark.parametrize("name", ["/exit", "/q", "/bye"])
def test_other_chats_words_for_leaving_leave(talk: Any, name: str) -> None:
    result = talk(name, "hi")
    assert result.out == ""
    assert "unknown command" not in result.err


WRONG = {
    "/sytem x": "did you mean /system?",
    "/xyzzy": "/help lists the commands",
    "/set temprature 1": "did you mean temperature?",
    "/set temp 1": "did you mean temperature?",
    "/set top_p 7": "top_p must be a number in (0, 1]",
    "/set top_p": "needs a value",
    "/set n 2": "n stays 1",
    "/set ignore_eos maybe": "true or false",
    "/save": "needs a file name",
    "/save /no/such/directory/x": "No such file",
    "/load /no/such/file": "No such file",
}


def test_wrong_commands_are_answered_and_change_nothing(talk: Any) -> None:
    result = talk(*WRONG, "hello")
    assert [words for words in WRONG.values() if words not in result.err] == []
    assert result.status == 0
    assert "8 tokens" in result.err


def test_a_value_keeps_its_spaces_and_equals_signs(talk: Any, tmp_path: Path) -> None:
    lines = (
        "/set logit_bias 50=-100,31=5",
        "/set stop a=b c",
        "/set top-p = 0.5",
        "/set min_p=0.1",
    )
    talk(*lines, f"/save {tmp_path / 'c'}")
    sampling = json.loads((tmp_path / "c").read_text())["sampling"]
    assert sampling["logit_bias"] == {"50": -100, "31": 5}
    assert sampling["stop"] == ["a=b c"]
    assert (sampling["top_p"], sampling["min_p"]) == (0.5, 0.1)


def test_a_saved_chat_goes_on(talk: Any, tmp_path: Path) -> None:
    file = str(tmp_path / "chat.json")
    talk("/system be", "/set temperature 0.5", "hello", f"/save {file}")
    result = talk(f"/save {file}2", flags=("--load", file))
    assert result.status == 0
    before, after = (json.loads(Path(name).read_text()) for name in (file, file + "2"))
    assert before == after
    assert before["sampling"]["temperature"] == 0.5
    assert [m["role"] for m in before["messages"]] == ["user", "assistant"]


def test_save_writes_through_what_is_no_regular_file(tmp_path: Path) -> None:
    saved = Conversation({}, "system")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    saved.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "target").read_text())["system"] == "system"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    saved.save(tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()
    assert json.loads(os.read(reader, 10000))["system"] == "system"
    os.close(reader)
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left.*/full'"):
        saved.save(tmp_path / "full")
    assert Path("/dev/full").is_char_device()


def test_a_failed_save_names_the_path_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = Conversation({}, "system")
    file = tmp_path / "chat.json"
    file.write_text("before")

    def fail(*paths: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match=r"cross-device.*chat\.json'$"):
        saved.save(file)
    with pytest.raises(ChatError, match="not valid Unicode"):
        Conversation({}, "lone \udcff").save(file)
    assert [path.name for path in tmp_path.iterdir()] == ["chat.json"]
    assert file.read_text() == "before"
    with pytest.raises(OSError, match=r"No such file.*/none/chat\.json'$"):
        saved.save(tmp_path / "none" / "chat.json")


NO_CHATS: list[dict[str, Any]] = [
    {"messages": [], "sampling": {"top_p": 3}},
    {"messages": [], "sampling": {"n": 2}},
    {"messages": [], "sampling": {"logit_bias": [1]}},
    {"messages": [], "sampling": {"logit_bias": {"1": "x"}}},
    {"messages": [], "sampling": {}, "system": 5},
    {"messages": [{"role": "user", "content": 5}], "sampling": {}},
]


def test_a_file_that_is_no_chat_is_refused(talk: Any, tmp_path: Path) -> None:
    for text in ("", "[]", '{"messages": [1]}', *map(json.dumps, NO_CHATS)):
        (tmp_path / "bad").write_text(text)
        result = talk(f"/load {tmp_path / 'bad'}")
        assert "holds no saved chat" in result.err, text
        assert result.status == 0
    assert talk("hi", flags=("--load", str(tmp_path / "bad"))).status == 1


def test_invalid_utf8_is_refused_and_the_chat_goes_on(
    cli: Any, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = b"What is \xff\xfe 2+2?\nhello\n/save %s\n" % os.fsencode(tmp_path / "c")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
    result = cli("chat", "--model", tiny, *SHORT)
    assert result.status == 0
    assert "not valid Unicode" in result.err
    assert result.err.count("8 tokens") == 1
    messages = json.loads((tmp_path / "c").read_text())["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant"]
    assert messages[0]["content"] == "hello"


def test_clear_forgets(talk: Any, tmp_path: Path) -> None:
    talk("hello", "/clear", f"/save {tmp_path / 'c'}")
    assert json.loads((tmp_path / "c").read_text())["messages"] == []


def test_a_full_context_drops_the_oldest_turns(talk: Any) -> None:
    result = talk(*["tell me something long " * 2] * 4)
    assert "oldest messages forgotten" in result.err
    assert result.err.count("8 tokens") == 4


def test_a_message_longer_than_the_context_is_refused(talk: Any) -> None:
    result = talk("x" * 300, "short")
    assert "does not fit" in result.err
    assert "256" in result.err
    assert result.err.count("8 tokens") == 1


@pytest.mark.parametrize("num_messages", [1, 3, 5, 9])
def test_fit_keeps_the_last_message(num_messages: int) -> None:
    messages = [
        {"role": "assistant" if i % 2 else "user", "content": "x" * 10} for i in range(num_messages)
    ]
    talk = Conversation({"max_tokens": 5}, "system", list(messages))
    tokens, dropped = talk.fit(lambda m: [0] * sum(len(x["content"]) for x in m), 45)
    assert len(tokens) + 5 <= 45
    assert talk.messages == messages[dropped:]
    assert talk.messages[-1] == messages[-1]
    assert talk.messages[0]["role"] == "user"
    assert dropped == max(0, num_messages - 3)


def test_fit_refuses_what_cannot_fit() -> None:
    talk = Conversation({}, None, [{"role": "user", "content": "x"}])
    with pytest.raises(ChatError, match=r"50 tokens.*40"):
        talk.fit(lambda m: [0] * 50, 40)


def test_after_an_interrupt_the_next_question_has_its_own_answer(tiny: Path) -> None:
    """So it is after a reader that failed, too."""
    params = SamplingParams(max_tokens=40, ignore_eos=True, temperature=0)

    interrupts = iter([signal.SIGINT])

    def interrupt(text: str) -> None:
        for number in interrupts:  # once: a second one would raise
            signal.raise_signal(number)

    def gone(text: str) -> None:
        raise BrokenPipeError

    with LLM(str(tiny)) as llm:
        expected = llm.generate("second", params, use_tqdm=False).text
        stopped, interrupted = answer(llm, "first", params, interrupt)
        assert interrupted
        assert stopped.finish_reason == "abort"
        for _ in range(2):
            shown: list[str] = []
            output, interrupted = answer(llm, "second", params, shown.append)
            assert (output.prompt, output.text, interrupted) == ("second", expected, False)
            assert "".join(shown) == expected
            with pytest.raises(BrokenPipeError):
                answer(llm, "third", params, gone)


def test_in_a_terminal(tiny: Path, tmp_path: Path) -> None:
    """Colours, streaming, Ctrl-C on an answer and on a prompt, Ctrl-D, history across runs."""
    env = {k: v for k, v in os.environ.items() if k != "NO_COLOR"}
    env |= {"XDG_STATE_HOME": str(tmp_path), "TERM": "xterm", "PYTHONUNBUFFERED": "1"}
    # The context is long enough that the answer surely runs when Ctrl-C comes.
    model = tmp_path / "long"
    shutil.copytree(tiny, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 60000}))
    arguments = ["-m", "nanovllm.cli.main", "chat", "--model", str(model), "--ignore-eos"]
    arguments += ["--num-kv-blocks", "2000"]
    child = pexpect.spawn(sys.executable, arguments, env=env, timeout=60, encoding="utf-8",
                          codec_errors="replace", dimensions=(40, 120))  # fmt: skip
    child.expect("Ctrl-D leaves")
    child.expect("> ")
    child.sendline("hello there")
    child.expect("hello there\r?\n.*[^\\s\x1b]")
    child.sendintr()
    child.expect("· stopped")
    child.expect("> ")
    child.sendline("/set max_tokens 7")
    child.expect("max_tokens = 7")
    child.sendline("and now")
    child.expect("7 tokens.*max_tokens=7 reached")
    child.expect("> ")
    child.sendintr()
    child.sendline("")  # readline notices an interrupt that comes early with the next key only
    child.expect("Ctrl-D leaves")
    child.sendline("/stats")
    child.expect("2 answers")
    assert "\x1b[2m" in child.before
    child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    history = (tmp_path / "nanovllm" / "chat_history").read_text()
    assert "hello there" in history
    assert "/stats" in history


def test_a_terminal_sees_no_control_characters(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    terminal.write_answer("a\x1b[2J\x0e\x9b\n\tb")
    assert capsys.readouterr().out == "a\x1b[2J\x0e\x9b\n\tb"  # a pipe gets what there is
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    terminal.write_answer("a\x1b[2J\x0e\x9b\n\tb é你")
    assert capsys.readouterr().out == "a\ufffd[2J\ufffd\ufffd\n\tb é你"


@pytest.mark.parametrize(
    ("variables", "coloured"),
    [
        ({}, True),
        ({"NO_COLOR": "1"}, False),
        ({"NO_COLOR": ""}, True),
        ({"TERM": "dumb"}, False),
    ],
)
def test_colours(
    variables: dict[str, str], coloured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert (terminal.styled("x", "1") != "x") is coloured
    monkeypatch.setattr("sys.stderr.isatty", lambda: False)
    assert terminal.styled("x", "1") == "x"


def test_the_prompt_stays_out_of_redirected_answers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\\\ntwo\n"))
    assert turns.read_turn(interactive=True) == "one\ntwo"
    assert tuple(capsys.readouterr()) == ("", "> . ")


def test_an_interrupt_of_an_import_comes_after_it() -> None:
    done = []

    def block() -> None:
        with terminal.InterruptFlag(raise_at_end=True):
            signal.raise_signal(signal.SIGINT)
            done.append("whole")
        done.append("after")

    with pytest.raises(KeyboardInterrupt):
        block()
    assert done == ["whole"]


def test_the_first_interrupt_waits_and_the_second_does_not() -> None:
    with terminal.InterruptFlag() as flag:
        signal.raise_signal(signal.SIGINT)
        assert flag.is_set
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_history_follows_the_xdg_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert history_file() == Path("/state/nanovllm/chat_history")
    monkeypatch.delenv("XDG_STATE_HOME")
    assert history_file().parts[-4:] == (".local", "state", "nanovllm", "chat_history")
