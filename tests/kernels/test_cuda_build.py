"""Compiling CUDA C++: the cache with a fake compiler, and NVRTC itself, which needs no GPU."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nanovllm.kernels import cache
from nanovllm.kernels.cuda import build

needs_nvrtc = pytest.mark.skipif(
    build.unavailable() is not None, reason=build.unavailable() or "NVRTC is there"
)


@pytest.fixture(autouse=True)
def directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cache.tempfile, "gettempdir", lambda: str(tmp_path))
    return tmp_path / "cache" / "nanovllm"


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a fake compiler was asked for; it answers with the name and the options."""
    asked: list[str] = []

    def compile_(source: str, name: str, headers: object, options: list[str]) -> bytes:
        asked.append(name)
        return " ".join([name, *options]).encode()

    monkeypatch.setattr(build, "_version", lambda: (13, 0))
    monkeypatch.setattr(build, "_compile", compile_)
    return asked


def test_a_variant_is_compiled_once(compiled: list[str], directory: Path) -> None:
    first = build.compile_cubin("text", "a.cu", "sm_90a", {"ROWS": 8, "BIAS": 1})
    assert first.endswith(b"-DBIAS=1 -DROWS=8")
    assert build.compile_cubin("text", "a.cu", "sm_90a", {"BIAS": 1, "ROWS": 8}) == first
    assert compiled == ["a.cu"]
    assert sorted(path.suffix for path in directory.iterdir()) == [".cubin", ".size"]


def test_the_file_follows_source_macros_architecture_headers_and_compiler(
    compiled: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    variants: list[Callable[[], object]] = [
        lambda: build.compile_cubin("text", "a.cu"),
        lambda: build.compile_cubin("text 2", "a.cu"),
        lambda: build.compile_cubin("text", "a.cu", defines={"ROWS": 8}),
        lambda: build.compile_cubin("text", "a.cu", "sm_100a"),
        lambda: monkeypatch.setattr(build, "SOURCE_DIR", tmp_path),
        lambda: build.compile_cubin("text", "a.cu"),
        lambda: (tmp_path / "common.cuh").write_text("// changed"),
        lambda: build.compile_cubin("text", "a.cu"),
        lambda: monkeypatch.setattr(build, "_version", lambda: (13, 1)),
        lambda: build.compile_cubin("text", "a.cu"),
    ]
    for variant in variants:
        variant()
    assert len(compiled) == 7


def test_a_truncated_file_is_compiled_again(compiled: list[str], directory: Path) -> None:
    wanted = build.compile_cubin("text", "a.cu")
    (file,) = directory.glob("*.cubin")
    file.write_bytes(wanted[:5])
    assert build.compile_cubin("text", "a.cu") == wanted
    assert file.read_bytes() == wanted
    assert len(compiled) == 2


def test_without_a_directory_each_call_compiles(
    compiled: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(cache.tempfile, "gettempdir", lambda: str(tmp_path / "file"))
    assert build.compile_cubin("text", "a.cu") == build.compile_cubin("text", "a.cu")
    assert len(compiled) == 2


def test_directories_are_made_when_they_are_needed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cache.tempfile, "gettempdir", lambda: str(tmp_path))
    assert cache.find("a.so") is None
    assert cache.directory_in_use() == tmp_path / "cache" / "nanovllm"
    assert not list(tmp_path.iterdir())
    assert cache.writable_directory() == tmp_path / "cache" / "nanovllm"
    assert list(tmp_path.iterdir()) == [tmp_path / "cache"]


@pytest.mark.parametrize("root", ["", "here"])
def test_a_user_without_a_home_has_nothing_beside_the_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, root: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", root)
    monkeypatch.setattr(cache.os.path, "expanduser", lambda path: path)
    monkeypatch.chdir(tmp_path)
    directory = cache.writable_directory()
    assert directory is not None
    assert directory.parent == tmp_path
    assert list(tmp_path.iterdir()) == [directory]


def test_a_full_disk_is_no_error(
    compiled: list[str], monkeypatch: pytest.MonkeyPatch, directory: Path
) -> None:
    def full(made: Path, path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache, "publish", full)
    assert build.compile_cubin("text", "a.cu") == build.compile_cubin("text", "a.cu")
    assert len(compiled) == 2
    assert not list(directory.iterdir())


def test_threads_share_the_work_on_a_variant(compiled: list[str]) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: build.compile_cubin("text", "a.cu"), range(32)))
    assert len(set(found)) == 1
    assert compiled == ["a.cu"]


def test_variants_are_compiled_in_parallel(
    compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    together = threading.Barrier(4)
    compile_ = build._compile

    def wait(*arguments: object) -> bytes:
        together.wait(timeout=30)
        return compile_(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(build, "_compile", wait)
    with ThreadPoolExecutor(4) as pool:
        names = ["a.cu", "b.cu", "c.cu", "d.cu"]
        list(pool.map(lambda name: build.compile_cubin("text", name), names))
    assert sorted(compiled) == names


def test_a_machine_without_nvrtc_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise ModuleNotFoundError("No module named 'cuda'")

    monkeypatch.setattr(build, "_nvrtc", missing)
    reason = build.unavailable.__wrapped__()
    assert reason == "NVRTC cannot be used: No module named 'cuda'"


TWICE = """
#include "common.cuh"
extern "C" __global__ void twice(u32* out) { out[threadIdx.x] = FACTOR * threadIdx.x; }
"""


@needs_nvrtc
def test_nvrtc_compiles_a_source_with_our_header() -> None:
    cubin = build.compile_cubin(TWICE, "twice.cu", defines={"FACTOR": 2})
    assert cubin.startswith(b"\x7fELF")
    assert b"twice" in cubin
    assert build.compile_cubin(TWICE, "twice.cu", defines={"FACTOR": 2}) == cubin


@needs_nvrtc
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("\nvoid f() { int x = wrong; }", r'bad\.cu\(2\): error: identifier "wrong" is undefined'),
        ('#include "none.cuh"', r'bad\.cu\(1\): .*error: cannot open source file "none\.cuh"'),
        ('extern "C" __global__ void f() { asm volatile("no.such;"); }', "ptxas .*error.*no"),
    ],
)
def test_an_error_shows_its_first_line(source: str, message: str, directory: Path) -> None:
    with pytest.raises(build.BuildError, match=message) as caught:
        build.compile_cubin(source, "bad.cu")
    assert "\n" not in str(caught.value)
    assert not directory.exists() or not list(directory.iterdir())


@needs_nvrtc
def test_nvrtc_runs_in_several_threads() -> None:
    def compile_(factor: int) -> bytes:
        return build.compile_cubin(TWICE, "twice.cu", defines={"FACTOR": factor})

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(compile_, [1000 + i // 2 for i in range(16)]))
    assert len(set(found)) == 8
