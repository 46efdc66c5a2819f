"""Starts and ends a server: port first, then the engine's process, then HTTP; signals and drain.

The port is bound before the model loads, so a taken one is told at once; while it loads, requests
are answered 503. The engine's process ends with this one, however this one ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from nanovllm.config import EngineConfig
from nanovllm.errors import ConfigError
from nanovllm.model_files import find_model
from nanovllm.server.engine_client import EngineClient, watch
from nanovllm.server.http_server import HttpServer
from nanovllm.server.messages import HELD_SIGNALS
from nanovllm.server.service import ServerConfig, Service
from nanovllm.server.streams import EngineDeadError
from nanovllm.text.chat import ChatTemplate

logger = logging.getLogger("nanovllm.server")
logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # it tells of every start and end
BACKLOG = 2048
MAX_FILES = 65536
DEATH_LINGER = 1.0  # seconds in which /health says what happened before the server exits
END_SECONDS = 5.0  # for the engine's process to end when it is told to
STEADY_SECONDS = 60.0  # an engine that served for so long is replaced at once
FIRST_DELAY, MAX_DELAY = 1.0, 30.0
INTERRUPT_STATUS = 130


class EngineProcess:
    """The engine as a child process; `kill` and `end` may be called at any time."""

    def __init__(self, config: EngineConfig) -> None:
        self.sock, theirs = socket.socketpair()
        with theirs, _signals_held():
            self._process = subprocess.Popen(
                [sys.executable, "-m", "nanovllm.server.engine_process", str(theirs.fileno())],
                stdin=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
            )
            self._configure(config)

    def _configure(self, config: EngineConfig) -> None:
        assert self._process.stdin is not None, "it was asked for"
        with contextlib.suppress(BrokenPipeError), self._process.stdin as stdin:
            level = logging.getLogger("nanovllm").getEffectiveLevel()
            stdin.write(
                msgspec.json.encode({"log_level": level, "engine": dataclasses.asdict(config)})
            )

    def kill(self) -> None:
        self._process.kill()

    def end(self, *, started: bool = True) -> None:
        """Waits for the end of the process, which was told to, or lost the socket.

        One that has not started yet holds nothing worth the wait.
        """
        try:
            self._process.wait(END_SECONDS if started else 0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class EngineThread:
    """The engine as a thread of this process, for debugging; cannot be killed."""

    def __init__(self, config: EngineConfig) -> None:
        # Loads torch, which the HTTP process otherwise never needs.
        from nanovllm.server.engine_process import serve_engine

        self.sock, theirs = socket.socketpair()
        self._thread = threading.Thread(
            target=serve_engine, args=(theirs, config, lambda: None), daemon=True
        )
        self._thread.start()

    def kill(self) -> None:
        logger.error("the engine runs in this process and cannot be killed")

    def end(self, *, started: bool = True) -> None:
        self._thread.join(END_SECONDS)


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """What would end this process waits until the block ends; a child that begins there has it
    blocked from its first instruction, as an interrupt from a terminal reaches the whole group."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ConfigError if the address is taken or not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        sock.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"cannot listen on {host}:{port}: {reason}") from None
    return sock


def make_service(
    config: ServerConfig, engine: EngineConfig, chat_template: str | None = None
) -> Service:
    """The text side of the model. Raises ModelLoadError or ConfigError."""
    if engine.skip_tokenizer_init:
        raise ConfigError("the server needs the model's tokenizer: skip_tokenizer_init is set")
    files = find_model(engine.model)
    tokenizer = files.tokenizer()
    template = files.chat_template(tokenizer)
    if chat_template is not None:
        template = ChatTemplate(_read_template(chat_template), tokenizer.special_tokens())
    if not config.served_model_names:
        # Of a directory the last name: answers show no paths.
        path = Path(engine.model).expanduser()
        name = path.resolve().name if path.is_dir() else engine.model
        config = dataclasses.replace(config, served_model_names=(name,))
    return Service(config, files, tokenizer, template)


def _read_template(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, TypeError) as error:
        raise ConfigError(f"the chat template {path} cannot be read: {error}") from None


def serve(
    config: ServerConfig,
    engine: EngineConfig,
    *,
    chat_template: str | None = None,
    in_process: bool = False,
) -> int:
    """Serves until a signal or the engine's end; the exit status.

    Raises ConfigError or ModelLoadError for what is wrong before anything runs, and ConfigError for
    what the engine finds when it starts.
    """
    restarts = config.on_engine_death == "restart"
    if restarts and in_process:
        raise ConfigError("an engine in the server's process cannot be restarted: on_engine_death")
    sock = bind(config.host, config.port)
    _allow_many_connections()
    with sock:
        service = make_service(config, engine, chat_template)
        worker = EngineThread(engine) if in_process else EngineProcess(engine)
        run = Run(service, worker, sock, (lambda: EngineProcess(engine)) if restarts else None)
        try:
            with asyncio.Runner(loop_factory=_loop_factory()) as runner:
                return runner.run(run.run())
        finally:
            run.worker.sock.close()
            run.worker.end(started=service.client.info is not None)


def _allow_many_connections() -> None:
    """Each is a file descriptor, and 1,024 of them is a common soft limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    import uvloop  # optional: not there on every platform

    return uvloop.new_event_loop


class Backoff:
    """How long to wait before another engine, so that a fault that comes back costs little.

    Nothing after an engine that served for a minute; else 1, 2, 4, ... 30 s, while the next ones
    end as soon.
    """

    def __init__(self) -> None:
        self._delay = 0.0

    def after(self, served_seconds: float) -> float:
        """Seconds."""
        steady = served_seconds >= STEADY_SECONDS
        self._delay = 0.0 if steady else min(max(2 * self._delay, FIRST_DELAY), MAX_DELAY)
        return self._delay


class Run:
    """One life of a server. `restart` starts another engine; without it the server ends with its.

    An engine that ended before it was ready is not started again: the next one would not be either.
    """

    def __init__(
        self,
        service: Service,
        worker: EngineProcess | EngineThread,
        sock: socket.socket,
        restart: Callable[[], EngineProcess] | None = None,
    ) -> None:
        self.worker = worker
        self._service = service
        self._restart = restart
        self._sock = sock
        self._status = 0
        self._has_served = False
        self._ends: set[asyncio.Task[None]] = set()
        self._backoff = Backoff()
        self.http = HttpServer(service)

    async def run(self) -> int:
        """The exit status. Raises ConfigError if the engine refuses its config."""
        loop = asyncio.get_running_loop()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self.stop, number)
        self._service.structures.warm_up()
        await self._service.client.connect(self.worker.sock)
        engines = asyncio.create_task(self._keep_engine())
        engines.add_done_callback(self._end)
        try:
            await self.http.serve(sockets=[self._sock])
        finally:
            engines.cancel()
            (ended,) = await asyncio.gather(engines, return_exceptions=True)
            if isinstance(ended, Exception):
                logger.error("the engine cannot be started again", exc_info=ended)
                self._status = 1
            await self._service.client.close(END_SECONDS)
            self._service.close()
        refusal = self._service.client.refusal
        if refusal is not None and not self._has_served:
            raise ConfigError(refusal)
        return self._status

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """The first call drains, the second ends at once."""
        if number == signal.SIGINT and not self._has_served:
            self._status = INTERRUPT_STATUS
        if self._service.draining:
            self.http.force_exit = True
            self._end()
            return
        self._service.draining = True
        self._ends.add(asyncio.ensure_future(self._drain()))

    def _end(self, *_: object) -> None:
        self.http.should_exit = True

    async def _drain(self) -> None:
        timeout = self._service.config.drain_timeout
        logger.info("shutting down: %d requests have %g s", self._service.num_open, timeout)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while self._service.num_open:
                    await asyncio.sleep(0.05)
        if self._service.num_open:
            logger.warning("%d requests did not end in time", self._service.num_open)
            self.http.force_exit = True  # uvicorn cancels them else; so each ends with an error
        self._end()

    async def _keep_engine(self) -> None:
        """Returns when there is no engine any more."""
        while True:
            client = self._service.client
            await self._attend(client)
            served = client.served_seconds
            if client.refusal is None or self._has_served:
                logger.error("%s", client.death)
            if self._restart is None or client.info is None or self._service.draining:
                break
            await client.close(END_SECONDS)
            await asyncio.to_thread(self.worker.end)
            delay = self._backoff.after(served)
            logger.warning(
                "another engine is started in %g s: this one served for %.0f s", delay, served
            )
            await asyncio.sleep(delay)
            self._service.client = self._service.new_client()
            self.worker = self._restart()
            await self._service.client.connect(self.worker.sock)
        self._status = 1
        if client.info is not None:
            await asyncio.sleep(DEATH_LINGER)

    async def _attend(self, client: EngineClient) -> None:
        """Until the engine's end: says when it is ready, and ends it if it hangs."""
        timeout = self._service.config.engine_timeout
        tasks = [
            asyncio.create_task(self._announce(client)),
            asyncio.create_task(watch(client, timeout, self.worker.kill)),
        ]
        try:
            await client.died.wait()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _announce(self, client: EngineClient) -> None:
        with contextlib.suppress(EngineDeadError):
            info = await client.ready()
            self._has_served = True
            url = f"http://{_host(self._sock)}:{self._sock.getsockname()[1]}"
            logger.info(
                "%s on %s in %s, context %d, %d KV blocks of %d, loaded in %.1f s",
                *(info.model, info.device, info.dtype, info.max_model_len),
                *(info.num_blocks, info.block_size, info.load_seconds),
            )
            print(f"ready: chat at {url}/ and API at {url}/v1", flush=True)


def _host(sock: socket.socket) -> str:
    host: str = sock.getsockname()[0]
    if host in ("0.0.0.0", "::"):
        return "localhost"
    return f"[{host}]" if ":" in host else host
