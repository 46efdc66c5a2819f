"""`nanovllm chat --url`: a live server, servers that fail, and Ctrl-C in a real terminal."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pexpect
import pytest
from scripted_server import answer, delta, event, scripted, stream
from server.live_server import Live

from nanovllm.executor.inline import InlineExecutor

DONE = b"data: [DONE]\n\n"
MODULE = [sys.executable, "-m", "nanovllm.cli.main"]


@pytest.fixture(scope="module")
def live(tiny: Path) -> Iterator[Live]:
    server = Live(tiny, {"served_model_names": ("tiny",), "api_keys": ("right",)})
    yield server
    server.close()


@pytest.fixture
def talk(cli: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """talk(url, "line", ...) is the result of a chat with these lines of input."""

    def run(url: str, *lines: str, flags: tuple[str, ...] = ()) -> Any:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
        return cli("chat", "--url", url, *flags)

    return run


KEY = ("--api-key", "right")
SHORT = (*KEY, "--max-tokens", "8", "--ignore-eos")


def test_the_same_chat_as_with_a_model_here(talk: Any, live: Live, tmp_path: Path) -> None:
    lines = ("/system be", "hello", "again \\", "and", "/stats", f"/save {tmp_path / 'c'}")
    result = talk(live.url, *lines, flags=SHORT)
    assert result.status == 0
    assert result.err.count("8 tokens · ") == 3  # two answers and /stats
    assert "max_tokens=8 reached" in result.err
    assert "/ 256" in result.err
    assert f"server       tiny · {live.url}/v1 · context 256 tokens" in result.err
    saved = json.loads((tmp_path / "c").read_text())
    assert [m["role"] for m in saved["messages"]] == ["user", "assistant"] * 2
    assert saved["messages"][2]["content"] == "again \nand"
    answers = [m["content"] for m in saved["messages"] if m["role"] == "assistant"]
    assert result.out.endswith("".join(text + "\n" for text in answers))
    live.wait_until_idle()


def test_a_full_context_forgets_the_oldest(talk: Any, live: Live, tmp_path: Path) -> None:
    lines = [*["tell me something long " * 2] * 4, f"/save {tmp_path / 'c'}"]
    result = talk(live.url, *lines, flags=SHORT)
    assert "oldest messages forgotten" in result.err
    assert result.err.count("8 tokens") == 4
    assert len(json.loads((tmp_path / "c").read_text())["messages"]) < 8


def test_a_message_that_never_fits_is_told_and_the_chat_goes_on(talk: Any, live: Live) -> None:
    result = talk(live.url, "short", "x" * 300, "short", flags=SHORT)
    assert "maximum context length is 256 tokens" in result.err
    assert result.err.count("8 tokens") == 2


def test_wrong_key_model_and_address(talk: Any, live: Live) -> None:
    wrong = talk(live.url, "hi", flags=("--api-key", "wrong"))
    assert (wrong.status, wrong.out) == (2, "")
    assert "401: The API key is wrong" in wrong.err
    model = talk(live.url, "hi", "/stats", flags=(*KEY, "--model", "gpt"))
    assert model.status == 0
    assert "404: The model 'gpt' does not exist" in model.err
    assert "0 answers" in model.err
    for url in ("http://127.0.0.1:1", "127.0.0.1:8000"):
        assert talk(url).status == 2
        assert talk(url).err.count("\n") == 1


REFUSED = {
    ("--dtype", "float32"): "--dtype is the server's own choice",
    ("--detokenize",): "unknown flag",
    ("--top-p", "7"): "top_p must be",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_flags_that_say_nothing_to_a_server_are_refused(
    talk: Any, live: Live, flags: tuple[str, ...]
) -> None:
    result = talk(live.url, flags=flags)
    assert result.status == 2
    assert REFUSED[flags] in result.err


def test_a_key_without_a_server_is_refused(cli: Any) -> None:
    assert "give its --url" in cli("chat", "--api-key", "x").err


def test_every_failure_is_one_line_and_the_chat_goes_on(talk: Any) -> None:
    good = stream(delta("fi"), delta("ne"), DONE)
    answers = [
        answer({"error": {"message": "slow down", "code": "rate"}}, 429, Retry_After="3"),
        stream(delta("par"), end=False),
        stream(event({"error": {"message": "broke"}}), DONE),
        [],
        good,
    ]
    with scripted(*answers) as server:
        result = talk(server.url, "1", "2", "3", "4", "5", "/stats")
        assert result.out == "par\nfine\n"
        for words in ("429: slow down (try again in 3 s)", "in the middle", "broke", "closed"):
            assert words in result.err
        assert "1 answers, 2 tokens" in result.err
        # What failed is no part of the conversation.
        assert server.requests[-1][2]["messages"] == [{"role": "user", "content": "5"}]


def test_only_what_was_set_is_sent(talk: Any) -> None:
    with scripted(*[stream(delta("x"), DONE)] * 2) as server:
        form = '/set structured_output {"choice": ["a"]}'
        bias = "/set logit_bias 5=-1"
        talk(server.url, "a", bias, "/set stop end", "/set max_tokens none", form, "b")
        first, second = (body for _, _, body in server.requests[1:])
    assert set(first) == {"model", "messages", "stream", "stream_options"}
    assert first["model"] == "scripted"
    assert second["logit_bias"] == {"5": -1}
    assert second["stop"] == ["end"]
    assert second["structured_outputs"] == {"choice": ["a"]}
    assert "max_tokens" not in second


def test_options_without_a_meaning_are_not_taken(talk: Any, tmp_path: Path) -> None:
    (tmp_path / "c").write_text('{"messages": [], "sampling": {"logprobs": 2}}')
    with scripted() as server:
        result = talk(server.url, "/set logprobs 3", f"/load {tmp_path / 'c'}")
    assert "no sampling option 'logprobs'" in result.err
    assert "logprobs has no meaning for a server" in result.err


def test_reasoning_stays_beside_the_answer(talk: Any) -> None:
    thought = event({"choices": [{"index": 0, "delta": {"reasoning_content": "hm"}}]})
    with scripted(*[stream(thought, delta("yes"), DONE)] * 2) as server:
        result = talk(server.url, "a", "b")
        assert result.out == "yes\nyes\n"
        assert result.err.count("hm") == 2
        assert server.requests[-1][2]["messages"][1] == {"role": "assistant", "content": "yes"}


def test_no_torch_on_this_path() -> None:
    code = (
        "import sys; from nanovllm.cli.main import main; main(sys.argv[1:]);"
        "sys.exit([m for m in ('torch', 'numpy', 'tokenizers') if m in sys.modules] or 0)"
    )
    with scripted(stream(delta("ok"), DONE)) as server:
        line = [sys.executable, "-c", code, "chat", "--url", server.url]
        done = subprocess.run(line, input="hi\n", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "ok\n"


def test_ctrl_c_stops_the_answer_and_the_server(live: Live, tmp_path: Path) -> None:
    env = os.environ | {"XDG_STATE_HOME": str(tmp_path), "TERM": "dumb", "PYTHONUNBUFFERED": "1"}
    arguments = [*MODULE[1:], "chat", "--url", live.url, *KEY, "--ignore-eos"]
    child = pexpect.spawn(sys.executable, arguments, env=env, timeout=60, encoding="utf-8",
                          codec_errors="replace", dimensions=(40, 120))  # fmt: skip
    child.expect("Ctrl-D leaves")
    child.expect("> ")
    released = slow_engine(live)
    child.sendline("hello there")
    child.expect("hello there\r?\n.*\\S")
    child.sendintr()
    child.expect("stopped")
    released()
    live.wait_until_idle()
    child.expect("> ")
    child.sendline("/set max_tokens 7")
    child.sendline("and now")
    child.expect("7 tokens.*max_tokens=7 reached")
    child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def slow_engine(live: Live) -> Any:
    """The engine stands still after some tokens, until what is returned is called."""
    submit, hold, count = InlineExecutor.submit, threading.Event(), iter(range(10**6))

    def slow(executor: InlineExecutor, plan: Any) -> Any:
        if next(count) > 20:
            hold.wait(30)
        return submit(executor, plan)

    InlineExecutor.submit = slow  # type: ignore[method-assign]

    def release() -> None:
        hold.set()
        InlineExecutor.submit = submit  # type: ignore[method-assign]

    return release
