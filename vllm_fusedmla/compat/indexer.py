# SPDX-License-Identifier: Apache-2.0
"""vLLM's indexer of sparse attention, which has no interface for other kernels."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def has_deep_gemm() -> bool:
    """Whether vLLM finds DeepGEMM, whose kernels score keys for its indexer: its own copy or an installed one.

    Reason: ``vllm.utils.import_utils.has_deep_gemm`` is internal. Goes: when it is a documented interface.
    """
    from vllm.utils.import_utils import has_deep_gemm

    return bool(has_deep_gemm())


def refresh_request_of_token(metadata: Any) -> None:
    """Compute anew, on the device, which request each decoded token belongs to.

    Reason: vLLM's kernel for it is internal to its sparse backends. Goes: when the metadata can do it.
    """
    from vllm.v1.attention.ops.metadata import compute_token_to_req_indices

    tokens = metadata.num_decode_tokens
    compute_token_to_req_indices(metadata.query_start_loc, metadata.req_id_per_token, tokens, tokens)


def replace_deep_gemm(mqa_logits: Callable[..., Any], paged_mqa_logits: Callable[..., Any], max_query_len: int) -> None:
    """Replace DeepGEMM by other kernels where vLLM's indexer scores keys.

    Args:
        mqa_logits, paged_mqa_logits: with the arguments of ``fp8_fp4_mqa_logits`` and ``fp8_fp4_paged_mqa_logits``.
        max_query_len: tokens of a request that the latter takes at once.

    Reason: the indexer calls DeepGEMM by name, refuses to be built without it, and has DeepGEMM plan the work.
    Goes: when vLLM has a registry of indexer kernels.
    """
    import vllm.model_executor.layers.sparse_attn_indexer as layer
    import vllm.v1.attention.backends.mla.indexer as metadata

    layer.fp8_fp4_mqa_logits, layer.fp8_fp4_paged_mqa_logits = mqa_logits, paged_mqa_logits
    layer.has_deep_gemm = lambda: True  # asked by the layer's constructor
    metadata.has_deep_gemm = lambda: False  # nothing to plan
    metadata._supports_native_decode = lambda query_len: query_len <= max_query_len


def scores_are_compressed() -> bool:
    """Whether vLLM's indexer expects a prefill's scores with each row's first key in column 0.

    Reason: 0.33 does, with a further argument; 0.32 has a column for each key of the chunk.
    Goes: when 0.32 leaves the supported range.
    """
    from vllm.utils import deep_gemm

    return "max_seqlen_k" in inspect.signature(deep_gemm.fp8_fp4_mqa_logits).parameters


def replace_indexer_topk(prefill_topk: Callable[..., Any], decode_topk: Callable[..., Any]) -> None:
    """Replace vLLM's top-k in its indexer, with the arguments of ``top_k_per_row_prefill`` and ``SparseIndexerTopk``.

    Reason: both are called by name. Goes: when vLLM has a registry of indexer kernels.
    """
    import vllm.model_executor.layers.sparse_attn_indexer as layer
    from vllm import _custom_ops

    class Operators:
        """vLLM's operators but one, for this module only: other models call the same one."""

        top_k_per_row_prefill = staticmethod(prefill_topk)

        def __getattr__(self, name: str) -> Any:
            return getattr(_custom_ops, name)

    layer.ops = Operators()
    layer.get_indexer_topk = lambda backend: decode_topk


def allow_batch_invariant_indexer() -> None:
    """Let vLLM run its indexer in batch-invariant mode, for an indexer whose kernels are batch-invariant.

    Reason: vLLM asks the backend of the indexer's cache, whatever kernels compute with it, and that says no: its top-k
    returns its indices in an order that varies.
    Goes: when vLLM has a registry of indexer kernels.
    """
    from vllm.v1.attention.backends.mla.indexer import DeepseekV32IndexerBackend

    DeepseekV32IndexerBackend.supports_batch_invariance = classmethod(lambda cls: True)


def convert_to_slots(
    indices: torch.Tensor, request_of_token: torch.Tensor, block_table: torch.Tensor, page_size: int
) -> torch.Tensor:
    """Cache slots of request-local positions, by vLLM's kernel: arguments as `sparse_metadata.cache_slots`.

    Reason: the kernel is internal to vLLM's sparse backends. Goes: when this project has one of its own.
    """
    from vllm.v1.attention.backends.mla.sparse_utils import triton_convert_req_index_to_global_index

    topk = indices.shape[1]
    return triton_convert_req_index_to_global_index(
        request_of_token,
        block_table,
        indices,
        BLOCK_SIZE=page_size,
        NUM_TOPK_TOKENS=topk,
        BLOCK_N=128 if topk % 128 == 0 else 64,
    )
