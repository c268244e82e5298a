# SPDX-License-Identifier: Apache-2.0
"""The indexer of DeepSeek sparse attention on CPUs, in PyTorch: what vLLM's CPU build lacks.

For each token it scores, with few bits, the keys of the token's request that the token may see, and leaves the
positions of the best `index_topk` in the buffer that the attention layers read (DeepSeek-V3.2, arXiv 2512.02556). The
model computes queries, keys and head weights; this module quantises them, keeps the keys in vLLM's cache and selects.
Slow, for tests and for trying things out.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backend import AttentionMetadataBuilder

from . import compat
from .kernels import indexer_reference
from .kernels.indexer_layout import INDEX_DIM, quantise_keys

_MAX_PRODUCTS = 1 << 26
"""Tokens are taken in chunks with at most this many products of a query head and a key."""


@dataclasses.dataclass
class IndexerMetadata:
    """A step's requests and where their keys lie.

    Attributes:
        query_start_loc: first token of each request, and the end of the last.
        seq_lens: keys of each request including this step's.
        block_table: ``[b, max_pages]`` int32.
        slot_mapping: ``[T]``, slot of each token's key; negative for none.
    """

    query_start_loc: list[int]
    seq_lens: list[int]
    block_table: torch.Tensor
    slot_mapping: torch.Tensor


class IndexerMetadataBuilder(AttentionMetadataBuilder[IndexerMetadata]):
    """Builds `IndexerMetadata`; prefill and decode are the same to it."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> IndexerMetadata:
        common = common_attn_metadata
        starts, lengths = common.query_start_loc_cpu.tolist(), common.seq_lens.tolist()
        return IndexerMetadata(starts, lengths, common.block_table_tensor, common.slot_mapping)


def quantise_query(
    x: torch.Tensor, group_size: int, *_args: Any, use_ue8m0: bool = False, **_options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stands in for vLLM's ``per_token_group_quant_fp8`` where the model quantises the indexer's query.

    Args:
        x: ``[T * heads, 128]`` in any float dtype.
        group_size: 128.
        use_ue8m0: True, for scales that are powers of two.

    Returns:
        e4m3 codes ``[T * heads, 128]`` and float32 scales ``[T * heads, 1]``.
    """
    if not (x.shape[-1] == group_size == INDEX_DIM and use_ue8m0):
        raise NotImplementedError(f"rows of {INDEX_DIM} with one power-of-two scale only, got {list(x.shape)}")
    codes, scales = quantise_keys(x)
    return codes, scales.unsqueeze(-1)


def select_keys(
    q: torch.Tensor, weights: torch.Tensor, cache: torch.Tensor, metadata: IndexerMetadata, topk: int, out: torch.Tensor
) -> None:
    """Positions of the best keys of each token, within its request.

    Args:
        q: ``[T, heads, 128]`` e4m3.
        weights: ``[T, heads]`` float32, of the heads, with the query's scales in them.
        cache: ``[num_pages, page_size, 132]`` uint8, this step's keys included.
        metadata: of the step.
        topk: keys to select.
        out: int32 with at least T rows and `topk` columns, written: -1 where there are fewer keys.
    """
    for request, length in enumerate(metadata.seq_lens):
        start, end = metadata.query_start_loc[request : request + 2]
        step = max(1, _MAX_PRODUCTS // max(1, length * q.shape[1]))
        for first in range(start, end, step):
            last = min(first + step, end)
            visible = torch.arange(first, last, dtype=torch.int32) + (length - end + 1)
            logits = indexer_reference.index_logits_paged(
                q[first:last].unsqueeze(0),
                cache,
                weights[first:last],
                visible.unsqueeze(0),
                metadata.block_table[request : request + 1],
                length,
            )
            indexer_reference.topk_indices(logits, visible, topk, out=out[first:last, :topk])


@torch.library.custom_op("fusedmla::cpu_indexer", mutates_args=("topk_indices",))
def _cpu_indexer(
    q: torch.Tensor, k: torch.Tensor, weights: torch.Tensor, topk_indices: torch.Tensor, layer: str, topk: int
) -> None:
    # An operator, because vLLM compiles the model: what happens here depends on the step's requests.
    context = get_forward_context()
    if not isinstance(context.attn_metadata, dict):
        return  # a profiling run has neither requests nor a cache
    metadata, cache = context.attn_metadata[layer], context.no_compile_layers[layer].kv_cache
    indexer_reference.write_index_cache(k, cache, metadata.slot_mapping)
    topk_indices[: len(q)] = -1
    select_keys(q, weights.float(), cache, metadata, topk, topk_indices)


@_cpu_indexer.register_fake
def _(q, k, weights, topk_indices, layer, topk) -> None:
    return None


def select(
    self: Any, hidden_states: torch.Tensor, q_quant: torch.Tensor, k: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Stands in for ``SparseAttnIndexer.forward``."""
    torch.ops.fusedmla.cpu_indexer(q_quant, k, weights, self.topk_indices_buffer, self.k_cache.prefix, self.topk_tokens)
    return self.topk_indices_buffer


def install() -> None:
    """Make the models of this process use this indexer."""
    compat.run_indexer_on_cpu(select, quantise_query, IndexerMetadataBuilder)
