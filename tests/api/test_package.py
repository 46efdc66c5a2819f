"""The package as a whole: its public names, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

import nanovllm

NAMES = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "ConfigError",
    "ContextLengthError",
    "Delta",
    "EngineClosedError",
    "EngineConfig",
    "InvalidRequestError",
    "LLMEngine",
    "Logprob",
    "ModelLoadError",
    "NanoVLLMError",
    "OutOfMemoryError",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "StepError",
    "StructuredOutput",
    "UnsupportedModelError",
    "WeightsError",
    "__version__",
]


def test_public_names() -> None:
    """Adding a name is a decision: it stays for good."""
    assert sorted(nanovllm.__all__) == sorted(NAMES)
    for name in NAMES:
        assert getattr(nanovllm, name) is not None
    assert dir(nanovllm) == sorted(NAMES)
    with pytest.raises(AttributeError, match="no attribute 'LMM'"):
        nanovllm.LMM  # noqa: B018


def test_errors_are_one_tree() -> None:
    errors = [getattr(nanovllm, name) for name in NAMES if name.endswith("Error")]
    assert all(issubclass(error, nanovllm.NanoVLLMError) for error in errors)
    assert issubclass(nanovllm.ConfigError, ValueError)
    assert issubclass(nanovllm.InvalidRequestError, ValueError)


def test_importing_loads_no_torch() -> None:
    code = (
        "import sys, nanovllm; nanovllm.SamplingParams(); nanovllm.EngineConfig();"
        "print([m for m in ('torch', 'transformers', 'numpy', 'tokenizers') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_the_engine_needs_no_transformers() -> None:
    code = (
        "import sys; from nanovllm import LLM, AsyncLLM; assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_config_and_params_are_frozen() -> None:
    for value in (nanovllm.SamplingParams(), nanovllm.EngineConfig()):
        with pytest.raises(AttributeError):
            value.seed = 1  # type: ignore[misc]
