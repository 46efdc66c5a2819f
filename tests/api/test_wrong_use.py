"""Wrong use gets our errors, with the numbers, and the engine goes on as if nothing had been."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import errors as hub_errors
from safetensors.torch import load_file, save_file
from tiny_models import edit_json, make_model

from nanovllm import (
    LLM,
    AsyncLLM,
    ConfigError,
    ContextLengthError,
    EngineClosedError,
    EngineConfig,
    InvalidRequestError,
    LLMEngine,
    ModelLoadError,
    SamplingParams,
    UnsupportedModelError,
    sampling_params,
)
from nanovllm.model_files import find_model

SMALL: dict[str, Any] = {
    "max_num_seqs": 4,
    "block_size": 8,
    "num_kv_blocks": 32,
    "dtype": "float32",
}


@pytest.fixture(scope="module")
def shared(text_model: Path) -> Iterator[LLM]:
    with LLM(str(text_model), max_model_len=64, **SMALL) as llm:
        yield llm


@pytest.fixture
def llm(shared: LLM) -> Iterator[LLM]:
    """An engine that must be as good as new after the test."""
    yield shared
    core = shared._engine.core
    assert core.is_finished
    assert core.scheduler.blocks.num_used == 0
    assert not shared._tracker.outputs
    core.scheduler.check_integrity()
    answer = shared.generate(
        [9, 8, 7], temperature=0, max_tokens=4, ignore_eos=True, use_tqdm=False
    )
    assert len(answer.token_ids) == 4


BAD_PROMPTS: list[tuple[Any, type[Exception], str]] = [
    ("", InvalidRequestError, "the prompt is empty"),
    ([[]], InvalidRequestError, "the prompt is empty"),
    ([[5, 384]], InvalidRequestError, r"must be in \[0, 383\], got 384"),
    ([[-1]], InvalidRequestError, r"must be in \[0, 383\], got -1"),
    ([[5, True]], InvalidRequestError, "must be an integer: True"),
    ([[5, 1.5]], InvalidRequestError, "must be an integer: 1.5"),
    ([[5, "a"]], InvalidRequestError, "must be an integer: 'a'"),
    ([["a", "b"]], InvalidRequestError, r"got a list of prompts: only generate\(\) of LLM"),
    ([[[1, 2], np.array([3])]], InvalidRequestError, "got a list of prompts"),
    ([[{"role": "user"}]], InvalidRequestError, r"got a list of messages: LLM.chat\(\)"),
    ([None], InvalidRequestError, "a string or a list of token ids: None"),
    ([b"bytes"], InvalidRequestError, "a string or a list of token ids"),
    (["\ud800"], InvalidRequestError, r"not valid Unicode: '\\ud800' after '' is"),
    (["好" * 5000 + "\udcff!"], InvalidRequestError, r"'\\udcff' after '好{20}' is half"),
    ([[5] * 64], ContextLengthError, "maximum context length is 64 tokens.* 64; at most 63"),
    ([[5] * 99], ContextLengthError, "maximum context length is 64 tokens.* 99; at most 63"),
]


@pytest.mark.parametrize(("prompt", "kind", "message"), BAD_PROMPTS)
def test_prompts(llm: LLM, prompt: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        llm.generate(prompt, use_tqdm=False)
    with pytest.raises(kind, match=message):
        llm.stream(prompt if isinstance(prompt, str) else prompt[0])


def test_one_bad_prompt_among_good_ones_runs_nothing(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="got 1000"):
        llm.generate(["good", [1, 2], [1000]], use_tqdm=False)
    assert llm.is_finished()


def test_a_prompt_that_just_fits(llm: LLM) -> None:
    output = llm.generate([5] * 63, ignore_eos=True, max_tokens=9, use_tqdm=False)
    assert len(output.token_ids) == 1
    assert output.finish_reason == "length"


BAD_SAMPLING: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": 0}, "max_tokens must be an integer of at least 1, got 0"),
    ({"max_tokens": 2.0}, "max_tokens must be an integer"),
    ({"temperature": float("nan")}, r"temperature must be a number in \[0, 100\], got nan"),
    ({"temperature": -0.1}, "temperature must be"),
    ({"temperature": float("inf")}, "temperature must be"),
    ({"temperature": "hot"}, "temperature must be"),
    ({"top_p": 0.0}, r"top_p must be a number in \(0, 1\], got 0.0"),
    ({"top_p": 1.1}, "top_p must be"),
    ({"top_k": -2}, "top_k must be an integer of at least -1"),
    ({"min_p": 1.5}, r"min_p must be a number in \[0, 1\]"),
    ({"presence_penalty": 3}, r"presence_penalty must be a number in \[-2, 2\]"),
    ({"frequency_penalty": -2.1}, r"frequency_penalty must be a number in \[-2, 2\]"),
    ({"repetition_penalty": 0.0}, r"repetition_penalty must be a number in \(0, 100\]"),
    ({"n": 0}, r"n must be an integer in \[1, 128\], got 0"),
    ({"n": True}, "n must be an integer"),
    ({"n": np.bool_(True)}, "n must be an integer"),
    ({"max_tokens": np.int64(0)}, "max_tokens must be an integer of at least 1"),
    ({"temperature": True}, "temperature must be a number"),
    ({"temperature": 10**400}, "temperature must be a number"),
    ({"temperature": np.float32("nan")}, "temperature must be a number"),
    ({"seed": 2**63}, "seed must be an integer"),
    ({"min_tokens": 9, "max_tokens": 8}, r"min_tokens \(9\) must not exceed max_tokens \(8\)"),
    ({"logprobs": 21}, r"logprobs must be an integer in \[0, 20\], got 21"),
    ({"prompt_logprobs": -1}, "prompt_logprobs must be an integer"),
    ({"stop": [""]}, "stop must be .* none of them empty"),
    ({"stop": "a\ud800"}, r"stop must be valid Unicode, .*got 'a\\ud800'"),
    ({"bad_words": ["a", "\udcff"]}, r"bad_words must be valid Unicode, .*got '\\udcff'"),
    ({"structured_output": {"json": False}}, "json must be a JSON schema, .* True .*got False"),
    ({"stop": 5}, "stop must be a string or a list of strings"),
    ({"stop": "x", "detokenize": False}, "stop strings need detokenize=True"),
    ({"stop_token_ids": "12"}, "stop_token_ids must be a list of token ids"),
    ({"stop_token_ids": [384]}, r"stop_token_ids must be in \[0, 383\], got 384"),
    ({"logit_bias": {1: 101.0}}, r"logit_bias must be a number in \[-100, 100\]"),
    ({"logit_bias": {384: 1.0}}, r"logit_bias must be in \[0, 383\], got 384"),
    ({"logit_bias": [1]}, "logit_bias must be a mapping"),
    ({"allowed_token_ids": []}, "allowed_token_ids must name at least one"),
    ({"allowed_token_ids": [500]}, r"allowed_token_ids must be in \[0, 383\], got 500"),
    ({"ignore_eos": "no"}, "ignore_eos must be True or False"),
    ({"temprature": 1.0}, "unknown sampling parameter 'temprature'; did you mean 'temperature'"),
    ({"max_new_tokens": 5}, "unknown sampling parameter 'max_new_tokens'; did you mean 'm"),
    ({"zzz": 5}, "unknown sampling parameter 'zzz'$"),
]


@pytest.mark.parametrize(("options", "message"), BAD_SAMPLING, ids=str)
def test_sampling(llm: LLM, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        llm.generate("Hello", use_tqdm=False, **options)
    with pytest.raises(InvalidRequestError, match=message):
        llm.add_request("Hello", SamplingParams(**options))


def test_numbers_of_numpy_are_plain_numbers() -> None:
    """So that they cross to other processes, and equal params are equal."""
    params = SamplingParams(
        temperature=np.float32(0.5),
        top_k=np.int64(5),
        seed=np.uint8(3),
        max_tokens=np.int32(7),
        stop_token_ids=np.array([1, 2]),
        allowed_token_ids=torch.tensor([3, 4]),
        logit_bias={np.int64(5): np.float64(1.5)},
    )
    assert params == SamplingParams(
        temperature=0.5,
        top_k=5,
        seed=3,
        max_tokens=7,
        stop_token_ids=[1, 2],
        allowed_token_ids=[3, 4],
        logit_bias={5: 1.5},
    )
    values = [params.temperature, params.top_k, params.seed, params.max_tokens]
    assert [type(value) for value in values] == [float, int, int, int]
    assert json.loads(json.dumps(asdict(params)))["stop_token_ids"] == [1, 2]
    config = EngineConfig(max_num_seqs=np.int64(4), seed=np.int64(1))
    assert config == EngineConfig(max_num_seqs=4, seed=1)
    assert type(config.max_num_seqs) is int


def test_defaults_are_what_reading_them_gives() -> None:
    """SamplingParams reads only what differs from its defaults."""
    for field in fields(SamplingParams):
        read = sampling_params._READERS[field.name](field.name, field.default)
        assert (type(read), read) == (type(field.default), field.default), field.name


def test_params_can_be_copied_and_sent() -> None:
    params = SamplingParams(max_tokens=5, stop="a")
    assert pickle.loads(pickle.dumps(params)) == copy.deepcopy(params) == params
    assert replace(params, n=2) == SamplingParams(max_tokens=5, stop="a", n=2)


def test_params_must_match_prompts(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="2 prompts but 1 sampling_params"):
        llm.generate(["a", "b"], [SamplingParams()], use_tqdm=False)
    with pytest.raises(InvalidRequestError, match=r"not both.*max_tokens"):
        llm.generate("a", SamplingParams(), use_tqdm=False, max_tokens=3)
    with pytest.raises(InvalidRequestError, match="must be SamplingParams, got"):
        llm.add_request("a", {"max_tokens": 3})  # type: ignore[arg-type]


def test_request_ids_are_unique_while_in_use(llm: LLM) -> None:
    llm.add_request("a", request_id="mine")
    with pytest.raises(InvalidRequestError, match="'mine' is in use"):
        llm.add_request("b", request_id="mine")
    llm.abort("mine")
    llm.abort("nobody's")
    assert [output.finish_reason for output in llm.step()] == ["abort"]
    assert llm.is_finished()


@pytest.mark.parametrize("options", [{"priority": "high"}, {"cache_salt": 5}], ids=str)
def test_options_of_a_request(llm: LLM, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(options))):
        llm.add_request("a", **options)


def test_chats(llm: LLM, models: Any) -> None:
    user = {"role": "user", "content": "hi"}
    cases: list[tuple[Any, str]] = [
        ([], "at least one message"),
        ([{"content": "no role"}], "message 0 must have a role"),
        (["text"], "messages must be a list"),
        ("text", "messages must be a list of .* got 'text'"),
        (5, "messages must be a list of .* got 5"),
        (user, "messages must be a list of .* got {'role'"),
        ([user, {"role": "assistant"}], r"message 1 \(role 'assistant'\) has neither content"),
        ([[user], [user, "text"]], "message 1 must be a mapping"),
    ]
    for bad, message in cases:
        with pytest.raises(InvalidRequestError, match=message):
            llm.chat(bad)
    variables: list[tuple[Any, str]] = [
        ({"tools": []}, "chat_template_kwargs cannot set 'tools': it is a parameter of its own"),
        ({"messages": []}, "cannot set 'messages': it is a parameter of its own"),
        ({"add_generation_prompt": False}, "cannot set 'add_generation_prompt': it is a par"),
        ({"eos_token": ""}, "chat_template_kwargs cannot set 'eos_token'$"),
        ({"documents": []}, "chat_template_kwargs cannot set 'documents'$"),
        ({"self": 1}, "cannot set 'self'"),
        ({5: 1}, "must have names that are strings, got 5"),
        ([1], r"must be a mapping of names to values: \[1\]"),
        ([], r"must be a mapping of names to values: \[\]"),
    ]
    for bad, message in variables:
        with pytest.raises(InvalidRequestError, match=message):
            llm.chat([user], chat_template_kwargs=bad)
    with pytest.raises(
        InvalidRequestError, match="the template's variables cannot set 'documents'"
    ):
        llm.render_chat([user], documents=[])
    with (
        LLM(str(models("qwen3")), skip_tokenizer_init=True, **SMALL) as bare,
        pytest.raises(InvalidRequestError, match="tokenizer"),
    ):
        bare.chat([{"role": "user", "content": "hi"}])


BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"max_num_seq": 3}, "unknown engine option 'max_num_seq'; did you mean 'max_num_seqs'"),
    ({"gpu_memory_utilisation": 0.5}, "did you mean 'gpu_memory_utilization'"),
    ({"dtype": "float8"}, "dtype must be one of .*, got 'float8'"),
    ({"device": "tpu"}, "device must be one of"),
    ({"block_size": 12}, "block_size must be a multiple of 8 up to 256, got 12"),
    ({"block_size": 264}, "block_size must be a multiple of 8 up to 256, got 264"),
    ({"max_num_seqs": None}, "max_num_seqs must be an integer of at least 1, got None"),
    ({"num_kv_blocks": True}, "num_kv_blocks must be an integer"),
    ({"gpu_memory_utilization": True}, r"gpu_memory_utilization must be in \(0, 1\]"),
    ({"tensor_parallel_size": 2}, "tensor_parallel_size=2 is not available"),
    ({"max_model_len": 0}, "max_model_len must be an integer of at least 1, got 0"),
    ({"max_num_batched_tokens": -1}, "max_num_batched_tokens must be"),
    ({"gpu_memory_utilization": 1.5}, r"gpu_memory_utilization must be in \(0, 1\], got 1.5"),
    ({"tensor_parallel_size": 0}, "tensor_parallel_size"),
    ({"kv_cache_dtype": "fp4"}, "kv_cache_dtype must be one of auto, fp8, got 'fp4'"),
    ({"enable_prefix_caching": 1}, "enable_prefix_caching must be True or False"),
    ({"seed": "x"}, "seed must be an integer"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=str)
def test_engine_options(text_model: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LLM(str(text_model), **options)
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**options)


def test_engine_options_that_this_machine_refuses(text_model: Path) -> None:
    for options, message in (
        ({"device": "cuda:99"}, r"'cuda:99' is not there: torch \S+ sees (no GPU|cuda:0)"),
        ({"kv_cache_memory_bytes": 1000}, r"=1000 holds no KV cache: .* needs \d{4,} bytes"),
        ({"kv_cache_dtype": "fp8", "device": "cpu"}, "kv_cache_dtype='fp8' needs the triton"),
        ({"attention_backend": "magic"}, "attention_backend must be auto or one of .*'magic'"),
    ):
        with pytest.raises(ConfigError, match=message):
            LLM(str(text_model), **options)


def test_used_after_close(text_model: Path) -> None:
    llm = LLM(str(text_model), **SMALL)
    llm.add_request("unfinished")
    llm.close()
    llm.close()
    for use in (lambda: llm.generate("a"), llm.step, lambda: llm.add_request("a")):
        with pytest.raises(EngineClosedError, match="closed"):
            use()
    with pytest.raises(EngineClosedError, match="closed"):
        list(llm.stream("a"))


@pytest.mark.parametrize("kind", [LLM, LLMEngine, AsyncLLM])
def test_an_engine_cannot_be_pickled_or_copied(text_model: Path, kind: type[Any]) -> None:
    engine = kind(str(text_model), **SMALL)
    expected = rf"{kind.__name__} cannot be pickled or copied.* Make one .* in each process"
    try:
        for send in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match=expected):
                send(engine)
    finally:
        engine.close()


def test_what_is_sent_in_place_of_an_engine(llm: LLM) -> None:
    output = llm.generate("a", max_tokens=2, logprobs=1, use_tqdm=False)
    assert pickle.loads(pickle.dumps(output)).text == output.text


def test_directories_that_are_no_model(text_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="there is no directory"):
        LLM(str(tmp_path / "absent"))
    with pytest.raises(ModelLoadError, match=r"has no config\.json"):
        LLM(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelLoadError, match="is not JSON"):
        LLM(str(tmp_path))
    (tmp_path / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    with pytest.raises(UnsupportedModelError, match=r"GPT2LMHeadModel.*known: .*Qwen3ForCausalLM"):
        LLM(str(tmp_path))
    with pytest.raises(ModelLoadError, match="is a file"):
        LLM(str(text_model / "config.json"))


def test_a_home_directory_is_found(
    text_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").symlink_to(text_model)
    assert find_model("~/mine").directory == tmp_path / "mine"
    with pytest.raises(ModelLoadError, match=f"there is no directory {tmp_path}/absent$"):
        find_model("~/absent")


HUB_ERRORS: list[tuple[Exception, str]] = [
    (hub_errors.HFValidationError("Repo id must\nbe"), "from the hub: Repo id must$"),
    (RuntimeError(), "from the hub: RuntimeError$"),
]


@pytest.mark.parametrize(("error", "message"), HUB_ERRORS)
def test_a_hub_that_gives_nothing(
    monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def download(*args: Any, **options: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ModelLoadError, match=f"'a/b' is no directory here .*{message}"):
        find_model("a/b")


def test_a_hub_that_is_out_of_reach_or_knows_no_such_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unreachable(*args: Any, **options: Any) -> str:
        raise hub_errors.LocalEntryNotFoundError("Got: it\nmany lines") from OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(ModelLoadError, match=r"from the hub: no network$"):
        find_model("a/b")

    def unknown(*args: Any, **options: Any) -> str:
        raise hub_errors.RepositoryNotFoundError("401 Client Error", response=MagicMock())

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unknown)
    with pytest.raises(ModelLoadError, match=r"there is no such model, or it needs a token"):
        find_model("a/b")


def test_directory_without_a_tokenizer(models: Any) -> None:
    directory = str(models("qwen3"))
    with pytest.raises(ModelLoadError, match=r"no tokenizer\.json.*skip_tokenizer_init=True"):
        LLM(directory)
    with LLM(directory, skip_tokenizer_init=True, **SMALL) as llm:
        with pytest.raises(InvalidRequestError, match="a text prompt needs a tokenizer"):
            llm.generate("text", use_tqdm=False)
        with pytest.raises(InvalidRequestError, match="stop strings"):
            llm.generate([5], stop="x", use_tqdm=False)
        output = llm.generate([5, 6], max_tokens=3, ignore_eos=True, use_tqdm=False)
        assert (len(output.token_ids), output.text) == (3, "")


def test_damaged_tokenizer(text_model: Path, tmp_path: Path) -> None:
    shutil.copytree(text_model, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("[]")
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json cannot be read"):
        LLM(str(tmp_path / "model"))
    edit_json(tmp_path / "model" / "config.json", hidden_act="gelu")
    with pytest.raises(ModelLoadError, match="gelu"):
        LLM(str(tmp_path / "model"))


def test_end_tokens_that_cannot_be(
    text_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "model"
    shutil.copytree(text_model, directory)
    edit_json(directory / "config.json", eos_token_id=[3, 10**6])
    with LLM(str(directory), max_model_len=64, **SMALL):
        assert f"eos_token_id {10**6} of the model's files is beyond its vocab" in caplog.text
    edit_json(directory / "config.json", eos_token_id="end")
    with pytest.raises(ModelLoadError, match=r"config\.json: eos_token_id must .*got 'end'"):
        LLM(str(directory), max_model_len=64, **SMALL)


def test_numbers_that_are_none_end_only_their_request(tmp_path: Path) -> None:
    """One token's embedding is NaN: prompts with it fail, and what they cached is not reused."""
    directory = make_model(tmp_path / "nan", "llama", tie_word_embeddings=False)
    weights = load_file(directory / "model.safetensors")
    weights["model.embed_tokens.weight"][7] = torch.nan
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    good, bad = [5, 6] * 10, [5, 6] * 4 + [7] * 10
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logit_bias={7: -100})
    with LLMEngine(str(directory), skip_tokenizer_init=True, **SMALL) as engine:
        expected = engine.generate([good], params)[0].token_ids
        outputs = engine.generate([bad, good, bad, good], params)
        for output in outputs[::2]:
            assert output.finish_reason == "error"
            assert output.token_ids == []
            assert "not finite" in (output.outputs[0].error or "")
        assert [output.token_ids for output in outputs[1::2]] == [expected] * 2
        assert engine.generate([bad[:18]], params)[0].finish_reason == "error"
        assert engine._engine.core.scheduler.blocks.num_used == 0


def test_a_step_that_raises_ends_its_requests_alone(text_model: Path) -> None:
    with LLMEngine(str(text_model), **SMALL) as engine:
        runner: Any = engine._engine.core._executor._runner  # type: ignore[attr-defined]
        expected = engine.generate("again", temperature=0, max_tokens=5, ignore_eos=True).token_ids
        copy_blocks = runner._copy_blocks

        def broken(plan: Any) -> None:
            runner._copy_blocks = copy_blocks
            raise RuntimeError("out of magic")

        runner._copy_blocks = broken
        output = engine.generate("again", temperature=0, max_tokens=5, ignore_eos=True)
        assert output.finish_reason == "error"
        assert output.outputs[0].error == "RuntimeError: out of magic"
        again = engine.generate("again", temperature=0, max_tokens=5, ignore_eos=True)
        assert again.token_ids == expected
        assert again.metrics.num_cached_tokens == 0


FORKED = """
import os
from nanovllm import LLM, EngineClosedError
llm = LLM("demo")
llm.generate("a", max_tokens=1, use_tqdm=False)
child = os.fork()
if child == 0:
    try:
        llm.generate("a", max_tokens=1, use_tqdm=False)
    except EngineClosedError as error:
        os._exit(7 if f"belongs to process {os.getppid()}" in str(error) else 8)
    os._exit(9)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
llm.generate("a", max_tokens=1, use_tqdm=False)
"""


def test_a_forked_process_is_refused_in_place_of_waiting_for_ever() -> None:
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr.decode()
