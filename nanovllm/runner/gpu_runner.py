"""Executes plans on a CUDA device: fused kernels, device-side sampling, CUDA graphs.

Steps of single tokens replay a graph from the upload of lengths to the choice of tokens; all
others run the same kernels eagerly. Every row that samples goes through the same sampling kernel,
so a row's token does not depend on which path the step took.

Shape legend: T tokens, S rows of the step, L rows that sample, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanovllm.attention.base import AttentionBatch
from nanovllm.engine.plan import StepPlan
from nanovllm.kernels.gpu import sampling
from nanovllm.kernels.gpu.prepare import gather_tokens, prepare
from nanovllm.runner.cuda_graph import TOKEN_BUCKETS, GraphCache, bucket_of, token_bucket_of
from nanovllm.runner.gpu_forward import GpuForward
from nanovllm.runner.gpu_inputs import Layout, TokenInputs
from nanovllm.runner.gpu_invariant import InvariantForward
from nanovllm.runner.gpu_results import Extras, GpuPending, TokenTails
from nanovllm.runner.gpu_special import RowSampling, SpecialLines, SpecialRows
from nanovllm.runner.gpu_staging import Downloader, Uploader
from nanovllm.runner.model_runner import ModelRunner
from nanovllm.runner.step_memory import Pending

HEADER = 2  # words before the rows of a single-token step: columns of its tables, and padding
WORDS_PER_ROW = 8  # row, context, temperature, top-k, top-p, min-p, seed (2)


def _lines(samples: NDArray[np.bool_]) -> list[int]:
    """The lines of rows that sample, in order; -1 for the others."""
    return np.where(samples, samples.cumsum() - 1, -1).tolist()


class GpuModelRunner(ModelRunner):
    """ModelRunner for one CUDA device and the Triton attention backend.

    use_graphs: capture steps of single tokens. max_tokens: tokens of one step at most.
    batch_invariant: a token's bits do not depend on what is computed with it.
    """

    def __init__(
        self,
        model: Any,
        *,
        use_graphs: bool,
        max_tokens: int,
        batch_invariant: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(model, **options)
        pdl = torch.cuda.get_device_capability(self.device) >= (9, 0)
        if batch_invariant:
            self._forward: GpuForward = InvariantForward(model, self.rows.tokens.shape[1], pdl=pdl)
        else:
            self._forward = GpuForward(model, model.attention, pdl=pdl)
        num_rows, columns = self.rows.block_tables.shape
        size = bucket_of(num_rows)
        self._sampling = RowSampling(num_rows)
        self._special = SpecialRows(
            self.rows, self._sampling, options.get("stop_ids", ()), options["bad_words"]
        )
        self._kept: Tensor | None = None  # a step's logits, once some row needs them afterwards
        words = 5 * max(max_tokens, TOKEN_BUCKETS[-1]) + size * (WORDS_PER_ROW + columns)
        self._uploader = Uploader(words + 16 * size + 64, self.device)
        self._downloader = Downloader(2 * size)
        self._graphs = GraphCache(self.device) if use_graphs else None
        self._choice = torch.zeros(2 * size, dtype=torch.int64, device=self.device)
        self._workspace = sampling.Workspace(size, model.config.vocab_size, self.device)
        self._token_ids = torch.zeros(size, dtype=torch.int64, device=self.device)
        self._tables = torch.zeros((size, columns), dtype=torch.int32, device=self.device)
        self._cu_q_lens = torch.arange(size + 1, dtype=torch.int32, device=self.device)
        self._no_slots = torch.zeros(0, dtype=torch.int64, device=self.device)

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> Pending:
        """Runs one plan; plans must come in the order in which the scheduler made them."""
        with torch.cuda.device(self.device):
            self.rows.apply(plan)
            self._constraints.apply(plan)
            for new in plan.new_rows:
                self._sampling.start(new)
                self._special.start(new)
            try:
                self._copy_blocks(plan)
                return self._memory.run(plan, self._compute)
            finally:
                self.rows.advance(plan)

    def _compute(self, plan: StepPlan) -> GpuPending:
        ids = np.array([step.row for step in plan.rows], np.int64)
        single = all(step.num_tokens == 1 and step.sample for step in plan.rows)
        if single and len(ids):
            return self._single_tokens(plan, ids)
        return self._any_tokens(plan, ids)

    def _copy_blocks(self, plan: StepPlan) -> None:
        if plan.block_copies:
            sources, targets = (list(ids) for ids in zip(*plan.block_copies, strict=True))
            # torch indexes no 8-bit floats; their bytes will do.
            narrow = self.kv_cache.element_size() == 1
            cache = self.kv_cache.view(torch.uint8) if narrow else self.kv_cache
            cache[:, targets] = cache[:, sources]

    # --- steps of single tokens: one upload, one graph, one download -------------------------

    def _single_tokens(self, plan: StepPlan, ids: NDArray[np.int64]) -> GpuPending:
        size = bucket_of(len(ids))
        # The longest rows first: what the device starts last is then short, and all its parts
        # end at about the same time.
        order = np.argsort(-self.rows.num_computed[ids], kind="stable")
        lines = np.empty_like(order)
        lines[order] = np.arange(len(order))
        ids = ids[order]
        self._upload_single(ids, size)
        special = self._special_lines(ids)
        kept = self._keep_logits() if special.any else None

        def step() -> None:
            self._single_step(size, special.restricted, kept)

        if self._graphs is None:
            step()
        else:
            self._graphs.run((size, special.restricted, special.any), step)
        extras = self._choose_special(kept, special, size)
        download = self._downloader.send(self._choice[: 2 * size])
        return GpuPending(plan, download, size, lines.tolist(), extras)

    def _upload_single(self, ids: NDArray[np.int64], size: int) -> None:
        s, n = self._sampling, len(ids)
        words = self._uploader.begin()
        context = self.rows.num_computed[ids] + 1
        columns = -(-int(np.max(context)) // self.rows.block_size)
        words[0] = columns
        lines = words[HEADER : HEADER + WORDS_PER_ROW * size].reshape(WORDS_PER_ROW, size)
        lines[0, n:], lines[1, n:], lines[2, n:] = -1, 0, 0
        lines[0, :n], lines[1, :n] = ids, context
        lines[2, :n] = s.floats[0, ids].view(np.int32)
        lines[3, :n] = s.top_k[ids]
        lines[4, :n] = s.floats[1, ids].view(np.int32)
        lines[5, :n] = s.floats[2, ids].view(np.int32)
        lines[6:].reshape(-1).view(np.int64)[:n] = s.seed[ids]
        begin = HEADER + WORDS_PER_ROW * size
        end = begin + n * columns
        words[begin:end].reshape(n, columns)[:] = self.rows.block_tables[ids, :columns]
        self._uploader.send(end)

    def _single_step(self, size: int, restricted: bool, kept: Tensor | None) -> None:
        """Everything of a step that a graph can hold; reads the uploaded words."""
        words = self._uploader.device_words
        lines = words[HEADER : HEADER + WORDS_PER_ROW * size].view(WORDS_PER_ROW, size)
        rows, context = lines[0], lines[1]
        packed = words[HEADER + WORDS_PER_ROW * size :]
        tables = self._tables[:size]
        prepare(
            self.rows.tokens, rows, context, words[:1], packed, self._token_ids[:size], tables,
            self.rows.block_size,
        )  # fmt: skip
        batch = AttentionBatch(
            self._cu_q_lens[: size + 1], context, tables, self._no_slots, self._no_slots,
            1, self.rows.tokens.shape[1],
        )  # fmt: skip
        logits = self._forward.next_logits(self._token_ids[:size], batch, self.kv_cache)
        floats = lines.view(torch.float32)
        params = sampling.RowParams(
            temperature=floats[2],
            seed=lines[6:].view(-1).view(torch.int64),
            position=context,
            top_k=lines[3],
            top_p=floats[4],
            min_p=floats[5],
        )
        if kept is not None:
            kept[:size].copy_(logits)
        sampling.choose(
            logits, params, self._workspace, self._choice[:size],
            self._choice[size : 2 * size], restricted=restricted,
            scatter=(self.rows.tokens, rows),
        )  # fmt: skip

    # --- all other steps ---------------------------------------------------------------------

    def _any_tokens(self, plan: StepPlan, ids: NDArray[np.int64]) -> GpuPending:
        q_lens = np.array([step.num_tokens for step in plan.rows], np.int64)
        samples = np.array([step.sample for step in plan.rows], bool)
        prompts = self._wants_prompt_logprobs(ids)
        bucket = token_bucket_of(int(q_lens.sum()), len(ids))
        if self._graphs is not None and bucket is not None and not prompts:
            return self._captured_tokens(plan, ids, q_lens, samples, *bucket)
        special = self._special_lines(ids[samples])
        layout = Layout(int(q_lens.sum()), len(ids))
        self._upload_any(layout, ids, q_lens, samples)
        inputs = layout.views(self._uploader.device_words)
        context = int(np.max(self.rows.num_computed[ids] + q_lens))
        columns = -(-context // self.rows.block_size)
        batch = AttentionBatch(
            inputs.cu_q_lens, inputs.context_lens,
            inputs.tables[: len(ids) * columns].view(len(ids), columns), inputs.slots,
            inputs.positions, int(np.max(q_lens)), context, int(np.min(q_lens)),
        )  # fmt: skip
        residual = self._forward.hidden(self._gather(inputs), batch, self.kv_cache)
        prompt = {}
        if prompts:
            prompt = dict(self._prompt_logprobs(plan, self._forward.final_norm(residual)))
        if not samples.any():
            return GpuPending(plan, None, 0, _lines(samples), Extras(), prompt)
        n = int(samples.sum())
        logits = self._forward.logits(residual[inputs.last[:n]])
        self._choose_plain(logits, inputs, n, special.restricted)
        extras = self._choose_special(logits, special, n)
        download = self._downloader.send(self._choice[: 2 * n])
        return GpuPending(plan, download, n, _lines(samples), extras, prompt)

    def _captured_tokens(
        self,
        plan: StepPlan,
        ids: NDArray[np.int64],
        q_lens: NDArray[np.int64],
        samples: NDArray[np.bool_],
        num_tokens: int,
        num_rows: int,
    ) -> GpuPending:
        """A step of few rows, padded to num_tokens and num_rows; sampled or not as a whole."""
        assert self._graphs is not None
        layout = Layout(num_tokens, num_rows)
        self._upload_any(layout, ids, q_lens, samples)
        sampled = bool(samples.any())
        special = self._special_lines(ids[samples])
        kept = self._keep_logits() if special.any else None

        def step() -> None:
            inputs, tables = layout.views(self._uploader.device_words), self._tables[:num_rows]
            # Bounds instead of this step's own lengths: the launches must suit any step of the key.
            one = num_rows == 1
            batch = AttentionBatch(
                inputs.cu_q_lens, inputs.context_lens, tables, inputs.slots, inputs.positions,
                num_tokens if one else num_tokens - 1, self.rows.tokens.shape[1], 2 if one else 1,
            )  # fmt: skip
            prepare(
                self.rows.tokens, inputs.rows, inputs.context_lens, inputs.columns, inputs.tables,
                self._token_ids[:num_rows], tables, self.rows.block_size,
            )  # fmt: skip
            residual = self._forward.hidden(self._gather(inputs), batch, self.kv_cache)
            if sampled:
                logits = self._forward.logits(residual[inputs.last])
                if kept is not None:
                    kept[:num_rows].copy_(logits)
                self._choose_plain(logits, inputs, num_rows, special.restricted)

        key = (num_tokens, num_rows, sampled, special.restricted, special.any)
        self._graphs.run(key, step)
        if not sampled:
            return GpuPending(plan, None, 0, _lines(samples))
        extras = self._choose_special(kept, special, num_rows)
        download = self._downloader.send(self._choice[: 2 * num_rows])
        return GpuPending(plan, download, num_rows, _lines(samples), extras)

    def _gather(self, inputs: TokenInputs) -> Tensor:
        token_ids = torch.empty_like(inputs.positions)
        gather_tokens(
            self.rows.tokens, inputs.token_rows, inputs.positions, inputs.slots, token_ids
        )
        return token_ids

    def _upload_any(
        self,
        layout: Layout,
        ids: NDArray[np.int64],
        q_lens: NDArray[np.int64],
        samples: NDArray[np.bool_],
    ) -> None:
        words = self._uploader.begin()
        self._uploader.send(layout.pack(words, self.rows, self._sampling, ids, q_lens, samples))

    def _choose_plain(self, logits: Tensor, inputs: TokenInputs, n: int, restricted: bool) -> None:
        """Chooses for the first n lines, without the host's help."""
        sampling.choose(
            logits, inputs.params, self._workspace, self._choice[:n], self._choice[n : 2 * n],
            restricted=restricted, scatter=(self.rows.tokens, inputs.lines),
        )  # fmt: skip

    # --- rows that want more than a choice --------------------------------------------------------

    def _wants_prompt_logprobs(self, ids: NDArray[np.int64]) -> bool:
        """Whether a row that still computes its prompt reports on it."""
        asked = ids[self._sampling.prompt_logprobs[ids]]
        if not len(asked):  # as nearly always
            return False
        return bool((self.rows.num_computed[asked] < self.rows.num_prompt[asked]).any())

    def _special_lines(self, ids: NDArray[np.int64]) -> SpecialLines:
        """Of the rows [L] that sample, in the order of their lines; call before the step runs."""
        s = self._sampling
        if s.plain[ids].all():
            return SpecialLines(ids, ids[:0], ids[:0], restricted=False)
        changed = s.special(ids, self.rows.num_tokens[ids])
        wanted = s.num_logprobs[ids] >= 0
        restricted = bool((s.restricted[ids] & ~changed).any())
        structured, masks = ids[s.structured[ids]], None
        if len(structured):
            read = TokenTails(self.rows, structured).read
            masks = self._constraints.begin(ids[changed], self.rows.num_tokens, read)
        return SpecialLines(ids, changed.nonzero()[0], wanted.nonzero()[0], restricted, masks)

    def _keep_logits(self) -> Tensor:
        """Where a captured step leaves its logits [rows, V]; the same memory for all graphs."""
        if self._kept is None:
            shape = (len(self._token_ids), self.model.config.vocab_size)
            self._kept = torch.empty(shape, dtype=self._forward.dtype, device=self.device)
        return self._kept

    def _choose_special(self, logits: Tensor | None, special: SpecialLines, size: int) -> Extras:
        """After the plain choice, which it replaces for some lines."""
        if logits is None or not special.any:
            return Extras()
        choice = self._choice[: 2 * size].view(2, size)
        errors = self._special.choose(logits, special, choice) if len(special.changed) else {}
        wanted = len(special.wanted) > 0
        return Extras(self._special.logprobs(logits, special, choice) if wanted else None, errors)
