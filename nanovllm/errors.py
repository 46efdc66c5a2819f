"""The errors that users meet. Each message carries the numbers: what was asked, what the limit is.

NanoVLLMError
├── ConfigError (ValueError)          an option of the engine is unknown or out of range
├── InvalidRequestError (ValueError)  a prompt or sampling parameter cannot be served
│   └── ContextLengthError            the prompt does not fit the model's context
├── ModelLoadError                    a model directory is missing something or broken
│   ├── UnsupportedModelError         the architecture or one of its features is not known here
│   └── WeightsError                  weights missing, unexpected, truncated or wrong-shaped
├── OutOfMemoryError                  the model cannot fit, and what would help
├── StepError                         one step failed; its requests were ended, the engine goes on
└── EngineClosedError                 the engine was used after close(), or in a forked process
"""


class NanoVLLMError(Exception):
    """Base of every error that nanovllm raises on purpose."""


class ConfigError(NanoVLLMError, ValueError):
    """An engine option is unknown, out of range, or contradicts another."""


class InvalidRequestError(NanoVLLMError, ValueError):
    """A request was refused before it entered the engine; nothing was enqueued."""


class ContextLengthError(InvalidRequestError):
    """The prompt leaves no room for a single new token in the model's context."""


class ModelLoadError(NanoVLLMError):
    """A model directory cannot be loaded; the message names the file or field."""


class UnsupportedModelError(ModelLoadError):
    """The architecture, or a feature that its config asks for, is not implemented."""


class WeightsError(ModelLoadError):
    """The weights do not match the architecture; the message lists the names."""


class OutOfMemoryError(NanoVLLMError):
    """Weights and the smallest useful KV cache do not fit the memory budget."""


class StepError(NanoVLLMError):
    """A step failed in the executor; the requests in it were ended with this error."""


class EngineClosedError(NanoVLLMError):
    """A method was called on an engine after `close()`, or in a process forked from its own."""
