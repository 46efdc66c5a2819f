"""A progress bar over prompts, with the speed of prompt and output tokens."""

from __future__ import annotations

from typing import Self

from tqdm import tqdm

from nanovllm.outputs import Delta, RequestOutput


class NullProgress:
    """Shows nothing: an idle bar would delay the first step."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, deltas: list[Delta], outputs: list[RequestOutput]) -> None:
        pass


class Progress(NullProgress):
    """Counts finished prompts; tokens a second are of the whole call so far."""

    def __init__(self, total: int) -> None:
        self._bar = tqdm(total=total, desc="Generating", dynamic_ncols=True)
        self._num_output = 0
        self._num_prompt = 0
        self._started: set[str] = set()

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, deltas: list[Delta], outputs: list[RequestOutput]) -> None:
        if self._bar.disable:  # by tqdm's environment variable
            return
        by_id = {output.request_id: output for output in outputs}
        for delta in deltas:
            output = by_id.get(delta.request_id)
            if output is None:
                continue
            self._num_output += len(delta.token_ids)
            if delta.request_id not in self._started:
                self._started.add(delta.request_id)
                self._num_prompt += len(output.prompt_token_ids)
        elapsed = max(self._bar.format_dict["elapsed"], 1e-9)
        self._bar.set_postfix_str(
            f"prefill {self._num_prompt / elapsed:.0f} tok/s, "
            f"decode {self._num_output / elapsed:.0f} tok/s",
            refresh=False,
        )
        self._bar.update(sum(output.finished for output in outputs) - self._bar.n)
