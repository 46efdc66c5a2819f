"""Live servers for tests: inside of the test process, or the real command; and raw requests."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest
import torch
import transformers
import uvloop
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from nanovllm.config import EngineConfig
from nanovllm.executor.inline import InlineExecutor
from nanovllm.server import answers
from nanovllm.server.launch import EngineThread, Run, bind, make_service
from nanovllm.server.service import ServerConfig, Service

TEXT = [
    "The quick brown fox jumps over the lazy dog. " * 3,
    "你好，请介绍一下你自己。 Привет, мир! 🙂🙃",
    '{"name": "get_weather", "arguments": {"city": "Paris"}}',
    "user assistant system tool 0123456789 abcdefghijklmnopqrstuvwxyz",
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ADDED = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
TEMPLATE = (
    "{%- if tools %}<|im_start|>system\n# Tools\n{% for tool in tools %}{{ tool | tojson }}\n"
    "{% endfor %}Answer with <tool_call>...</tool_call><|im_end|>\n{% endif %}"
    "{%- for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function.arguments | tojson }}"
    "</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking %}<think>\n{% endif %}{% endif %}"
)


def make_tokenizer(directory: Path, template: str | None = TEMPLATE) -> int:
    """Writes a byte-level BPE tokenizer; its size."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in ADDED])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>"} | ({} if template is None else {"chat_template": template})
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer.get_vocab_size(with_added_tokens=True)


def make_model(directory: Path) -> None:
    """Writes a small random Qwen3 with its tokenizer."""
    size = make_tokenizer(directory)
    config = transformers.Qwen3Config(
        vocab_size=size,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(7)
    model = transformers.Qwen3ForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * 0.12 + (weight.ndim == 1))
    model.save_pretrained(directory)


class Live:
    """A server in this process, on a thread with an event loop of its own."""

    def __init__(
        self, model: Path | str, server: dict[str, Any] | None = None, **engine: Any
    ) -> None:
        options = {"served_model_names": ("tiny", "org/tiny")} | (server or {})
        sock = bind("127.0.0.1", 0)
        self.port = sock.getsockname()[1]
        config = EngineConfig(**({"model": str(model), "max_model_len": 256} | engine))
        self.service: Service = make_service(ServerConfig(**options), config)
        self._worker = EngineThread(config)
        self._sock = sock
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        self.wait_until(lambda: self.service.client.info is not None)

    def _serve(self) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            self._loop = runner.get_loop()
            self._run = Run(self.service, self._worker, self._sock)  # type: ignore[arg-type]
            runner.run(self._run.run())

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, key: str = "none", **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, **options)

    def call(self, function: Callable[[], Any]) -> Any:
        """Runs function on the server's event loop."""

        async def work() -> Any:
            return function()

        return asyncio.run_coroutine_threadsafe(work(), self._loop).result(10)

    def wait_until(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it did not happen in time"
            time.sleep(0.01)

    def wait_until_idle(self) -> None:
        """All blocks are free and nothing runs, as the engine itself reports."""
        client = self.service.client
        assert client.info is not None
        free = client.info.num_blocks
        self.wait_until(
            lambda: (
                client.num_sequences == 0
                and client.load.num_free_blocks == free
                and client.load.num_running == client.load.num_waiting == 0
            )
        )

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._run.stop)
        self._thread.join(20)
        self._worker.sock.close()
        self._worker.end()
        self._sock.close()
        assert not self._thread.is_alive(), "the server did not end"


def request(
    port: int,
    method: str,
    path: str,
    body: Any = None,
    headers: dict[str, str] | None = None,
) -> tuple[int, dict[str, str], Any]:
    """(status, headers, decoded JSON or bytes); a body that is no bytes is sent as JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    sent = ({} if data is None else {"Content-Type": "application/json"}) | (headers or {})
    try:
        connection.request(method, path, data, sent)
        response = connection.getresponse()
        content = response.read()
        found = {name.lower(): value for name, value in response.getheaders()}
    finally:
        connection.close()
    if found.get("content-type", "").startswith("application/json") and content:
        return response.status, found, json.loads(content)
    return response.status, found, content


class Gate:
    """Holds the engine before its next step: `with gate`, or after some more steps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._open = threading.Event()
        self._open.set()
        self._left: int | None = None
        submit = InlineExecutor.submit

        def held(executor: InlineExecutor, plan: Any) -> Any:
            if self._left is not None:
                self._left -= 1
                if self._left < 0:
                    self._left = None
                    self._open.clear()
            self._open.wait(60)
            return submit(executor, plan)

        monkeypatch.setattr(InlineExecutor, "submit", held)

    def close_after(self, num_steps: int) -> None:
        self._left = num_steps

    def open(self) -> None:
        self._left = None
        self._open.set()

    def __enter__(self) -> None:
        self._open.clear()

    def __exit__(self, *_: object) -> None:
        self.open()


def assert_error(answer: Any, code: str | None = None) -> dict[str, Any]:
    """The answer is an error in OpenAI's shape, all of it."""
    assert isinstance(answer, dict), answer
    assert set(answer) == {"error"}
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert len(json.dumps(answer)) < 16 << 10
    assert "Traceback" not in error["message"]
    assert str(Path(__file__).parents[2]) not in error["message"]
    if code is not None:
        assert error["code"] == code
    return error


def assert_answer(path: str, content_type: str, raw: bytes) -> list[Any]:
    """A 200 of one of the completion endpoints has the documented shape, and no key beside it.

    Returns its records: one, or those of the events of a stream.
    """
    chat = path.endswith("/chat/completions")
    if content_type.startswith("text/event-stream"):
        assert b"\r" not in raw
        *lines, done, rest = raw.split(b"\n\n")
        assert (done, rest) == (b"data: [DONE]", b"")
        assert all(line.startswith(b"data: ") and b"\n" not in line for line in lines)
        event = answers.ChatCompletionChunk if chat else answers.TextCompletionChunk
        return [msgspec.json.decode(line[len(b"data: ") :], type=event) for line in lines]
    whole = answers.ChatCompletion if chat else answers.TextCompletion
    return [msgspec.json.decode(raw, type=whole)]


class Command:
    """`nanovllm serve` as users start it."""

    def __init__(self, *flags: str, wait: bool = True, start_new_session: bool = False) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "nanovllm.cli.main", "serve", "--port", "0", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=start_new_session,
        )
        self.port = 0
        if wait:
            assert self.process.stdout is not None
            line = self.process.stdout.readline()
            assert line.startswith("ready:"), line + self.output()
            self.port = int(line.split("http://127.0.0.1:")[1].split("/")[0])

    def children(self) -> list[int]:
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in path.read_text().split()]

    def end(self, number: int = signal.SIGTERM, seconds: float = 30) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(seconds)

    def output(self) -> str:
        """What is left of both streams, once the process has ended."""
        try:
            return "".join(self.process.communicate(timeout=30))
        except subprocess.TimeoutExpired:
            self.process.kill()
            return "".join(self.process.communicate())


@contextmanager
def command(*flags: str, wait: bool = True) -> Iterator[Command]:
    server = Command(*flags, wait=wait)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
        server.process.communicate()
