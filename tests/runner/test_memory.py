"""How KV blocks and context are fitted to memory, and what is said about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM, ConfigError, EngineConfig, OutOfMemoryError
from nanovllm.models.config import DecoderConfig
from nanovllm.models.registry import read_config
from nanovllm.runner import memory
from nanovllm.runner.memory import CacheSize, block_bytes, check_context, fit_cache

RAW = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 100,
}
MODEL: DecoderConfig = read_config(RAW)
BLOCK = 2 * 2 * 2 * 16 * 16 * 4  # keys and values, layers, heads, head dim, slots, bytes


def fit(free_bytes: int = 1 << 40, *, on_cpu: bool = True, **options: Any) -> CacheSize:
    return fit_cache(
        EngineConfig(**options),
        MODEL,
        block_size=16,
        dtype=torch.float32,
        free_bytes=free_bytes,
        on_cpu=on_cpu,
    )


def test_bytes_of_a_block() -> None:
    assert block_bytes(MODEL, 16, torch.float32) == BLOCK
    assert block_bytes(MODEL, 32, torch.bfloat16) == BLOCK


def test_no_more_than_can_be_used() -> None:
    assert fit(max_num_seqs=3) == CacheSize(3 * 7, 100)
    assert fit(max_num_seqs=3, max_model_len=33) == CacheSize(3 * 3, 33)
    assert fit(max_num_seqs=3, kv_cache_memory_bytes=1 << 40) == CacheSize(21, 100)


def test_a_context_beyond_the_models_own_is_refused() -> None:
    check_context(EngineConfig(max_model_len=100), MODEL)
    with pytest.raises(ConfigError, match=r"101.*made for 100 positions"):
        check_context(EngineConfig(max_model_len=101), MODEL)


def test_fewer_bytes_than_a_block() -> None:
    assert fit(kv_cache_memory_bytes=BLOCK).num_blocks == 1
    with pytest.raises(ConfigError, match=rf"={BLOCK - 1} holds no.* 16 slots needs {BLOCK} bytes"):
        fit(kv_cache_memory_bytes=BLOCK - 1)


def test_asked_for_exactly() -> None:
    assert fit(num_kv_blocks=500) == CacheSize(500, 100)
    assert fit(kv_cache_memory_bytes=9 * BLOCK - 1) == CacheSize(8, 100)


def test_context_is_fitted_down_in_words() -> None:
    size = fit(5 * BLOCK + 3)
    assert (size.num_blocks, size.max_model_len) == (5, 80)
    assert len(size.notes) == 1
    assert "max_model_len is 80 instead of 100" in size.notes[0]
    assert "5 blocks of 16 slots" in size.notes[0]


def test_blocks_are_fitted_down_in_words() -> None:
    size = fit(8 * BLOCK, num_kv_blocks=20)
    assert (size.num_blocks, size.max_model_len) == (8, 100)
    assert "8 blocks instead of 20" in size.notes[0]


def test_a_cpu_is_not_filled_to_the_brim(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "DEFAULT_CPU_KV_BYTES", 10 * BLOCK)
    assert fit().num_blocks == 10
    assert fit(on_cpu=False).num_blocks == 256 * 7
    assert fit(kv_cache_memory_bytes=20 * BLOCK).num_blocks == 20


def test_memory_of_a_closed_engine_is_free_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = [60 << 30]  # with torch, of tensors that are gone
    total = 140 << 30
    monkeypatch.setattr(torch.cuda, "empty_cache", kept.clear)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (total - sum(kept), total))
    free = memory.free_memory(torch.device("cuda"), 1.0)
    assert free == total - memory.CUDA_RESERVE_BYTES


@pytest.mark.parametrize("free_bytes", [BLOCK - 1, 0, -(1 << 30)])
def test_no_room_for_one_block(free_bytes: int) -> None:
    with pytest.raises(OutOfMemoryError, match="no room for a KV cache: one block of 16 slots"):
        fit(free_bytes)


def test_host_memory_is_that_of_the_control_group(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    4000 kB\n",
        "/sys/fs/cgroup/memory.max": "max\n",
        "/sys/fs/cgroup/memory.current": "1000000",
    }

    def read_text(path: Path, *_: Any, **__: Any) -> str:
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    monkeypatch.setattr(Path, "read_text", read_text)
    assert memory.available_host_memory() == 4000 * 1024
    files["/sys/fs/cgroup/memory.max"] = "3000000"
    assert memory.available_host_memory() == 2_000_000
    files["/sys/fs/cgroup/memory.max"] = "900000"
    assert memory.available_host_memory() == 0
    del files["/sys/fs/cgroup/memory.max"]
    assert memory.available_host_memory() == 4000 * 1024
    monkeypatch.setattr(memory, "CPU_RESERVE_BYTES", 1024)
    assert memory.free_memory(torch.device("cpu"), 0.5) == 2000 * 1024 - 1024


def test_the_engine_tells_what_it_fitted(models: Any) -> None:
    options: dict[str, Any] = {"skip_tokenizer_init": True, "block_size": 8, "device": "cpu"}
    with LLM(str(models("llama")), num_kv_blocks=6, max_num_batched_tokens=4, **options) as llm:
        info = llm.info
        assert (info.num_blocks, info.block_size, info.max_model_len) == (6, 8, 48)
        assert (info.max_num_seqs, info.max_num_batched_tokens) == (4, 4)
        notes = "\n".join(info.notes)
    assert "max_model_len is 48 instead of 512" in notes
    assert "max_num_seqs is 6 instead of 256: there are 6 KV blocks" in notes
    assert "max_num_seqs is 4 instead of 6: a step computes at most" in notes


def test_weights_that_cannot_fit_are_refused_before_loading(
    models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_host_memory", lambda: 257 << 20)
    with pytest.raises(
        OutOfMemoryError, match=r"need .* MiB, .* more than the .* MiB that are free"
    ):
        LLM(
            str(models("llama")), device="cpu", skip_tokenizer_init=True,
            gpu_memory_utilization=0.99,
        )  # fmt: skip


def test_an_explicit_cache_that_does_not_fit_is_cut_in_words() -> None:
    size = fit(5 * BLOCK, max_num_seqs=8, max_model_len=64, kv_cache_memory_bytes=20 * BLOCK)
    assert size.num_blocks == 5
    assert "5 blocks instead of 20" in size.notes[0]
