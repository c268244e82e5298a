# SPDX-License-Identifier: Apache-2.0
"""The kernels that are compared, behind one interface: `load` once, `prepare` a case, then time what it returns.

Split-KV kernels need a plan of which tiles go where. Whether building it is inside the timed call is a column of the
results (`schedule`): "timed", "prebuilt" on the device (what every layer but the first of a step sees), "host" (built
with a device synchronisation, so it cannot be inside), or "none".
"""

import dataclasses
import importlib.metadata
import os
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.cases import D_V
from benchmarks.inputs import Inputs

Q_SCALE_FP8 = 0.0137
"""Scale of an fp8 query, where a kernel needs one: 448 * 0.0137 = 6.1 standard deviations."""


class Unavailable(Exception):  # noqa: N818 - a state of the machine, not an error
    """The provider cannot run on this machine; the reason is the message."""


class Unsupported(Exception):  # noqa: N818
    """The provider does not take this case; the reason is the message."""


@dataclasses.dataclass
class Prepared:
    """A case ready to run.

    Attributes:
        call: runs the kernels on the current stream and returns what they wrote.
        unpack: turns that into out ``[b, s_q, h_q, 512]`` and lse ``[b, s_q, h_q]`` (natural logarithm).
        schedule: see the module.
        q: the query as the kernel sees it, if it quantises it; the reference must use the same.
        config: what the provider chose for this case, for the results.
    """

    call: Callable[[], Any]
    unpack: Callable[[Any], tuple[torch.Tensor, torch.Tensor]]
    schedule: str
    q: torch.Tensor | None = None
    config: str = ""


class Provider:
    """Base of all providers. `strict` ones are held to this project's tolerances, peers to looser ones."""

    name = ""
    dtypes: tuple[str, ...] = ("bf16",)
    strict = False

    def runs_on_cpu(self) -> bool:
        """Whether the provider runs without a GPU, for trying the program out."""
        return False

    def load(self) -> str:
        """Import what is needed; the version as text.

        Raises:
            Unavailable: it is not installed or does not run on this device.
        """
        raise NotImplementedError

    def prepare(self, x: Inputs) -> Prepared:
        """Everything but the timed call.

        Raises:
            Unsupported: the kernel does not take this case.
        """
        raise NotImplementedError


def version(*distributions: str) -> str:
    """Name and version of the first installed distribution."""
    for name in distributions:
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return distributions[0]


def _need_page_64(x: Inputs) -> None:
    if x.case.page_size != 64:
        raise Unsupported("page size 64 only")


def _flat(x: Inputs, out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Results over flattened query rows, [b * s_q, h_q, ...], as [b, s_q, h_q, ...]."""
    shape = (x.case.b, x.case.s_q, x.case.h_q)
    return out.view(*shape, D_V), lse.reshape(shape)


def _fp8_query(x: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """The query in e4m3, and the same values as a float tensor for the reference."""
    q = (x.q.float() / Q_SCALE_FP8).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    return q, q.float() * Q_SCALE_FP8


class FusedMLA(Provider):
    """This project's kernel: schedule, split-KV decode and combine."""

    name = "fusedmla"
    dtypes: tuple[str, ...] = ("bf16", "fp8")
    strict = True
    timed_schedule = True

    def runs_on_cpu(self) -> bool:
        return os.environ.get("TRITON_INTERPRET") == "1"

    def load(self) -> str:
        try:
            from vllm_fusedmla.kernels import dense_decode, plan, schedule
        except ImportError as error:
            raise Unavailable(f"vllm_fusedmla does not import: {error}") from error
        self._decode, self._plan, self._schedule = dense_decode, plan, schedule
        import vllm_fusedmla

        return f"vllm_fusedmla {vllm_fusedmla.__version__}"

    def prepare(self, x: Inputs) -> Prepared:
        case, device = x.case, x.q.device
        plan = self._plan.decode_plan(case.s_q, case.h_q, x.dtype, device)
        tiles = self._schedule.build_schedule(x.seq_lens, plan.params)
        shapes = plan.workspace_shapes(case.b, case.s_q, case.h_q)
        workspace = tuple(torch.empty(shape, dtype=torch.float32, device=device) for shape in shapes)
        out = torch.empty(case.b, case.s_q, case.h_q, D_V, dtype=x.q.dtype, device=device)
        lse = torch.empty(case.b, case.s_q, case.h_q, dtype=torch.float32, device=device)

        def call():
            if self.timed_schedule:
                self._schedule.build_schedule(x.seq_lens, plan.params, out=tiles)
            return self._decode.mla_decode(
                x.q,
                x.cache,
                x.block_table,
                x.seq_lens,
                sm_scale=x.sm_scale,
                k_scale=x.k_scale,
                plan=plan,
                schedule=tiles,
                workspace=workspace,
                out=out,
                lse=lse,
            )

        chosen = plan.config
        config = (
            f"{chosen.kernel} {chosen.block_h}x{chosen.block_n} warps {chosen.num_warps} stages {chosen.num_stages} "
            f"programs/SM {chosen.programs_per_sm}"
        )
        schedule = "timed" if self.timed_schedule else "prebuilt"
        return Prepared(call, lambda result: (result[0], result[1]), schedule, config=config)


class FusedMLANoSchedule(FusedMLA):
    """The same with the schedule built beforehand, as vLLM does once a step for all layers."""

    name = "fusedmla-noschedule"
    timed_schedule = False


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
        _need_page_64(x)
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
        q, seen = _fp8_query(x)
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

    def _decode(self, x: Inputs, meta: Any):
        return self._ops.flash_mla_with_kvcache(
            x.q,
            x.cache.unsqueeze(-2),
            x.block_table,
            x.seq_lens,
            D_V,
            meta,
            softmax_scale=x.sm_scale,
            causal=True,
            use_legacy=True,
        )

    def _fp8_metadata(self, x: Inputs):
        return self._ops.get_mla_decoding_metadata(
            x.seq_lens, x.case.s_q * x.case.h_q, 1, is_fp8_kvcache=True, use_legacy=True
        )

    def _decode_fp8(self, x: Inputs, q: torch.Tensor, metadata: Any, q_scale: torch.Tensor, k_scale: torch.Tensor):
        meta = self._meta()
        meta.tile_scheduler_metadata, meta.num_splits = metadata
        return self._ops.flash_mla_with_kvcache(
            q,
            x.cache.unsqueeze(-2),
            x.block_table,
            x.seq_lens,
            D_V,
            meta,
            softmax_scale=x.sm_scale,
            causal=True,
            is_fp8_kvcache=True,
            use_legacy=True,
            descale_q=q_scale,
            descale_k=k_scale,
        )


class FlashAttention3(Provider):
    """FlashAttention-3 with a separate value part of the query, as vLLM's FLASH_ATTN_MLA backend calls it.

    `max_splits` 0 lets FA3 choose the number of splits (vLLM without full CUDA graphs); 32 is vLLM's default bound
    with them.
    """

    name = "fa3"
    timed_schedule = False
    max_splits = 0

    def load(self) -> str:
        try:
            from vllm.v1.attention.backends import fa_utils

            if not fa_utils.flash_attn_supports_mla():
                raise Unavailable("vLLM's FlashAttention does not support MLA on this device")
            self._decode = fa_utils.flash_attn_varlen_func
            self._metadata = fa_utils.get_scheduler_metadata
        except Unavailable:
            raise
        except Exception as error:
            raise Unavailable(f"vLLM's FlashAttention does not import: {error}") from error
        return version("vllm")

    def prepare(self, x: Inputs) -> Prepared:
        case = x.case
        rows = x.q.view(case.b * case.s_q, case.h_q, -1)
        q_nope, q_rope = rows[..., :D_V].contiguous(), rows[..., D_V:].contiguous()
        latent, rope = x.cache[..., :D_V].unsqueeze(-2), x.cache[..., D_V:].unsqueeze(-2)
        starts = x.query_start()

        def build():
            return self._metadata(
                batch_size=case.b,
                max_seqlen_q=case.s_q,
                max_seqlen_k=x.max_len,
                num_heads_q=case.h_q,
                num_heads_kv=1,
                headdim=rope.shape[-1],
                cache_seqlens=x.seq_lens,
                qkv_dtype=x.q.dtype,
                headdim_v=D_V,
                page_size=case.page_size,
                cu_seqlens_q=starts,
                causal=True,
                num_splits=self.max_splits,
            )

        prebuilt = build()

        def call():
            return self._decode(
                q=q_rope,
                k=rope,
                v=latent,
                q_v=q_nope,
                max_seqlen_q=case.s_q,
                cu_seqlens_q=starts,
                max_seqlen_k=x.max_len,
                seqused_k=x.seq_lens,
                block_table=x.block_table,
                softmax_scale=x.sm_scale,
                causal=True,
                return_softmax_lse=True,
                fa_version=3,
                scheduler_metadata=build() if self.timed_schedule else prebuilt,
                num_splits=self.max_splits,
            )

        def unpack(result):
            return _flat(x, result[0], result[1].transpose(0, 1))  # its lse is [h_q, rows]

        return Prepared(call, unpack, "timed" if self.timed_schedule else "prebuilt")


class FlashAttention3Splits32(FlashAttention3):
    name = "fa3-splits32"
    max_splits = 32


class FlashAttention3Schedule(FlashAttention3):
    name = "fa3-schedule"
    timed_schedule = True


class FlashInfer(Provider):
    """FlashInfer's FA3 MLA kernels; an fp8 cache is converted to bf16 inside the kernel."""

    name = "flashinfer"
    dtypes: tuple[str, ...] = ("bf16", "fp8")
    _workspace: torch.Tensor | None = None

    def load(self) -> str:
        try:
            import flashinfer
            from flashinfer.mla import BatchMLAPagedAttentionWrapper, MLAPlanMetadata
        except Exception as error:
            raise Unavailable(f"flashinfer does not import: {error}") from error
        if torch.cuda.get_device_capability()[0] != 9:
            raise Unavailable("FlashInfer's fa3 backend is for Hopper only")
        self._wrapper, self._plan_metadata = BatchMLAPagedAttentionWrapper, MLAPlanMetadata
        return f"flashinfer {getattr(flashinfer, '__version__', '?')}"

    def prepare(self, x: Inputs) -> Prepared:
        case = x.case
        if self._workspace is None:
            self._workspace = torch.empty(256 << 20, dtype=torch.uint8, device=x.q.device)
        pages = case.pages()
        page_start = torch.tensor([0, *pages], dtype=torch.int32, device=x.q.device).cumsum(0, dtype=torch.int32)
        page_list = torch.cat([x.block_table[row, :count] for row, count in enumerate(pages)])
        wrapper = self._wrapper(self._workspace, backend="fa3")
        wrapper.plan(
            metadata=self._plan_metadata.csr(x.query_start(), page_start, page_list, x.seq_lens),
            num_heads=case.h_q,
            head_dim_ckv=D_V,
            head_dim_kpe=x.q.shape[-1] - D_V,
            page_size=case.page_size,
            causal=True,
            sm_scale=x.sm_scale,
            q_data_type=x.q.dtype,
            kv_data_type=x.cache.dtype,
            query_layout="split",
            kv_cache_layout="split",
            lse_mode="basee",
        )
        rows = x.q.view(case.b * case.s_q, case.h_q, -1)
        query = (rows[..., :D_V].contiguous(), rows[..., D_V:].contiguous())
        cache = (x.cache[..., :D_V], x.cache[..., D_V:])
        out = torch.empty_like(query[0])
        lse = torch.empty(rows.shape[:2], dtype=torch.float32, device=x.q.device)
        scales = {}
        if x.dtype == "fp8":
            scales = {"ckv_scale": float(x.k_scale), "kpe_scale": float(x.k_scale)}

        def call():
            return wrapper.run(
                query=query, kv_cache=cache, out=out, lse=lse, return_lse=True, return_lse_base_on_e=True, **scales
            )

        return Prepared(call, lambda result: _flat(x, result[0], result[1]), "host")


class TritonMLA(Provider):
    """vLLM's portable Triton kernel, as its TRITON_MLA backend calls it, with that backend's number of splits."""

    name = "triton_mla"
    dtypes: tuple[str, ...] = ("bf16", "fp8")

    def load(self) -> str:
        try:
            from vllm.v1.attention.backends.mla.triton_mla import _compute_num_kv_splits
            from vllm.v1.attention.ops.triton_decode_attention import decode_attention_fwd
        except Exception as error:
            raise Unavailable(f"vLLM's Triton MLA does not import: {error}") from error
        self._splits, self._decode = _compute_num_kv_splits, decode_attention_fwd
        return version("vllm")

    def prepare(self, x: Inputs) -> Prepared:
        case, device = x.case, x.q.device
        if case.h_q == 1:
            raise Unsupported("one head takes another kernel of vLLM's")
        rows = x.q.view(case.b * case.s_q, case.h_q, -1)
        splits = self._splits(x.max_len, torch.cuda.get_device_properties(device).multi_processor_count)
        partial = torch.empty(*rows.shape[:2], splits, D_V + 1, dtype=torch.float32, device=device)
        cache = x.cache.unsqueeze(2)

        def call():
            # The backend allocates and zeroes its results, and widens the block table for s_q > 1, in every layer.
            out = torch.zeros(*rows.shape[:2], D_V, dtype=x.q.dtype, device=device)
            lse = torch.zeros(rows.shape[:2], dtype=x.q.dtype, device=device)
            table, lens = x.block_table, x.seq_lens
            if case.s_q > 1:
                table = table.repeat_interleave(case.s_q, dim=0)
                offsets = torch.arange(1 - case.s_q, 1, device=device, dtype=lens.dtype)
                lens = (lens.unsqueeze(1) + offsets).flatten().clamp(min=0)
            self._decode(
                rows,
                cache,
                cache[..., :D_V],
                out,
                lse,
                table,
                lens,
                partial,
                splits,
                x.sm_scale,
                case.page_size,
                k_scale=x.k_scale,
                v_scale=x.k_scale,
                is_mla=True,
            )
            return out, lse

        return Prepared(call, lambda r: _flat(x, r[0], r[1].float()), "none", config=f"{splits} splits")


class Reference(Provider):
    """The eager PyTorch oracle. Slow; it exists so that the program can be tried without a GPU."""

    name = "reference"
    dtypes: tuple[str, ...] = ("bf16", "fp8")
    strict = True

    def runs_on_cpu(self) -> bool:
        return True

    def load(self) -> str:
        from vllm_fusedmla.kernels import reference

        self._decode = reference.mla_decode
        return f"torch {torch.__version__}"

    def prepare(self, x: Inputs) -> Prepared:
        def call():
            return self._decode(x.q, x.cache, x.block_table, x.seq_lens, sm_scale=x.sm_scale, k_scale=x.k_scale)

        return Prepared(call, lambda result: (result[0], result[1]), "none")


ALL: dict[str, type[Provider]] = {
    provider.name: provider
    for provider in (
        FusedMLA,
        FusedMLANoSchedule,
        FlashMLA,
        FlashMLASchedule,
        SglFlashMLA,
        FlashAttention3,
        FlashAttention3Splits32,
        FlashAttention3Schedule,
        FlashInfer,
        TritonMLA,
        Reference,
    )
}
DEFAULT = ("fusedmla", "fusedmla-noschedule", "flashmla", "fa3", "flashinfer", "triton_mla")
FALLBACKS = {"flashmla": "sgl-flashmla", "flashmla-schedule": "sgl-flashmla"}
"""What stands in for a provider that is not available."""
