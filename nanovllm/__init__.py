"""nanovllm: an LLM inference engine that can be read in an afternoon.

    from nanovllm import LLM, SamplingParams

    llm = LLM("path/to/model")
    print(llm.generate(["Hello"], SamplingParams(max_tokens=32))[0].text)

Importing the package imports no torch; the classes that need it are loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nanovllm.config import EngineConfig
from nanovllm.errors import (
    ConfigError,
    ContextLengthError,
    EngineClosedError,
    InvalidRequestError,
    ModelLoadError,
    NanoVLLMError,
    OutOfMemoryError,
    StepError,
    UnsupportedModelError,
    WeightsError,
)
from nanovllm.outputs import CompletionOutput, Delta, Logprob, RequestMetrics, RequestOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.structured_output import StructuredOutput

if TYPE_CHECKING:
    from nanovllm.async_llm import AsyncLLM
    from nanovllm.llm import LLM, LLMEngine

__version__ = "0.1.0"

_LAZY = {
    "LLM": "nanovllm.llm",
    "LLMEngine": "nanovllm.llm",
    "AsyncLLM": "nanovllm.async_llm",
}

__all__ = [
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


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'nanovllm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
