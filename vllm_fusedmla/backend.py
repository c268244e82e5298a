# SPDX-License-Identifier: Apache-2.0
"""vLLM's dense MLA backend FUSEDMLA: what it supports, and the decode of a layer.

vLLM's common MLA code does the projections, the prefill (with the platform's prefill backend), the cache write and the
combination across decode-context-parallel ranks. This package adds the decode: every layer of a step runs
`mla_decode`. The Hopper kernels divide the work themselves; for the portable kernel the metadata builder
(`metadata.py`) turns the sequence lengths into a tile schedule on the device, once a step. On the CPU platform the
PyTorch reference decodes.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from vllm.config import get_current_vllm_config, get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.model_executor.layers.attention.mla_attention import MLACommonBackend, MLACommonImpl
from vllm.platforms import current_platform
from vllm.v1.attention.backend import MultipleOf

from . import compat, envs
from .cache_update import StoresTokens
from .kernels import hopper, layout, reference
from .kernels.plan import DecodePlan
from .kernels.select import LARGEST_TILE, MAX_S_Q, select_decode
from .limits import DecodeLimits, cache_format_name, decode_threshold
from .metadata import FusedMLAMetadata, FusedMLAMetadataBuilder, decode_tokens, uses_reference
from .refusals import refuse_unsupported

logger = init_logger(f"vllm.{__name__}")

_KV_CACHE_DTYPES = ("auto", "bfloat16", "float16", "fp8", "fp8_e4m3", "fp8_ds_mla")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _hopper_kernels() -> bool:
    """Whether a Hopper GPU would decode with the kernels compiled for it."""
    return envs.VLLM_FUSEDMLA_KERNEL == "auto" and hopper.available()


class FusedMLABackend(MLACommonBackend):
    """What vLLM may ask of FUSEDMLA. Everything else is refused before the engine starts, with a reason."""

    # float32 on CPUs only, see supports_combination.
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = list(_KV_CACHE_DTYPES)

    @staticmethod
    def get_name() -> str:
        return "FUSEDMLA"

    @staticmethod
    def get_impl_cls() -> type[FusedMLAImpl]:
        return FusedMLAImpl

    @staticmethod
    def get_builder_cls() -> type[FusedMLAMetadataBuilder]:
        return FusedMLAMetadataBuilder

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return [layout.D_QK]

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(16)]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """Pages that hold a whole KV tile, so that a tile's addresses are one page and an offset (docs/performance.md).

        vLLM's default of 16 would do, at less speed; its CPU platform asks for 16 and ignores this.
        """
        return default_block_size if default_block_size % LARGEST_TILE == 0 else LARGEST_TILE

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return True

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        return capability is None or capability.major >= 8

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        # A step's requests must have equally many new tokens, and the host decides which have.
        return False

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
        **_later: Any,
    ) -> str | None:
        if kv_cache_dtype in ("bfloat16", "float16") and f"torch.{kv_cache_dtype}" != str(dtype):
            return f"a {kv_cache_dtype} KV cache needs a {kv_cache_dtype} model, not {_name(dtype)}"
        if kv_cache_dtype == "fp8_ds_mla" and dtype != torch.bfloat16:
            return f"an fp8_ds_mla KV cache, whose rope part is bfloat16, needs a bfloat16 model, not {_name(dtype)}"
        vllm_config = get_current_vllm_config_or_none()
        if kv_cache_dtype == "fp8_ds_mla" and vllm_config is not None and compat.fused_rope_writes_cache(vllm_config):
            return "vLLM's pass fuse_rope_kvcache_cat_mla cannot write an fp8_ds_mla KV cache, set it to false"
        longest = 1 if vllm_config is None else compat.max_decode_query_len(vllm_config)
        if longest > MAX_S_Q:
            return f"it decodes at most {MAX_S_Q} tokens a request, speculation asks for {longest}"
        if device_capability is None:
            return None if current_platform.is_cpu() else "it runs on NVIDIA GPUs and CPUs only"
        if not current_platform.is_cuda():
            return "it runs on NVIDIA GPUs and CPUs only"
        if dtype == torch.float32:
            return "float32 models are served on CPUs only, use --dtype bfloat16"
        try:
            arch = (device_capability.major, device_capability.minor)
            select_decode(arch, 1, cache_format_name(kv_cache_dtype or "auto", dtype), _hopper_kernels())
        except (KeyError, ValueError) as error:  # KeyError: a dtype without a cache format, refused by name elsewhere
            return str(error) if isinstance(error, ValueError) else None
        return None

    @classmethod
    def validate_configuration(cls, **config: Any) -> list[str]:  # type: ignore[override]
        """vLLM's reasons against a configuration, in words that name what was asked and what would work."""
        size, page, cache = config["head_size"], config["block_size"], config["kv_cache_dtype"]
        capability = config["device_capability"]
        version = capability.as_version_str() if capability is not None else "unknown"
        words = {
            "head_size not supported": f"head size {size} is not 576 (kv_lora_rank 512 + qk_rope_head_dim 64)",
            "dtype not supported": f"model dtype {_name(config['dtype'])} is not bfloat16 or float16",
            "kv_cache_dtype not supported": f"KV cache dtype {cache} is none of {', '.join(_KV_CACHE_DTYPES)}",
            "block_size not supported": f"page size (--block-size) {page} is not a multiple of 16",
            "compute capability not supported": f"compute capability {version} is below 8.0",
        }
        return [words.get(reason, reason) for reason in super().validate_configuration(**config)]


class FusedMLAImpl(StoresTokens, MLACommonImpl[FusedMLAMetadata]):
    """Decode of one layer. Prefill is the common code's."""

    can_return_lse_for_decode: bool = True
    lse_base_on_e: bool = True
    supports_dcp: bool = True
    supports_pcp: bool = False  # never tried

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
            **mla_args,
        )
        # The query stays in the model's dtype beside an fp8 cache; the kernels widen the cache, not narrow the query.
        self.supports_quant_query_input = False
        heads = num_heads * self.dcp_world_size
        refuse_unsupported(self, heads, alibi_slopes, sliding_window, logits_soft_cap, attn_type)
        self._vllm_config = get_current_vllm_config()
        self._log_kernel(heads)
        if not uses_reference() and not compat.workspace_hook_in_profile_run():
            self.reserve_workspace()

    def _log_kernel(self, heads: int) -> None:
        """One line a process: which kernel decodes one token a request, and why."""
        cache_format = cache_format_name(self.kv_cache_dtype, self._vllm_config.model_config.dtype)
        capability = None if uses_reference() else current_platform.get_device_capability()
        arch = capability and (capability.major, capability.minor)
        config = select_decode(arch, heads, cache_format, _hopper_kernels(), envs.VLLM_FUSEDMLA_FP8_MMA)
        reason = config.reason
        if envs.VLLM_FUSEDMLA_KERNEL != "auto" and not current_platform.is_cpu():
            reason = f"VLLM_FUSEDMLA_KERNEL={envs.VLLM_FUSEDMLA_KERNEL}"
        elif arch == (9, 0) and not hopper.available():
            reason += f"; {hopper.unavailable()}"
        logger.info_once("FUSEDMLA: dense MLA decode by the kernel '%s' (%s).", config.kernel, reason)

    @staticmethod
    def _log_first_decode(q: torch.Tensor, cache: torch.Tensor, plan: DecodePlan | None) -> None:
        """Evidence in a server's log that this backend computes its answers: the first tokens it decoded."""
        logger.info(
            "FUSEDMLA: first decode, [b, s_q, h_q] = %s in %s, KV cache %s in %s, %s.",
            list(q.shape[:3]),
            _name(q.dtype),
            list(cache.shape),
            _name(cache.dtype),
            "PyTorch reference" if plan is None else plan.config,
        )

    def reserve_workspace(self) -> None:
        """Claim the scratch memory of split requests (called by vLLM 0.33 in its memory profiling run)."""
        if uses_reference():
            return
        device = torch.device(current_platform.device_type, torch.accelerator.current_device_index())
        heads = self.num_heads * self.dcp_world_size
        DecodeLimits.of(self._vllm_config, heads, self.kv_cache_dtype, decode_threshold()).reserve_workspace(device)

    def forward_mqa(
        self,
        q: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        kv_c_and_k_pe_cache: torch.Tensor,
        attn_metadata: FusedMLAMetadata,
        layer: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of the step's decode tokens over the paged latent cache.

        Args:
            q: absorbed query ``[B, N, 512]`` and rope part ``[B, N, 64]`` with any strides, or one ``[B, N, 576]``
                (decode context parallelism); B is num_decodes x s_q, request-major.
            kv_c_and_k_pe_cache: ``[num_pages, page_size, 576]`` in the cache's dtype, for fp8_ds_mla
                ``[num_pages, page_size, 656]`` uint8.
            attn_metadata: of this step.
            layer: the MLAAttention layer, for its scales.

        Returns:
            out ``[B, N, 512]`` in q's dtype and lse ``[B, N]`` float32, natural logarithm; a padded request, of
            length 0, has out 0 and lse -inf.
        """
        decode = attn_metadata.decode
        assert decode is not None
        b = decode.seq_lens.shape[0]
        q_nope, q_rope = (part.unflatten(0, (b, -1)) for part in reference.split_query(q))
        if decode_tokens.tokens == 0:
            self._log_first_decode(q_nope, kv_c_and_k_pe_cache, decode.plan)
        decode_tokens.tokens += b * q_nope.shape[1]
        arguments = (q_nope, q_rope), kv_c_and_k_pe_cache, decode.block_table, decode.seq_lens
        options = {"sm_scale": self.scale, "causal": attn_metadata.causal, "k_scale": layer._k_scale}
        if decode.plan is None:
            out, lse = reference.mla_decode(*arguments, **options)
        else:
            from .kernels.dense_decode import mla_decode

            shapes = decode.plan.workspace_shapes(b, *q_nope.shape[1:3])
            workspace = compat.shared_workspace([(shape, torch.float32) for shape in shapes])
            out, lse = mla_decode(
                *arguments, **options, plan=decode.plan, schedule=decode.schedule, workspace=workspace
            )
        return out.flatten(0, 1), lse.flatten(0, 1)
