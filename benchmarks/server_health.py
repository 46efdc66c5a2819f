"""How fast a busy server answers /health: idle, with streams running, with huge prompts tokenized.

    python benchmarks/server_health.py [--model DIR] [--streams N] [--words N] [--seconds S]
                                       [--json FILE]

Starts `nanovllm serve`, makes the load from a process of its own, and asks /health on one kept
connection and on new ones in turn. Everything shares this machine's cores, as in a small
deployment. Exits with 1 if an answer took over 100 ms.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanovllm.bench.report import as_json, write_json
from nanovllm.bench.table import table

LIMIT_MS = 100.0
PAUSE = 0.005  # between two questions
JSON = {"Content-Type": "application/json"}
TEXT = "/v1/completions"


def start_server(model: str, streams: int) -> tuple[subprocess.Popen[str], int]:
    """A server with room for all streams; its process and port."""
    command = [sys.executable, "-m", "nanovllm.cli.main", "serve", model, "--port", "0"]
    command += ["--max-num-seqs", str(max(streams, 1)), "--log-level", "warning"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None, "it was asked for"
    line = process.stdout.readline()
    if not line.startswith("ready:"):
        raise SystemExit(f"the server did not start: {line}")
    return process, int(line.split("http://127.0.0.1:")[1].split("/")[0])


# --- load: runs in a process of its own, until it is ended ----------------------------------------


def run_load(port: int, kind: str, number: int) -> None:
    """Streams of tokens, or one prompt of so many words after the other, without end."""
    work = stream_forever if kind == "streams" else send_words_forever
    count = number if kind == "streams" else 1
    threads = [threading.Thread(target=work, args=(port, number, i)) for i in range(count)]
    for thread in threads:
        thread.start()


def stream_forever(port: int, _: int, index: int) -> None:
    body = {
        "prompt": [20 + index] * 32,
        "max_tokens": 512,
        "ignore_eos": True,
        "stream": True,
        "seed": index,
    }
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("POST", TEXT, json.dumps(body), JSON)
        response = connection.getresponse()
        while response.read1(1 << 16):
            pass
        connection.close()


def send_words_forever(port: int, number: int, _: int) -> None:
    body = json.dumps({"prompt": " ".join(["word"] * number)}).encode()
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("POST", "/tokenize", body, JSON)
        response = connection.getresponse()
        response.read()
        assert response.status == 200, response.status
        connection.close()


# --- questions ------------------------------------------------------------------------------------


def ask(port: int, seconds: float) -> list[float]:
    """Milliseconds of each answer; every other one on a new connection."""
    kept = http.client.HTTPConnection("127.0.0.1", port)
    times: list[float] = []
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        fresh = len(times) % 2 == 1
        began = time.perf_counter()
        connection = http.client.HTTPConnection("127.0.0.1", port) if fresh else kept
        connection.request("GET", "/health")
        response = connection.getresponse()
        response.read()
        times.append(1000 * (time.perf_counter() - began))
        assert response.status == 200, response.status
        if fresh:
            connection.close()
        time.sleep(PAUSE)
    kept.close()
    return times


def load_of(port: int) -> dict[str, int]:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", "/load")
    found: dict[str, int] = json.loads(connection.getresponse().read())
    connection.close()
    return found


def measure(port: int, name: str, kind: str | None, number: int, seconds: float) -> dict[str, Any]:
    """One row: answers of /health while that load runs."""
    load = None
    if kind is not None:
        load = subprocess.Popen([sys.executable, __file__, "--load", str(port), kind, str(number)])
        wait_until(
            lambda: kind != "streams" or load_of(port)["num_requests_running"] >= number // 2
        )
        time.sleep(1.0)
    before = load_of(port)
    times = sorted(ask(port, seconds))
    after = load_of(port)
    if load is not None:
        load.kill()
        load.wait()
        wait_until(lambda: load_of(port)["num_requests_running"] == 0)
    return {
        "load": name,
        "answers": len(times),
        "p50_ms": round(times[len(times) // 2], 2),
        "p99_ms": round(times[int(len(times) * 0.99)], 2),
        "max_ms": round(times[-1], 2),
        "tokens_per_s": round((after["generation_tokens"] - before["generation_tokens"]) / seconds),
    }


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit("the load did not start or end in time")
        time.sleep(0.1)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--words", type=int, default=400_000)
    parser.add_argument("--seconds", type=float, default=15.0, help="for each load")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--load", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.load:
        port, kind, number = options.load
        run_load(int(port), kind, int(number))
        return 0
    process, port = start_server(options.model, options.streams)
    try:
        rows = [
            measure(port, name, kind, number, options.seconds)
            for name, kind, number in (
                ("none", None, 0),
                (f"{options.streams} streams", "streams", options.streams),
                (f"prompts of {options.words} words", "words", options.words),
            )
        ]
    finally:
        process.terminate()
        process.wait()
    print(table([tuple(rows[0]), *(tuple(map(str, row.values())) for row in rows)]))
    if options.json is not None:
        content = as_json([os.path.relpath(sys.argv[0]), *sys.argv[1:]], None, [])
        write_json(options.json, content | {"health": rows})
    return int(max(row["max_ms"] for row in rows) > LIMIT_MS)


if __name__ == "__main__":
    sys.exit(main())
