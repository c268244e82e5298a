# SPDX-License-Identifier: Apache-2.0
"""FlashMLA's sparse attention: vLLM's build of it as FLASHMLA_SPARSE calls it, and SGLang's in its place.

On `fp8_ds_mla` caches decoding takes the decode kernel, for 64 or 128 heads only. Prefill takes the same kernel for
fewer than 32 heads; for more, the request's rows are first converted to bf16 for the prefill kernel (both timed: it
is done in every layer). bf16 caches take the prefill kernel for everything. What is padded is padded beforehand.
"""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.cases import D_QK, D_V
from benchmarks.inputs import Inputs
from benchmarks.providers.base import Prepared, Provider, Unavailable, Unsupported, need_page_64, sparse_lists, version

_LEAST_HEADS_FOR_BF16_PREFILL = 32  # vLLM's MIN_HEADS_FOR_BF16_PREFILL


class SparseFlashMLA(Provider):
    """Heads padded to a multiple of 64, as in vLLM; decodes as a batch of `b` requests."""

    name = "flashmla"
    dtypes: tuple[str, ...] = ("bf16", "fp8_ds_mla")
    timed_schedule = False
    one_request = False
    extra: dict[str, Any] = {}  # noqa: RUF012 - arguments of SGLang's build

    def load(self) -> str:
        try:
            from vllm import _custom_ops
            from vllm.v1.attention.ops import flashmla
        except Exception as error:
            raise Unavailable(f"vLLM's FlashMLA does not import: {error}") from error
        available, reason = flashmla.is_flashmla_sparse_supported()
        if not available:
            raise Unavailable(reason or "vLLM's build has no FlashMLA")
        self._ops, self._to_bf16 = flashmla, _custom_ops.cp_gather_and_upconvert_fp8_kv_cache
        return version("vllm")

    def heads(self, h_q: int) -> int:
        """Heads of the prefill kernel's launch."""
        return -(-h_q // 64) * 64

    def prepare(self, x: Inputs) -> Prepared:
        if x.dtype == "bf16":
            return self._prefill_kernel(x, sparse_lists(x)[1], lambda: x.cache.view(-1, 1, D_QK))
        if x.case.prefill and x.case.h_q >= _LEAST_HEADS_FOR_BF16_PREFILL:
            return self._converted_prefill(x)
        return self._decode_kernel(x)

    def _decode_kernel(self, x: Inputs) -> Prepared:
        need_page_64(x)
        case, slots = x.case, sparse_lists(x)[1]
        if slots.shape[-1] % 64:
            raise Unsupported("topk a multiple of 64 only")
        heads = 64 if case.h_q <= 64 else 128
        batch = (1, case.b * case.s_q) if self.one_request else (case.b, case.s_q)
        q = padded(x.q, heads).view(*batch, heads, D_QK)
        indices = slots.view(*batch, -1)
        cache = x.cache.unsqueeze(-2)
        table = torch.empty(batch[0], 1, dtype=torch.int32, device=q.device)  # neither is looked at
        lens = torch.full((batch[0],), x.max_len, dtype=torch.int32, device=q.device)
        prebuilt = self._ops.get_mla_metadata()[0]

        def call():
            # A fresh object makes the first use build its schedule on the device.
            meta = self._ops.get_mla_metadata()[0] if self.timed_schedule else prebuilt
            return self._ops.flash_mla_with_kvcache(
                q=q,
                k_cache=cache,
                block_table=table,
                cache_seqlens=lens,
                head_dim_v=D_V,
                tile_scheduler_metadata=meta,
                softmax_scale=x.sm_scale,
                is_fp8_kvcache=True,
                indices=indices,
                **self.extra,
            )

        def unpack(result):
            out, lse = result[0], result[1].transpose(1, 2)  # its lse is [b, h_q, s_q]
            return self._cut(x, out, lse)

        schedule = "timed" if self.timed_schedule else "prebuilt"
        return Prepared(call, unpack, schedule, config=f"decode kernel, {heads} heads")

    def _converted_prefill(self, x: Inputs) -> Prepared:
        rows = torch.empty(x.max_len, D_QK, dtype=torch.bfloat16, device=x.q.device)
        starts = torch.zeros(1, dtype=torch.int32, device=x.q.device)

        def convert() -> torch.Tensor:
            self._to_bf16(x.cache, rows, x.block_table, starts, 1)
            return rows.unsqueeze(1)

        prepared = self._prefill_kernel(x, sparse_lists(x)[0], convert)
        prepared.config += ", rows converted to bf16"
        return prepared

    def _prefill_kernel(self, x: Inputs, indices: torch.Tensor, kv: Callable[[], torch.Tensor]) -> Prepared:
        if self.timed_schedule or self.one_request:
            raise Unsupported("the same as flashmla's: its prefill kernel has no schedule and no batch")
        tokens, topk = x.case.b * x.case.s_q, indices.shape[-1]
        if topk % 128:
            raise Unsupported("topk a multiple of 128 only")
        heads = self.heads(x.case.h_q)
        q = padded(x.q, heads).view(tokens, heads, D_QK)
        lists = indices.view(tokens, 1, -1)
        length = torch.full((tokens,), topk, dtype=torch.int32, device=q.device)

        def call():
            return self._ops.flash_mla_sparse_fwd(q, kv(), lists, x.sm_scale, topk_length=length, **self.extra)

        def unpack(result):
            return self._cut(x, result[0], result[2])

        return Prepared(call, unpack, "none", config=f"prefill kernel, {heads} heads")

    @staticmethod
    def _cut(x: Inputs, out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Results of the real heads."""
        case = x.case
        out, lse = out.reshape(case.b, case.s_q, -1, D_V), lse.reshape(case.b, case.s_q, -1)
        return out[:, :, : case.h_q], lse[:, :, : case.h_q]


class SparseFlashMLASchedule(SparseFlashMLA):
    """With its schedule built inside the timed call."""

    name = "flashmla-schedule"
    timed_schedule = True


class SparseFlashMLAMixed(SparseFlashMLA):
    """All tokens as one request's, which is how vLLM calls the decode kernel for fewer than 32 heads."""

    name = "flashmla-mixed"
    one_request = True

    def prepare(self, x: Inputs) -> Prepared:
        if x.case.b == 1:
            raise Unsupported("the same as flashmla's")
        return super().prepare(x)


class SparseFlashMLANative(SparseFlashMLA):
    """The prefill kernel with 8, 16 or 32 heads, which vLLM's build of 0.33 has but its backend pads."""

    name = "flashmla-native"

    def _decode_kernel(self, x: Inputs) -> Prepared:
        return self._converted_prefill(x)

    def prepare(self, x: Inputs) -> Prepared:
        if x.dtype != "bf16" and not x.case.prefill:
            raise Unsupported("the same as flashmla's")
        return super().prepare(x)

    def heads(self, h_q: int) -> int:
        if h_q not in (8, 16, 32):
            raise Unsupported("the same as flashmla's")
        return h_q


class SparseSglFlashMLA(SparseFlashMLA):
    """The same kernels from SGLang's fork (the wheel sgl-flash-mla), for machines without vLLM's CUDA build."""

    name = "sgl-flashmla"
    extra = {"use_legacy": True}  # noqa: RUF012

    def load(self) -> str:
        try:
            import flash_mla
        except Exception as error:
            raise Unavailable(f"sgl-flash-mla does not import: {error}") from error
        if not flash_mla.has_legacy():
            raise Unavailable("sgl-flash-mla was built without its Hopper kernels")
        self._ops, self._to_bf16 = flash_mla, _no_conversion
        return version("sgl-flash-mla")


def _no_conversion(*arguments: Any) -> None:
    raise Unsupported("sgl-flash-mla does not convert fp8_ds_mla caches")


def padded(q: torch.Tensor, heads: int) -> torch.Tensor:
    """``[b, s_q, heads, 576]``: the query and zeros."""
    return torch.nn.functional.pad(q, (0, 0, 0, heads - q.shape[2])).contiguous()
