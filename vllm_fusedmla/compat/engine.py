# SPDX-License-Identifier: Apache-2.0
"""What vLLM's engine is asked for and its documented interfaces do not tell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def workspace_hook_in_profile_run() -> bool:
    """Whether vLLM asks every MLA impl to reserve its workspace during the memory profiling run.

    Reason: 0.33 added ``MLAAttentionImpl.reserve_workspace``; with 0.32 the impl reserves when it is constructed, which
    is before profiling too. Goes: when 0.32 leaves the supported range.
    """
    from vllm.v1.attention.backend import MLAAttentionImpl

    return hasattr(MLAAttentionImpl, "reserve_workspace")


def shared_workspace(shapes: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> tuple[torch.Tensor, ...] | None:
    """Tensors in vLLM's shared scratch memory, None where vLLM has not set it up (tests without a model runner).

    The memory is shared by all layers and valid until the next call; once vLLM has locked it, it does not grow.
    Reason: `vllm.v1.worker.workspace` is internal and has moved before. Goes: when it is a documented interface.
    """
    from vllm.v1.worker.workspace import current_workspace_manager, is_workspace_manager_initialized

    if not is_workspace_manager_initialized():
        return None
    return tuple(current_workspace_manager().get_simultaneous(*shapes))


def batch_invariant() -> bool:
    """Whether vLLM runs in batch-invariant mode (VLLM_BATCH_INVARIANT=1).

    Reason: older versions had a function for it, in another module. Goes: when it is part of vLLM's configuration.
    """
    import vllm.envs

    return bool(vllm.envs.VLLM_BATCH_INVARIANT)


def max_decode_query_len(vllm_config: Any) -> int:
    """Most tokens of one request in a decode step: 1, and with speculative decoding the drafts to verify.

    Reason: vLLM's function of this name sits beside the metadata builder and is internal. Goes: when it moves into
    the configuration.
    """
    from vllm.v1.attention.backend import max_decode_query_len

    return int(max_decode_query_len(vllm_config))


def fused_rope_writes_cache(vllm_config: Any) -> bool:
    """Whether vLLM's compiler replaces rotary embedding and cache write by one operator, which knows no fp8_ds_mla.

    Reason: the operator takes rows of 576 elements only and raises on others when the first batch runs. The pass is off
    by default, and on with Inductor's graph partition or without splitting at attention.
    Goes: when the operator writes fp8_ds_mla, or the pass leaves such layers out.
    """
    return bool(vllm_config.compilation_config.pass_config.fuse_rope_kvcache_cat_mla)


def is_sparse_model(vllm_config: Any) -> bool:
    """Whether the model's MLA layers have an indexer (DeepSeek-V3.2, GLM-5).

    Reason: vLLM's models decide by the first attribute of their configuration, each for itself. DeepSeek-V4 has it too,
    but not the second: it compresses keys otherwise and brings attention backends of its own.
    Goes: when it is a property of ModelConfig, as ``use_mla`` is.
    """
    text = None if vllm_config.model_config is None else vllm_config.model_config.hf_text_config
    return hasattr(text, "index_topk") and getattr(text, "kv_lora_rank", None) is not None


def use_fp8_ds_mla(vllm_config: Any) -> None:
    """Make ``--kv-cache-dtype fp8`` of a sparse model mean fp8_ds_mla.

    Reason: that is what users of FLASHMLA_SPARSE know, but vLLM asks for that backend by name. Here the whole
    configuration says it before any layer or worker reads it.
    Goes: when vLLM asks the backend which format a short name means.
    """
    cache, drafter = vllm_config.cache_config, vllm_config.speculative_config
    if cache.cache_dtype in ("fp8", "fp8_e4m3"):
        cache.cache_dtype = "fp8_ds_mla"
    if getattr(drafter, "kv_cache_dtype", None) in ("fp8", "fp8_e4m3"):
        drafter.kv_cache_dtype = "fp8_ds_mla"
