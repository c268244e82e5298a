# SPDX-License-Identifier: Apache-2.0
"""FlashMLA: vLLM's build of it, and SGLang's in its place."""

from typing import Any

import torch

from benchmarks.cases import D_V
from benchmarks.inputs import Inputs
from benchmarks.providers.base import Q_SCALE_FP8, Prepared, Provider, Unavailable, fp8_query, need_page_64, version


class FlashMLA(Provider):
    """FlashMLA's Hopper kernels in vLLM's build, as vLLM's FLASHMLA backend calls them."""

    name = "flashmla"
    dtypes: tuple[str, ...] = ("bf16", "fp8")
    timed_schedule = False

    def load(self) -> str:
        try:
            from vllm.v1.attention.ops import flashmla
        except Exception as error:
            raise Unavailable(f"vLLM's FlashMLA does not import: {error}") from error
        available, reason = flashmla.is_flashmla_dense_supported()
        if not available:
            raise Unavailable(reason or "vLLM's build has no FlashMLA")
        self._ops = flashmla
        return version("vllm")

    def prepare(self, x: Inputs) -> Prepared:
        need_page_64(x)
        return self._prepare_fp8(x) if x.dtype == "fp8" else self._prepare_bf16(x)

    def _prepare_bf16(self, x: Inputs) -> Prepared:
        meta = self._ops.get_mla_metadata()[0]

        def call():
            # A fresh object makes the first use build its schedule on the device.
            chosen = self._ops.get_mla_metadata()[0] if self.timed_schedule else meta
            return self._decode(x, chosen)

        return Prepared(call, self._unpack, "timed" if self.timed_schedule else "prebuilt")

    def _decode(self, x: Inputs, meta: Any):
        return self._ops.flash_mla_with_kvcache(
            q=x.q,
            k_cache=x.cache.unsqueeze(-2),
            block_table=x.block_table,
            cache_seqlens=x.seq_lens,
            head_dim_v=D_V,
            tile_scheduler_metadata=meta,
            softmax_scale=x.sm_scale,
            causal=True,
            is_fp8_kvcache=False,
        )

    def _prepare_fp8(self, x: Inputs) -> Prepared:
        q, seen = fp8_query(x)
        q_scale = torch.tensor([Q_SCALE_FP8], dtype=torch.float32, device=q.device)
        k_scale = x.k_scale.reshape(1)
        prebuilt = self._fp8_metadata(x)

        def call():
            return self._decode_fp8(x, q, self._fp8_metadata(x) if self.timed_schedule else prebuilt, q_scale, k_scale)

        return Prepared(call, self._unpack, "timed" if self.timed_schedule else "prebuilt", q=seen, config="q e4m3")

    def _fp8_metadata(self, x: Inputs):
        return self._ops.get_mla_metadata_dense_fp8(x.seq_lens, x.case.s_q * x.case.h_q, 1)

    def _decode_fp8(self, x: Inputs, q: torch.Tensor, metadata: Any, q_scale: torch.Tensor, k_scale: torch.Tensor):
        return self._ops.flash_mla_with_kvcache_fp8(
            q=q,
            k_cache=x.cache.unsqueeze(-2),
            block_table=x.block_table,
            cache_seqlens=x.seq_lens,
            head_dim_v=D_V,
            tile_scheduler_metadata=metadata[0],
            num_splits=metadata[1],
            softmax_scale=x.sm_scale,
            causal=True,
            descale_q=q_scale,
            descale_k=k_scale,
        )

    @staticmethod
    def _unpack(result: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return result[0], result[1].transpose(1, 2)  # its lse is [b, h_q, s_q]


class FlashMLASchedule(FlashMLA):
    """FlashMLA with its schedule built inside the timed call."""

    name = "flashmla-schedule"
    timed_schedule = True


class SglFlashMLA(FlashMLA):
    """The same kernels from SGLang's fork (the wheel sgl-flash-mla), for machines without vLLM's CUDA build."""

    name = "sgl-flashmla"

    def load(self) -> str:
        try:
            import flash_mla
            from flash_mla.flash_mla_interface import FlashMLASchedMeta
        except Exception as error:
            raise Unavailable(f"sgl-flash-mla does not import: {error}") from error
        if not flash_mla.has_legacy():
            raise Unavailable("sgl-flash-mla was built without its Hopper kernels")
        if torch.cuda.get_device_capability()[0] != 9:
            raise Unavailable("sgl-flash-mla's dense kernels are for Hopper only")
        self._ops, self._meta = flash_mla, FlashMLASchedMeta
        return version("sgl-flash-mla")

    def _call(self, x: Inputs, q: torch.Tensor, meta: Any, **quantised: Any):
        return self._ops.flash_mla_with_kvcache(
            q,
            x.cache.unsqueeze(-2),
            x.block_table,
            x.seq_lens,
            D_V,
            meta,
            softmax_scale=x.sm_scale,
            causal=True,
            use_legacy=True,
            **quantised,
        )

    def _decode(self, x: Inputs, meta: Any):
        return self._call(x, x.q, meta)

    def _fp8_metadata(self, x: Inputs):
        return self._ops.get_mla_decoding_metadata(
            x.seq_lens, x.case.s_q * x.case.h_q, 1, is_fp8_kvcache=True, use_legacy=True
        )

    def _decode_fp8(self, x: Inputs, q: torch.Tensor, metadata: Any, q_scale: torch.Tensor, k_scale: torch.Tensor):
        meta = self._meta()
        meta.tile_scheduler_metadata, meta.num_splits = metadata
        return self._call(x, q, meta, is_fp8_kvcache=True, descale_q=q_scale, descale_k=k_scale)
