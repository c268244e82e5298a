# SPDX-License-Identifier: Apache-2.0
"""vLLM's backend FUSEDMLA for models with an indexer: DeepSeek sparse attention (DSA), decode and prefill.

The model's indexer picks at most `index_topk` keys for each token; attention sees only those. vLLM's common code does
the projections, the dense prefill of batches whose prompts are no longer than `index_topk`, and the combination across
ranks of decode context parallelism. Everything else, decode and long prompts, is one operator here: each token attends
to the keys that the indexer left in a buffer for it. On the CPU platform that operator and the indexer are PyTorch.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from vllm.config import get_current_vllm_config, get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.model_executor.layers.attention.sparse_mla_attention import SparseMLACommonImpl
from vllm.platforms import current_platform
from vllm.v1.attention.backend import MultipleOf

from . import compat, envs, plugin
from .backend import FusedMLABackend
from .cache_update import StoresTokens
from .kernels import layout, reference, sparse_reference
from .limits import SparseLimits
from .metadata import uses_reference
from .refusals import refuse_unsupported
from .sparse_metadata import (
    FusedMLASparseMetadata,
    FusedMLASparseMetadataBuilder,
    TokenGroup,
    cache_slots,
    local_positions,
    sparse_tokens,
    token_groups,
)

logger = init_logger(f"vllm.{__name__}")

_KV_CACHE_DTYPES = ("auto", "bfloat16", "float16", "fp8", "fp8_e4m3", "fp8_ds_mla")
_PAGE_MULTIPLE = 64
_TOPK_MULTIPLE = 64  # of vLLM's kernel that turns positions into slots


class FusedMLASparseBackend(FusedMLABackend):
    """What vLLM may ask of FUSEDMLA for a model with an indexer."""

    supported_kv_cache_dtypes: ClassVar[list[Any]] = list(_KV_CACHE_DTYPES)

    @staticmethod
    def get_impl_cls() -> type[FusedMLASparseImpl]:  # type: ignore[override]
        return FusedMLASparseImpl

    @staticmethod
    def get_builder_cls() -> type[FusedMLASparseMetadataBuilder]:  # type: ignore[override]
        return FusedMLASparseMetadataBuilder

    @classmethod
    def is_sparse(cls) -> bool:
        return True

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        # The indexer's cache shares the pages' size, and its kernels take 64 only.
        return [MultipleOf(_PAGE_MULTIPLE)]

    @classmethod
    def supports_combination(
        cls,
        head_size: int,
        dtype: torch.dtype,
        kv_cache_dtype: str | None,
        block_size: int | None,
        use_mla: bool,
        has_sink: bool,
        use_sparse: bool,
        use_mm_prefix: bool,
        device_capability: Any,
        **later: Any,
    ) -> str | None:
        # Here fp8 means fp8_ds_mla (plugin.py), which needs a bfloat16 model.
        cache = "fp8_ds_mla" if (kv_cache_dtype or "").startswith("fp8") else kv_cache_dtype
        asked = (head_size, dtype, cache, block_size, use_mla, has_sink, use_sparse, use_mm_prefix, device_capability)
        reason = super().supports_combination(*asked, **later)
        vllm_config = get_current_vllm_config_or_none()
        if reason is not None or vllm_config is None:
            return reason
        topk = getattr(vllm_config.model_config.hf_text_config, "index_topk", _TOPK_MULTIPLE)
        if device_capability is not None and topk % _TOPK_MULTIPLE:
            return f"index_topk {topk} is not a multiple of {_TOPK_MULTIPLE}"
        if device_capability is not None and device_capability.major == 10 and plugin.offers_indexer():
            return "VLLM_FUSEDMLA_INDEXER: this project's indexer cannot read the cache of compute capability 10"
        if getattr(vllm_config.attention_config, "hisparse_config", None) is not None:
            return "a KV cache in host memory (HiSparse) is not supported"
        if compat.batch_invariant() and not current_platform.is_cpu() and envs.VLLM_FUSEDMLA_INDEXER != "1":
            return "batch-invariant mode needs VLLM_FUSEDMLA_INDEXER=1, because the order of vLLM's top-k varies"
        return None

    @classmethod
    def validate_configuration(cls, **config: Any) -> list[str]:  # type: ignore[override]
        reasons = super().validate_configuration(**config)
        page = config["block_size"]
        words = {
            f"page size (--block-size) {page} is not a multiple of 16": (
                f"page size (--block-size) {page} is not a multiple of {_PAGE_MULTIPLE}, which sparse attention needs"
            ),
            "non-sparse not supported": "this layer is dense, and the class for sparse attention was asked",
        }
        return [words.get(reason, reason) for reason in reasons]


class _NoIndexGroup:
    """Stands for the buffers in which vLLM converts a top-k result once for all layers that share it.

    The operator here reads positions, so nothing is converted, and the buffers, megabytes a layer, are not allocated.
    """

    def register_layer(self, *args: Any, **kwargs: Any) -> tuple[None, int]:
        return None, 0


class FusedMLASparseImpl(StoresTokens, SparseMLACommonImpl[FusedMLASparseMetadata]):
    """Sparse attention of one layer."""

    can_return_lse_for_decode: bool = True
    lse_base_on_e: bool = True
    supports_dcp: bool = True
    supports_pcp: bool = False  # never tried
    supports_mtp_with_cp_non_trivial_interleave_size: bool = True

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None,
        attn_type: str,
        kv_sharing_target_layer_name: str | None,
        **mla_args: Any,
    ) -> None:
        super().__init__(
            num_heads,
            head_size,
            scale,
            num_kv_heads,
            alibi_slopes,
            sliding_window,
            kv_cache_dtype,
            logits_soft_cap,
            attn_type,
            kv_sharing_target_layer_name,
            **(mla_args | {"index_group_builder": _NoIndexGroup()}),
        )
        self.supports_quant_query_input = False
        self.masked_mha_available = False  # vLLM knows from which length on it pays beside its own backends only
        heads = num_heads * self.dcp_world_size
        more = {
            f"sparse attention on a {kv_cache_dtype} KV cache (fp8_ds_mla only)": kv_cache_dtype in ("fp8", "fp8_e4m3"),
            "a layer without the indexer's buffer": self.topk_indices_buffer is None,
        }
        refuse_unsupported(self, heads, alibi_slopes, sliding_window, logits_soft_cap, attn_type, more)
        vllm_config = get_current_vllm_config()
        self._interleave = vllm_config.parallel_config.cp_kv_cache_interleave_size
        self._limits = SparseLimits.of(vllm_config, heads, kv_cache_dtype)
        self._device = self.topk_indices_buffer.device
        if self._limits.batch_invariant:
            # Whether vLLM's dense prefill serves a prompt depends on the other prompts of the step.
            self.supports_dense_mha_prefill = False
        self._log_kernel()
        if current_platform.is_cpu():
            from . import indexer_cpu

            indexer_cpu.install()
        elif not uses_reference():
            # Not only where vLLM's profiling run asks for it: DeepSeek-V3.2's own layer does not ask.
            self.reserve_workspace()

    def reserve_workspace(self) -> None:
        """Claim the scratch memory of split lists of keys."""
        if not uses_reference():
            self._limits.reserve_workspace(self._device)

    def _log_kernel(self) -> None:
        """One line a process: which kernel attends, and why."""
        if uses_reference():
            kernel, reason = "reference", "PyTorch"
        else:
            config = self._limits.plan(self._device).config
            kernel, reason = config.kernel, config.reason
        logger.info_once(
            "FUSEDMLA: sparse MLA over the indexer's top %d by the kernel '%s' (%s).", self._limits.topk, kernel, reason
        )

    def forward_mqa(
        self,
        q: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        kv_c_and_k_pe_cache: torch.Tensor,
        attn_metadata: FusedMLASparseMetadata,
        layer: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of the step's decoded tokens, or of all its tokens, each over the keys that the indexer picked.

        Args:
            q: absorbed query ``[T, N, 512]`` and rope part ``[T, N, 64]`` with any strides, or one ``[T, N, 576]``
                (decode context parallelism).
            kv_c_and_k_pe_cache: ``[num_pages, page_size, 576]`` in the model's dtype, or for fp8_ds_mla
                ``[num_pages, page_size, 656]`` uint8.
            attn_metadata: of this step.
            layer: the MLAAttention layer, not used.

        Returns:
            out ``[T, N, 512]`` in q's dtype and lse ``[T, N]`` float32, natural logarithm; a token without keys on
            this rank has out 0 and lse -inf.
        """
        assert self.topk_indices_buffer is not None
        parts = reference.split_query(q)
        tokens, heads, _ = parts[0].shape
        indices = self.topk_indices_buffer[:tokens, : attn_metadata.topk_tokens]
        if self.dcp_world_size > 1:
            indices = local_positions(indices, self.dcp_world_size, self.dcp_rank, self._interleave)
        if sparse_tokens.tokens == 0:
            self._log_first(parts[0], kv_c_and_k_pe_cache, indices.shape[-1])
        sparse_tokens.tokens += tokens
        out = parts[0].new_empty(tokens, heads, layout.D_V)
        lse = torch.empty(tokens, heads, dtype=torch.float32, device=out.device)
        for group in token_groups(attn_metadata, tokens, self._converts):
            span = group.tokens
            entries = indices[span]
            if group.block_table is None:
                requests = attn_metadata.req_id_per_token[span]
                page_size = kv_c_and_k_pe_cache.shape[1]
                entries = cache_slots(entries, requests, attn_metadata.block_table, page_size)
            by_request = [t[span].unflatten(0, (-1, group.s_q)) for t in (*parts, out, lse)]
            self._attend(
                group,
                tuple(by_request[:2]),
                kv_c_and_k_pe_cache,
                entries.unflatten(0, (-1, group.s_q)),
                sm_scale=self.scale,
                out=by_request[2],
                lse=by_request[3],
            )
        return out, lse

    def _converts(self, tokens: int, keys: int) -> bool:
        """Whether a prompt's keys are converted to bfloat16 first."""
        if uses_reference() or self.dcp_world_size > 1:
            return False
        return self._limits.plan(self._device, prefill=True).converts(self._limits.cache_format, tokens, keys)

    def _attend(self, group: TokenGroup, q: Any, cache: torch.Tensor, indices: torch.Tensor, **options: Any) -> None:
        table = group.block_table
        if uses_reference():
            sparse_reference.mla_sparse_decode(q, cache, indices, block_table=table, **options)
            return
        from .kernels.sparse_decode import mla_sparse_decode

        tokens, limits = indices.shape[0] * indices.shape[1], self._limits
        plan = limits.plan_converted(cache.device) if group.keys else limits.plan(cache.device, group.prefill, tokens)
        parts: list[tuple[tuple[int, ...], torch.dtype]]
        parts = [(shape, torch.float32) for shape in limits.workspace_shapes(plan, tokens)]
        if group.keys:
            parts.append(((group.keys, layout.D_QK), torch.bfloat16))
        workspace = compat.shared_workspace(parts)
        if group.keys:  # the request's positions are slots of what they are converted to
            from .kernels.sparse_convert import rows_to_bfloat16

            assert table is not None
            logger.info_once("FUSEDMLA: long prompts are attended to on their keys converted to bfloat16.")
            converted = None if workspace is None else workspace[-1]
            cache, table = rows_to_bfloat16(cache, table[0], group.keys, converted).unsqueeze(1), None
        mla_sparse_decode(q, cache, indices, block_table=table, plan=plan, workspace=workspace, **options)

    @staticmethod
    def _log_first(q_nope: torch.Tensor, cache: torch.Tensor, topk: int) -> None:
        """Evidence in a server's log that this backend computes its answers: the first tokens it attended for."""
        logger.info(
            "FUSEDMLA: first sparse attention, [tokens, h_q] = %s in %s, top-k %d, KV cache %s in %s%s.",
            list(q_nope.shape[:2]),
            str(q_nope.dtype).removeprefix("torch."),
            topk,
            list(cache.shape),
            str(cache.dtype).removeprefix("torch."),
            ", PyTorch reference" if uses_reference() else "",
        )
