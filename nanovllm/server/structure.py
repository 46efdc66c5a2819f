"""What form a request asks its text to have: `response_format`, and what vLLM's users know.

Knows the fields; whether a form can be compiled is found by `grammar/`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from nanovllm.errors import InvalidRequestError
from nanovllm.grammar.compiler import GrammarCompiler
from nanovllm.server.errors import ApiError, invalid
from nanovllm.server.schemas import Request, ResponseFormat
from nanovllm.structured_output import ANY_TEXT, KINDS, StructuredOutput
from nanovllm.text.tokenizer import Tokenizer

COMPILE_SECONDS = 10.0  # that a request waits at most, for its turn as well
GUIDED = {f"guided_{kind}": kind for kind in ("json", "regex", "choice", "grammar")}


def asked_structure(request: Request) -> tuple[str, StructuredOutput] | None:
    """(the field that asks, what it asks for), or None for free text. Raises ApiError."""
    asked: dict[str, dict[str, Any]] = {}
    if request.response_format is not None:
        structure = _of_format(request.response_format)
        if structure is not None:
            asked["response_format"] = structure
    if request.structured_outputs is not None:
        given = {kind: getattr(request.structured_outputs, kind) for kind in KINDS}
        asked["structured_outputs"] = {k: v for k, v in given.items() if v not in (None, False)}
    for field, kind in GUIDED.items():
        if getattr(request, field) is not None:
            asked[field] = {kind: getattr(request, field)}
    if len(asked) > 1:
        names = ", ".join(asked)
        raise invalid(f"{names} contradict each other: one form at most", list(asked)[1])
    for field, values in asked.items():
        try:
            return field, StructuredOutput(**values)
        except InvalidRequestError as error:
            raise refused(field, error) from None
    return None


def refused(field: str, error: InvalidRequestError) -> ApiError:
    return invalid(f"{field}: {error}", field)


def _of_format(asked: ResponseFormat) -> dict[str, Any] | None:
    if asked.type == "text":
        return None
    if asked.type == "json_object":
        return {"json_object": True}
    if asked.type != "json_schema":
        raise invalid(
            "response_format.type must be text, json_object or json_schema, "
            f"got {asked.type[:50]!r}",
            "response_format.type",
        )
    if asked.json_schema is None or asked.json_schema.schema is None:
        where = "response_format.json_schema"
        where += ".schema" if asked.json_schema is not None else ""
        raise invalid(f"{where} is missing: a response_format of json_schema needs it", where)
    return {"json": asked.json_schema.schema}


class StructureCompiler:
    """Compiles on two threads of its own, so that nothing else waits; `close` ends them.

    The engine compiles again, for its own use; here it is found out whether that will succeed.
    """

    def __init__(self, tokenizer: Tokenizer, eos_token_ids: Sequence[int]) -> None:
        self._compiler = GrammarCompiler(tokenizer, len(tokenizer), eos_token_ids)
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="nanovllm-grammar")

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def warm_up(self) -> None:
        """Reads the tokenizer ahead of the first request, on one of the threads."""
        self._threads.submit(self._compiler, ANY_TEXT)

    async def check(self, field: str, structure: StructuredOutput) -> None:
        """Raises ApiError that names the field if the structure cannot be compiled in time."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(COMPILE_SECONDS):
                await loop.run_in_executor(self._threads, self._compiler, structure)
        except InvalidRequestError as error:
            raise refused(field, error) from None
        except TimeoutError:
            raise invalid(
                f"{field} could not be compiled within {COMPILE_SECONDS:g} s", field
            ) from None
