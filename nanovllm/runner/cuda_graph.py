"""Keeps CUDA graphs by key: the first run of a key is eager, then it is captured, then replayed."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch

# Rows a captured step may have; a step is padded up to the next of these.
SMALL_BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128)
BUCKET_STEP = 32  # above the small ones


def bucket_of(num_rows: int) -> int:
    """The least bucket that holds num_rows."""
    for size in SMALL_BUCKETS:
        if num_rows <= size:
            return size
    return -(-num_rows // BUCKET_STEP) * BUCKET_STEP


# Tokens that a captured step of longer rows may have; more keep the GPU busy without a graph.
TOKEN_BUCKETS = (16, 32, 64, 96, 128, 192, 256, 384, 512, 640, 768, 1024, 1280, 1536, 2048)
MAX_ROWS_WITH_TOKENS = 4  # more rows have too many combinations to be met again


def token_bucket_of(num_tokens: int, num_rows: int) -> tuple[int, int] | None:
    """(tokens, rows) of the graph for a step in which some row has several tokens, if any."""
    if num_tokens <= num_rows or num_tokens > TOKEN_BUCKETS[-1] or num_rows > MAX_ROWS_WITH_TOKENS:
        return None
    return next(size for size in TOKEN_BUCKETS if num_tokens <= size), bucket_of(num_rows)


class GraphCache:
    """All graphs share one memory pool: they run one after another on one stream.

    A capture that runs out of memory is given up: that key stays eager.
    """

    def __init__(self, device: torch.device) -> None:
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def run(self, key: Hashable, step: Callable[[], None]) -> None:
        """Runs `step`, whose launches and addresses must depend on `key` alone."""
        if key in self._graphs:
            graph = self._graphs[key]
            if graph is not None:
                graph.replay()
            else:
                step()
            return
        step()
        self._graphs[key] = self._capture(step)

    def _capture(self, step: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):
            # Other threads may wait for events meanwhile.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                step()
            except torch.OutOfMemoryError:
                if not any(self._graphs.values()):
                    # The pool ends with its only graph, and torch takes no ended one again.
                    self._pool = torch.cuda.graph_pool_handle()
                return None
            finally:
                graph.capture_end()
        return graph
