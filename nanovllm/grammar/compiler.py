"""Structured output to token constraints, with the llguidance library.

Compiles within limits of size and time, keeps what was compiled, and hands out a constraint for
each sequence. What cannot be compiled is an InvalidRequestError that says why. Knows no requests
and no tensors; llguidance is imported with the first structure.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanovllm.errors import InvalidRequestError
from nanovllm.grammar.sources import grammar_source
from nanovllm.structured_output import StructuredOutput
from nanovllm.text.tokenizer import Tokenizer

MAX_COMPILE_SECONDS = 1.0  # of one thread's time, the first masks included
MAX_MASK_SECONDS = 0.1  # every row of a step waits for the slowest mask
CACHED_STRUCTURES = 256
PROBE_TOKENS = 16  # masks that compiling looks at, beside the first
MAX_REASON = 300
LIMITS = {
    "initial_lexer_fuel": 500_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 20_000,
    "max_items_in_row": 1000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}


class GrammarConstraint:
    """What may follow in one sequence. The end tokens may once the structure is complete."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def fill_mask(self, row: NDArray[np.int32]) -> None:
        """Sets bit i % 32 of row[i // 32] for every token id i that may come next.

        Raises InvalidRequestError if the structure has become too complex to go on.
        """
        began = time.thread_time()
        self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        if self._matcher.is_error():
            raise InvalidRequestError(_reason(self._matcher.get_error()))
        seconds = time.thread_time() - began
        if seconds > MAX_MASK_SECONDS:
            raise InvalidRequestError(
                f"a mask took {seconds:.2f} s; {MAX_MASK_SECONDS:g} s are allowed"
            )

    def accept(self, token_ids: Sequence[int]) -> None:
        """Takes tokens that were chosen. One that was not allowed makes the next mask raise."""
        self._matcher.consume_tokens(list(token_ids))

    def rewind(self, num_tokens: int) -> None:
        """Takes the last tokens back."""
        self._matcher.rollback(num_tokens)

    def copy(self) -> GrammarConstraint:
        """Another one in the same state; both share what was found out about the grammar."""
        return GrammarConstraint(self._matcher.deep_copy())


@dataclass(frozen=True, slots=True)
class _Failure:
    reason: str


class GrammarCompiler:
    """Makes constraints for one tokenizer. Any thread may call it.

    The tokenizer is read once, with the first structure. vocab_size is the model's, which may
    be larger than the tokenizer's; eos_token_ids end a text.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._own = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._tokenizer: Any = None
        self._loading = threading.Lock()
        self._cache: OrderedDict[StructuredOutput, GrammarConstraint | _Failure] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, structure: StructuredOutput) -> GrammarConstraint:
        """A constraint in its first state. Raises InvalidRequestError if there can be none."""
        with self._lock:
            found = self._cache.get(structure)
            if found is not None:
                self._cache.move_to_end(structure)
        if found is None:
            found = self._compile(structure)
            with self._lock:
                self._cache[structure] = found
                if len(self._cache) > CACHED_STRUCTURES:
                    self._cache.popitem(last=False)
        if isinstance(found, _Failure):
            raise InvalidRequestError(
                f"{structure.kind} of the structured output cannot be compiled: {found.reason}"
            )
        return found.copy()

    def _compile(self, structure: StructuredOutput) -> GrammarConstraint | _Failure:
        llguidance = _library()
        tokenizer = self._load(llguidance)
        began = time.thread_time()
        try:
            source = grammar_source(structure, self._own.token_id)
        except (ValueError, RecursionError) as error:
            return _Failure(_reason(str(error) or "it is nested too deeply"))
        limits = llguidance.LLParserLimits(**LIMITS)
        matcher = llguidance.LLMatcher(tokenizer, source, log_level=0, limits=limits)
        if matcher.is_error():
            return _Failure(_reason(matcher.get_error()))
        try:
            self._probe(matcher)
        except InvalidRequestError as error:
            return _Failure(str(error))
        seconds = time.thread_time() - began
        if seconds > MAX_COMPILE_SECONDS:
            return _Failure(f"it took {seconds:.1f} s; {MAX_COMPILE_SECONDS:g} s are allowed")
        return GrammarConstraint(matcher)

    def _probe(self, matcher: Any) -> None:
        """Walks along some text of the grammar: a mask that is slow is slow here, not in a step.

        It also fills the caches that all copies share.
        """
        # The first mask may take longer: it prepares what the others use.
        matcher.compute_bitmask()
        probe = GrammarConstraint(matcher.deep_copy())
        row = np.zeros((self._vocab_size + 31) // 32, np.int32)
        for step in range(PROBE_TOKENS):
            probe.fill_mask(row)
            bits = np.unpackbits(row.view(np.uint8), bitorder="little")
            bits[self._eos_token_ids] = 0
            allowed = np.flatnonzero(bits)
            if not len(allowed):
                return
            probe.accept([int(allowed[step * 7919 % len(allowed)])])

    def _load(self, llguidance: Any) -> Any:
        with self._loading:
            if self._tokenizer is None:
                if not self._eos_token_ids:
                    raise InvalidRequestError(
                        "structured output needs an end token, and this model names none"
                    )
                try:
                    self._tokenizer = llguidance.LLTokenizer(
                        self._own.to_json(), self._vocab_size, self._eos_token_ids
                    )
                except ValueError as error:
                    raise InvalidRequestError(
                        f"structured output cannot use this tokenizer: {_reason(str(error))}"
                    ) from None
            return self._tokenizer


def _library() -> Any:
    try:
        import llguidance._lib  # optional
    except ImportError:
        raise InvalidRequestError(
            "structured output needs llguidance: pip install 'nanovllm[grammar]'"
        ) from None
    return llguidance._lib


def _reason(text: str) -> str:
    """A library's message as one line."""
    line = " ".join(text.split())
    return line if len(line) <= MAX_REASON else line[:MAX_REASON] + "..."
