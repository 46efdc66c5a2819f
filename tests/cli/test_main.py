"""The command line as a whole: speed of --help, flags, one-line errors, exit states, pipes."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from nanovllm import EngineConfig, SamplingParams, __version__
from nanovllm.cli import flags
from nanovllm.cli.main import COMMANDS, main

MODULE = [sys.executable, "-m", "nanovllm.cli.main"]
HEAVY = ("torch", "jinja2", "tokenizers", "numpy", "transformers")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["generate", "--help"],
        ["bench", "--help=all"],
        ["bench", "serve", "--help"],
        ["bench", "report", "--help"],
        ["chat", "--help"],
        ["run-batch", "--help"],
    ],
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; from nanovllm.cli.main import main; main(sys.argv[1:]);"
        f"sys.exit([m for m in {HEAVY!r} if m in sys.modules] or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: nanovllm")


def test_help_is_quick() -> None:
    """0.15 s on an idle machine: the processor time of the best run, as others may be at work."""
    times = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([*MODULE, "--help"], stdout=subprocess.DEVNULL, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 0.15


def test_help_names_every_command(cli: Any) -> None:
    result = cli("--help")
    assert result.status == 0
    assert all(f"\n  {name} " in result.out for name in COMMANDS)


def test_no_command_is_wrong_use(cli: Any) -> None:
    result = cli()
    assert (result.status, result.out) == (2, "")
    assert "usage: nanovllm" in result.err


def test_version(cli: Any) -> None:
    assert cli("--version").out == f"nanovllm {__version__}\n"


def test_the_package_runs_as_the_command_does() -> None:
    line = [sys.executable, "-m", "nanovllm", "--version"]
    assert subprocess.check_output(line, text=True) == f"nanovllm {__version__}\n"


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_every_option_is_a_flag(cli: Any, command: str) -> None:
    text = cli(command, "--help=all").out
    skipped = {"seed", "detokenize"}
    skipped |= {"n", "logprobs", "prompt_logprobs"} if command == "chat" else set()
    names = {f.name for f in fields(SamplingParams)} - skipped
    names |= {f.name for f in fields(EngineConfig)}
    for name in names:
        assert f"--{name.replace('_', '-')}" in text


@pytest.mark.parametrize("command", list(COMMANDS))
def test_common_help_is_short(cli: Any, command: str) -> None:
    text = cli(command, "--help").out
    shown = [line for line in text.splitlines() if line.startswith("  -")]
    assert 3 <= len(shown) <= 40
    assert len(cli(command, "--help=all").out) >= len(text)


@pytest.mark.parametrize("record", [EngineConfig, SamplingParams])
def test_every_option_has_words(record: type) -> None:
    known = flags.field_help(record)
    assert [f.name for f in fields(record) if not known.get(f.name)] == []


def test_flags_become_options(cli: Any) -> None:
    parser = flags.Parser("test", "")
    flags.add_engine_flags(parser)
    flags.add_sampling_flags(parser)
    line = (
        "--kv-cache-memory-bytes 1.5GiB --no-enable-prefix-caching --max-model-len 64 --seed 5 "
        "--stop a --stop b --logit-bias 3=-1.5,4=2 --stop-token-ids 7,8 --top-p 0.5"
    )
    form = {"regex": "[a b]"}
    options = parser.parse([*line.split(), "--structured-output", json.dumps(form)])
    assert flags.given(options, EngineConfig) == {
        "kv_cache_memory_bytes": 3 << 29,
        "enable_prefix_caching": False,
        "max_model_len": 64,
        "seed": 5,
    }
    assert flags.given(options, SamplingParams) == {
        "stop": ["a", "b"],
        "logit_bias": {3: -1.5, 4: 2.0},
        "stop_token_ids": [7, 8],
        "structured_output": form,
        "top_p": 0.5,
        "seed": 5,
    }


WRONG = {
    "genrate": "did you mean 'generate'",
    "frobnicate": "unknown command 'frobnicate'",
    "generate --temprature 1": "did you mean --temperature",
    "generate hi --temp 0": "did you mean --temperature",
    "generate --frobnicate": "unknown flag --frobnicate",
    "generate two words": "unexpected argument 'words'",
    "generate hi --top-k x": "--top-k",
    "generate hi --structured-output [1]": "is no JSON like",
    "generate hi --structured-output {}": "exactly one",
    "generate hi --temperature nan": "temperature must be a number in [0, 100]",
    "generate hi --top-p 2": "top_p must be a number in (0, 1], got 2.0",
    "generate hi --max-tokens 0": "max_tokens must be an integer of at least 1",
    "generate hi --dtype int3": "dtype must be one of",
    "generate hi --block-size 7": "block_size must be a multiple of 8",
    "generate hi --kv-cache-memory-bytes lots": "'lots' is no size",
    "generate hi --logit-bias 5": "'5' is no list like",
    "generate hi --allowed-token-ids a": "no list of integers",
    "generate hi --raw --system be": "--system or --raw, not both",
    "generate hi --model": "expected one argument",
    "generate hi --model ./nowhere": "there is no directory ./nowhere",
    "generate hi --model ~nobody-here/x": "there is no directory ~nobody-here/x",
    "generate --help=most": "invalid choice",
    "chat --n 2": "unknown flag --n",
    "bench nanoo": "did you mean 'nano'",
    "bench batch --num-requests 0": "at least 1",
    "bench first-token --num-requests 4": "--num-requests says nothing to first-token",
    "bench cold-start --num-requests 4": "says nothing to first-token and cold-start",
    "bench batch --scale -1": "--scale",
    "bench batch --shape gpt-9": "unknown shape",
    "info --model ./nowhere": "there is no directory ./nowhere",
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_use_is_one_line_and_status_2(cli: Any, line: str) -> None:
    result = cli(*line.split())
    assert result.status == 2
    assert result.out == ""
    assert result.err.count("\n") == 1
    assert WRONG[line] in result.err


def test_an_interrupt_is_status_130(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def interrupt(options: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("nanovllm.cli.info.run", interrupt)
    assert main(["info"]) == 130
    assert capsys.readouterr().err == ""


def test_an_unwritable_file_is_one_line(cli: Any, tiny: Path) -> None:
    result = cli("info", "--model", tiny, "--json", tiny / "no" / "such" / "file")
    assert result.status == 1
    assert result.err.count("\n") == 1


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", ["generate", "chat", "generate --json", "info", "--version"])
def test_a_full_disk_is_one_line_and_a_failure(tiny: Path, command: str, unbuffered: str) -> None:
    arguments = [*MODULE, *command.split()]
    if command != "--version":
        arguments += ["--model", str(tiny)]
    if command.startswith(("generate", "chat")):
        arguments += ["--max-tokens", "4"]
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            arguments,
            stdout=full,
            stderr=subprocess.PIPE,
            input="hi\nhi\n",
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        )
    assert result.returncode == 1
    assert result.stderr == "nanovllm: standard output: No space left on device\n"


def test_a_full_disk_names_the_file(cli: Any, tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    file.symlink_to("/dev/full")
    said = f"nanovllm: [Errno 28] No space left on device: '{file}'\n"
    result = cli("info", "--model", tiny, "--json", file)
    assert (result.status, result.err) == (1, said)
    lengths = ("--num-requests", "1", "--scale", "0.02", "--repeats", "1")
    result = cli("bench", "--model", tiny, "--json", file, *lengths)
    assert (result.status, result.err.splitlines(keepends=True)[-1]) == (1, said)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("way", ["argument", "environment"])
def test_make_demo_hands_the_question_over_as_it_is(tmp_path: Path, way: str) -> None:
    question = """--a "b" 'c' $HOME $(shell id) `id` $$ #;\\"""
    command = tmp_path / "nanovllm"
    command.write_text('#!/bin/sh\nprintf "%s|" "$@"\n')
    command.chmod(0o755)
    arguments = ["make", "-s", "-o", ".venv/.demo", "demo", f"BIN={tmp_path}"]
    given = [f"QUESTION={question}"] if way == "argument" else []
    environment = os.environ | ({} if given else {"QUESTION": question})
    root = Path(__file__).parents[2]
    result = subprocess.run(
        arguments + given, cwd=root, env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout == f"generate|--|{question}|"


def test_text_behind_two_dashes_is_no_flag(cli: Any, tiny: Path) -> None:
    line = ("generate", "--model", tiny, "--max-tokens", "2", "--quiet", "--json", "--", "--help")
    result = cli(*line)
    assert (result.status, json.loads(result.out)["prompt"]) == (0, "--help")


def test_a_closed_pipe_is_quiet(tiny: Path) -> None:
    command = [*MODULE, "generate", "hi", "--model", str(tiny), "--ignore-eos"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        errors = process.stderr.read().decode()
    assert process.returncode in (0, 141)  # 0 if it was done before the pipe closed
    assert "Traceback" not in errors
    assert "Exception ignored" not in errors


def test_ctrl_c_before_the_answer_is_quiet(tiny: Path) -> None:
    process = subprocess.Popen(
        [*MODULE, "generate", "--model", str(tiny), "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None
    time.sleep(0.5)  # it now waits for stdin
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (out, err) == (b"", b"")


@pytest.mark.parametrize("more", [[], ["--in-process"]])
def test_a_server_shows_a_note_of_its_engine_once(tiny: Path, more: list[str]) -> None:
    flags = ["--model", str(tiny), "--port", "0", "--block-size", "16", "--num-kv-blocks", "4"]
    with subprocess.Popen(
        [*MODULE, "serve", *flags, *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        ready = process.stdout.readline()
        process.terminate()
        _, errors = process.communicate(timeout=60)
    assert ready.startswith("ready")
    assert errors.count("max_model_len is 64") == 1
