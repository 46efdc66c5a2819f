"""What the endpoints share: the model's name and text side, the engine, admission, and limits."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from nanovllm.errors import ConfigError, InvalidRequestError
from nanovllm.metrics.prometheus import PrometheusMetrics
from nanovllm.model_files import ModelFiles
from nanovllm.outputs import CompletionOutput, Delta, RequestOutput
from nanovllm.sampling_params import SamplingParams, recommended
from nanovllm.server import answers
from nanovllm.server.engine_client import EngineClient
from nanovllm.server.errors import ApiError, engine_failed, from_engine, invalid, unavailable
from nanovllm.server.output_parser import tool_style
from nanovllm.server.prompts import PromptEncoder
from nanovllm.server.streams import EngineDeadError, Job, ShutdownError, Stream
from nanovllm.server.structure import StructureCompiler
from nanovllm.server.tool_calls import ARGS_MARK, CALLS_MARK, ID_MARK
from nanovllm.server.validate import Limits
from nanovllm.structured_output import STRUCTURE_FAILED, StructuredOutput
from nanovllm.text.chat import ChatTemplate
from nanovllm.text.tokenizer import Tokenizer

logger = logging.getLogger("nanovllm.server")
_METRIC_PREFIX = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
# Special tokens that are a part of calls: the parser must see them.
SHOWN_MARKS = (CALLS_MARK, ARGS_MARK, ID_MARK)
SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Options of the server; those of the engine are in EngineConfig.

    api_keys            empty: nobody is asked for one
    served_model_names  names that requests may use, the first is the one in answers
    any_model           accept every name
    max_waiting         sequences that may wait beside those that run, before 429
    drain_timeout       seconds that running requests have after SIGTERM
    engine_timeout      seconds without progress after which the engine counts as hung
    on_engine_death     "exit" ends the server, "restart" starts another engine
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    served_model_names: tuple[str, ...] = ()
    any_model: bool = False
    max_waiting: int = 1024
    drain_timeout: float = 30.0
    engine_timeout: float = 60.0
    on_engine_death: str = "exit"
    metrics_prefix: str = "nanovllm"

    def __post_init__(self) -> None:
        for name, kind in (("host", str), ("port", int), ("max_waiting", int), ("any_model", bool)):
            value = getattr(self, name)
            if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
                raise ConfigError(f"{name} must be of type {kind.__name__}, got {value!r}")
        if self.max_waiting < 0:
            raise ConfigError(f"max_waiting must be at least 0, got {self.max_waiting}")
        for name, low in (("drain_timeout", 0.0), ("engine_timeout", 1.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= low:
                raise ConfigError(f"{name} must be at least {low:g} seconds, got {value!r}")
        if self.on_engine_death not in ("exit", "restart"):
            raise ConfigError(f"on_engine_death is exit or restart, got {self.on_engine_death!r}")
        if not _METRIC_PREFIX.fullmatch(str(self.metrics_prefix)):
            raise ConfigError(f"metrics_prefix must be letters and _, got {self.metrics_prefix!r}")
        if not all(key and key == key.strip() for key in self.api_keys):
            raise ConfigError(
                "api_key must not be empty, nor have white space around it: leave it out to ask "
                "for none"
            )


class Service:
    """One model, served. Runs on one event loop."""

    def __init__(
        self,
        config: ServerConfig,
        files: ModelFiles,
        tokenizer: Tokenizer,
        template: ChatTemplate,
    ) -> None:
        self.config = config
        self.names = config.served_model_names
        self.tokenizer = tokenizer
        self._shown = tokenizer.showing(SHOWN_MARKS)
        self._most_characters = tokenizer.most_characters()
        self.prompts = PromptEncoder(tokenizer, template)
        self.metrics = PrometheusMetrics(self.names[0], config.metrics_prefix)
        self.client = self.new_client()
        self.created = int(time.time())
        self.draining = False
        self.num_open = 0  # requests that were admitted and not answered completely
        self.num_held = 0  # bytes of their bodies
        self.defaults = _sampling_defaults(files.generation)
        self._eos_token_ids = frozenset(files.eos_token_ids())
        self.structures = StructureCompiler(tokenizer, files.eos_token_ids())
        source = template.source or ""
        self.reasons = "<think>" in source or tokenizer.token_id("<think>") is not None
        self.tool_style = tool_style(source)

    def new_client(self) -> EngineClient:
        """For an engine that is started now."""
        return EngineClient(self._shown, self.metrics)

    def trouble(self) -> str | None:
        """Why no request can be served at this moment, or None."""
        return "the server is shutting down" if self.draining else self.client.trouble()

    def limits(self) -> Limits:
        """Raises ApiError 503 while there is no engine."""
        trouble = self.trouble()
        if trouble is not None:
            self.metrics.rejected("unavailable")
            raise unavailable(trouble)
        assert self.client.info is not None, "an engine without trouble is ready"
        return Limits(
            self.client.max_prompt_len,
            self.client.max_prompt_len * self._most_characters,
            self.client.info.vocab_size,
            self.client.info.max_num_seqs + self.config.max_waiting,
            self.defaults,
            self._eos_token_ids,
            self.tokenizer.spellings,
        )

    def model_name(self, asked: str | None) -> str:
        """The name to answer with. Raises ApiError 404 if there is no such model."""
        if asked is None:
            return self.names[0]
        if asked in self.names or self.config.any_model:
            return asked
        raise ApiError(
            404,
            f"The model {asked[:200]!r} does not exist here; there is {self.names[0]!r}.",
            param="model",
            code="model_not_found",
        )

    async def constrain(
        self, params: SamplingParams, field: str, structure: StructuredOutput
    ) -> SamplingParams:
        """params for text of this form, which a field of the request asks for.

        Raises ApiError if the form contradicts other parameters or cannot be compiled.
        """
        try:
            params = replace(params, structured_output=structure)
        except InvalidRequestError as error:
            raise from_engine(error) from None
        await self.structures.check(field, structure)
        return params

    def close(self) -> None:
        """Ends the threads that work on requests' texts and forms."""
        self.prompts.close()
        self.structures.close()

    def start(self, jobs: Sequence[Job]) -> Stream:
        """Raises ApiError 429 if there are too many now; they were checked to fit at all."""
        limits = self.limits()
        wanted = sum(job.params.n for job in jobs)
        if self.client.num_sequences + wanted > limits.max_sequences:
            self.metrics.rejected("queue_full")
            raise ApiError(
                429,
                f"The queue is full: {self.client.num_sequences} completions run or wait, and "
                f"{limits.max_sequences} may. Try again later.",
                code="queue_full",
                headers={"Retry-After": "1"},
            )
        try:
            return self.client.start(jobs)
        except EngineDeadError as error:
            raise unavailable(str(error)) from None

    def explain(self, error: Exception) -> ApiError:
        """An error of a stream, as the client may see it; the rest goes to the log."""
        if isinstance(error, ApiError):
            return error
        if isinstance(error, InvalidRequestError):
            return from_engine(error)
        if isinstance(error, ShutdownError):
            logger.warning("a request was cut off: %s", error)
            return unavailable(str(error))
        if isinstance(error, EngineDeadError):
            logger.error("a request was lost: %s", error)
        else:
            logger.error("a request failed", exc_info=error)
        return engine_failed()

    def check(self, ended: Delta | CompletionOutput) -> None:
        """Raises ApiError if the completion ended with an error."""
        if ended.finish_reason == "error":
            if ended.error is not None and ended.error.startswith(STRUCTURE_FAILED):
                raise invalid(ended.error, None, "structured_output_failed")
            logger.error("a request failed in the engine: %s", ended.error)
            raise engine_failed()


def usage(outputs: Sequence[RequestOutput], cached: Sequence[int]) -> answers.Usage:
    """OpenAI's usage record over all prompts of a request."""
    num_prompt = sum(len(output.prompt_token_ids) for output in outputs)
    num_generated = sum(len(c.token_ids) for output in outputs for c in output.outputs)
    details = answers.PromptTokensDetails(sum(cached))
    return answers.Usage(num_prompt, num_generated, num_prompt + num_generated, details)


def cached_tokens(outputs: Sequence[RequestOutput]) -> list[int]:
    """Of each prompt, the tokens that its first completion found in the prefix cache."""
    first = [output.outputs[0].metrics for output in outputs]
    return [metrics.num_cached_tokens if metrics else 0 for metrics in first]


def timings(outputs: Sequence[RequestOutput]) -> answers.Timings:
    """The first completion's times in llama.cpp's names and milliseconds."""
    metrics = outputs[0].outputs[0].metrics
    assert metrics is not None, "timings are of finished requests"
    decode = max(metrics.total_time - metrics.time_to_first_token, 1e-9)
    num_decoded = metrics.num_generated_tokens - 1  # the first one belongs to the prompt's time
    return answers.Timings(
        prompt_n=metrics.num_prompt_tokens - metrics.num_cached_tokens,
        prompt_ms=round(1000 * (metrics.time_to_first_token - metrics.queue_time), 3),
        predicted_n=metrics.num_generated_tokens,
        predicted_ms=round(1000 * decode, 3),
        predicted_per_second=round(num_decoded / decode, 3),
        cache_n=metrics.num_cached_tokens,
    )


def _sampling_defaults(generation: dict[str, Any]) -> dict[str, Any]:
    """The model's own recommendation (generation_config.json); do_sample false is greedy."""
    if generation.get("do_sample") is False:
        return {"temperature": 0.0}
    return recommended(generation, SAMPLING_DEFAULTS)
