# SPDX-License-Identifier: Apache-2.0
"""The largest step that an engine's configuration allows; the scratch memory and launch plans that follow."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from . import compat, envs
from .kernels import layout
from .kernels.plan import DecodePlan, decode_plan, decode_plans
from .kernels.select import FEW_TOKENS
from .kernels.sparse_plan import CONVERTED_ROWS_OF_TOKEN, SparsePlan, sparse_plan

_INVARIANT_WORKSPACE_BYTES = 1 << 30
_WARM_UP_REQUESTS = 64
"""Beside one request: enough for the launch shape that `combine` takes for many output rows."""


def cache_format_name(kv_cache_dtype: str, model_dtype: torch.dtype) -> str:
    """The name in `layout` of vLLM's --kv-cache-dtype for a model of `model_dtype`."""
    if kv_cache_dtype.startswith("fp8"):
        return "fp8_ds_mla" if kv_cache_dtype == "fp8_ds_mla" else "fp8"
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    return {"bfloat16": "bf16", "float16": "fp16"}.get(kv_cache_dtype) or names[model_dtype]


@dataclasses.dataclass(frozen=True)
class DecodeLimits:
    """The largest decode of one kind of layer, and what follows from it: plans and scratch memory.

    Attributes:
        requests: most requests of a step.
        query_len: most new tokens of a request that are decoded at once.
        max_seq_len: most keys of a request.
        heads: query heads, after the gather of decode context parallelism.
        dtype: of the model, and so of the query.
        cache_format: a name of `layout`.
        batch_invariant: whether a request's splits may depend on its own length only.
        fp8_mma: VLLM_FUSEDMLA_FP8_MMA.
        portable: whether VLLM_FUSEDMLA_KERNEL asks for the portable kernel.
    """

    requests: int
    query_len: int
    max_seq_len: int
    heads: int
    dtype: torch.dtype
    cache_format: str
    batch_invariant: bool
    fp8_mma: bool = False
    portable: bool = False

    @classmethod
    def of(cls, vllm_config: Any, heads: int, kv_cache_dtype: str, decode_threshold: int) -> DecodeLimits:
        """For a layer with `heads` query heads in the current process, given the engine's configuration."""
        captured = vllm_config.compilation_config.max_cudagraph_capture_size or 0
        return cls(
            requests=max(vllm_config.scheduler_config.max_num_seqs, captured),
            query_len=max(decode_threshold, compat.max_decode_query_len(vllm_config)),
            max_seq_len=vllm_config.model_config.max_model_len,
            heads=heads,
            dtype=vllm_config.model_config.dtype,
            cache_format=cache_format_name(kv_cache_dtype, vllm_config.model_config.dtype),
            batch_invariant=compat.batch_invariant(),
            fp8_mma=envs.VLLM_FUSEDMLA_FP8_MMA,
            portable=envs.VLLM_FUSEDMLA_KERNEL == "portable",
        )

    def plan(self, s_q: int, device: torch.device, tiles: int | None = None) -> DecodePlan:
        """The launch plan for `s_q` tokens a request and, if given, that many KV tiles; equal for equal arguments."""
        return self._fitted(decode_plan(*self._shape(s_q, device), tiles=tiles), s_q)

    def plans(self, s_q: int, device: torch.device) -> set[DecodePlan]:
        """Every plan for `s_q` tokens a request."""
        return {self._fitted(plan, s_q) for plan in decode_plans(*self._shape(s_q, device))}

    def _shape(self, s_q: int, device: torch.device) -> tuple[int, int, str, torch.device, bool, bool, bool]:
        return s_q, self.heads, self.cache_format, device, self.batch_invariant, self.fp8_mma, self.portable

    def _fitted(self, plan: DecodePlan, s_q: int) -> DecodePlan:
        if not self.batch_invariant:
            return plan
        # Splits may depend on the engine's limits, never on the batch; this many always fit the scratch memory.
        split_bytes = 4 * self.requests * s_q * self.heads * (layout.D_V + 1)
        splits = max(1, min(plan.params.max_splits, _INVARIANT_WORKSPACE_BYTES // split_bytes))
        return dataclasses.replace(plan, params=dataclasses.replace(plan.params, max_splits=splits))

    def reserve_workspace(self, device: torch.device) -> None:
        """Grow vLLM's scratch memory to what any step may need, so that it is in place before profiling and capture."""
        plans = [(plan, s_q) for s_q in range(1, self.query_len + 1) for plan in self.plans(s_q, device)]
        shapes = [plan.workspace_shapes(self.requests, s_q, self.heads) for plan, s_q in plans]
        largest = max(shapes, key=lambda pair: pair[0][0] * pair[0][1])
        compat.shared_workspace([(shape, torch.float32) for shape in largest])

    def warm_up(self, page_size: int, device: torch.device) -> None:
        """Compile or load the kernels for every number of tokens a request, on requests without keys.

        vLLM's own warm-up decodes one token a request, or as many as speculation verifies; a short prompt of another
        length would otherwise wait for a compiler while the server runs.
        """
        from .kernels.dense_decode import mla_decode

        # As wide as vLLM makes it: whether 16 divides the width is part of what Triton compiles for.
        table_width = -(-self.max_seq_len // page_size)
        token = layout.pack_rows(torch.zeros(1, layout.D_QK, device=device), self.cache_format)
        cache = token.new_empty(1, page_size, token.shape[1])
        for s_q in range(1, self.query_len + 1):
            for b in {1, min(self.requests, _WARM_UP_REQUESTS)}:
                q = torch.zeros(b, s_q, self.heads, layout.D_QK, dtype=self.dtype, device=device)
                table = torch.zeros(b, table_width, dtype=torch.int32, device=device)
                lens, scale = torch.zeros(b, dtype=torch.int32, device=device), torch.ones((), device=device)
                for plan in self.plans(s_q, device):
                    mla_decode(q, cache, table, lens, k_scale=scale, plan=plan)


@dataclasses.dataclass(frozen=True)
class SparseLimits:
    """The largest step of sparse layers, and what follows from it: plans and scratch memory.

    Attributes:
        tokens: most tokens of a step.
        decode_tokens: most tokens of a step's decodes.
        query_lens: new tokens of a request for which there is a kernel that reads block tables: one, and what
            speculation verifies. Short prompts of other lengths are decoded by slots.
        heads: query heads, after the gather of decode context parallelism.
        topk: keys that the indexer picks for a token.
        max_seq_len: most keys of a request.
        dtype: of the model, and so of the query.
        cache_format: a name of `layout`.
        batch_invariant: whether the splits of a token's keys may depend on their number only.
        portable: whether VLLM_FUSEDMLA_KERNEL asks for the portable kernel.
    """

    tokens: int
    decode_tokens: int
    query_lens: tuple[int, ...]
    heads: int
    topk: int
    max_seq_len: int
    dtype: torch.dtype
    cache_format: str
    batch_invariant: bool
    portable: bool = False

    @classmethod
    def of(cls, vllm_config: Any, heads: int, kv_cache_dtype: str) -> SparseLimits:
        """For a layer with `heads` query heads, given the engine's configuration."""
        dense = DecodeLimits.of(vllm_config, heads, kv_cache_dtype, decode_threshold())
        decode_tokens = dense.requests * dense.query_len
        return cls(
            tokens=max(vllm_config.scheduler_config.max_num_batched_tokens, decode_tokens),
            decode_tokens=decode_tokens,
            query_lens=tuple(sorted({1, compat.max_decode_query_len(vllm_config)})),
            heads=heads,
            topk=vllm_config.model_config.hf_text_config.index_topk,
            max_seq_len=dense.max_seq_len,
            dtype=dense.dtype,
            cache_format=dense.cache_format,
            batch_invariant=dense.batch_invariant,
            portable=dense.portable,
        )

    def plan(self, device: torch.device, prefill: bool = False, tokens: int | None = None) -> SparsePlan:
        """The launch plan of a step's decodes, or of its prefills; an equal one at every call with equal arguments.

        Args:
            device: of the launch.
            prefill: whether it is one of prefills.
            tokens: query tokens of the launch; without them the plan is one for many.
        """
        plan = sparse_plan(self.heads, self.cache_format, device, self.batch_invariant, prefill, self.portable, tokens)
        if not self.batch_invariant:
            return plan
        # As for dense decodes: the splits may depend on the engine's limits, never on the batch.
        split_bytes = 4 * self.decode_tokens * self.heads * (layout.D_V + 1)
        splits = max(1, min(plan.params.max_splits, _INVARIANT_WORKSPACE_BYTES // split_bytes))
        return dataclasses.replace(plan, params=dataclasses.replace(plan.params, max_splits=splits))

    def plan_converted(self, device: torch.device) -> SparsePlan:
        """The launch plan of a prefill on keys that have been converted to bfloat16: `SparsePlan.converts`."""
        return sparse_plan(self.heads, "bf16", device, prefill=True)

    def workspace_shapes(self, plan: SparsePlan, tokens: int) -> tuple[tuple[int, ...], ...]:
        """Shapes of the scratch tensors that a launch for `tokens` tokens needs."""
        return plan.launch_shapes(tokens, self.topk, self.heads)

    def reserve_workspace(self, device: torch.device) -> None:
        """Grow vLLM's scratch memory to what any step may need, so that it is in place before profiling and capture."""
        slots, *_ = self.plan(device).workspace_shapes(self.decode_tokens, 1, self.heads)
        few = [self.workspace_shapes(self.plan(device, tokens=n), n)[0][0] for n in range(1, FEW_TOKENS + 1)]
        shapes = SparsePlan.shapes_for(max(slots[0], *few), self.tokens, self.heads)
        rows = min(self.max_seq_len, CONVERTED_ROWS_OF_TOKEN * self.tokens)
        if not self.plan(device, prefill=True).converts(self.cache_format, self.tokens, rows):
            rows = 0
        parts = [(shape, torch.float32) for shape in shapes]
        compat.shared_workspace([*parts, ((rows, layout.D_QK), torch.bfloat16)])

    def warm_up(self, page_size: int, device: torch.device) -> None:
        """Compile or load the kernels for lists of no keys: by positions and by slots, for one request and for many."""
        from .kernels.sparse_convert import rows_to_bfloat16
        from .kernels.sparse_decode import mla_sparse_decode

        table_width = -(-self.max_seq_len // page_size)
        token = layout.pack_rows(torch.zeros(1, layout.D_QK, device=device), self.cache_format)
        cache = token.new_empty(1, page_size, token.shape[1])
        requests = (*range(1, FEW_TOKENS + 1), _WARM_UP_REQUESTS)
        shapes = [(b, s_q, True) for s_q in self.query_lens for b in requests]
        for b, s_q, by_position in [*shapes, *((b, 1, False) for b in requests)]:
            q = torch.zeros(b, s_q, self.heads, layout.D_QK, dtype=self.dtype, device=device)
            indices = torch.full((b, s_q, self.topk), -1, dtype=torch.int32, device=device)
            table = torch.zeros(b, table_width, dtype=torch.int32, device=device) if by_position else None
            for prefill in {False, not by_position}:  # prompts' keys are slots
                plan = self.plan(device, prefill, tokens=b * s_q)
                mla_sparse_decode(q, cache, indices, block_table=table, plan=plan)
                if prefill and plan.converts(self.cache_format, self.tokens, 1):
                    rows = rows_to_bfloat16(cache, indices[0, 0], 1)
                    mla_sparse_decode(q, rows.unsqueeze(1), indices, plan=self.plan_converted(device))


def decode_threshold() -> int:
    """Requests with up to this many new tokens are decoded, longer ones prefilled (metadata builder).

    In batch-invariant mode 1: whether a short prompt could be decoded depends on the other requests' lengths.
    """
    return 1 if compat.batch_invariant() else envs.VLLM_FUSEDMLA_DECODE_THRESHOLD
