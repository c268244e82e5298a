# SPDX-License-Identifier: Apache-2.0
"""A step's metadata for sparse layers, and what the indexer's positions mean on this rank and in the cache.

The indexer leaves, for each token of the step, positions of keys within the token's request, -1 where there are fewer,
in one buffer for all layers. Where every request has equally many tokens, the operator takes them as they are, with
the requests' block tables. Otherwise they are turned into slots of the cache first, but for prompts with a launch of
their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from vllm.model_executor.layers.attention.sparse_mla_attention import (
    SparseMLACommonMetadata,
    SparseMLACommonMetadataBuilder,
)
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionCGSupport

from . import compat, indexer, plugin
from .counts import DecodeCounter
from .limits import SparseLimits, decode_threshold
from .metadata import uses_reference

sparse_tokens = DecodeCounter("sparse")
"""Tokens through `FusedMLASparseImpl.forward_mqa`, decoded and prefilled; `scheduled` counts those of the steps."""


@dataclasses.dataclass(kw_only=True)
class FusedMLASparseMetadata(SparseMLACommonMetadata):
    """vLLM's fields, and two more.

    Attributes:
        decode_query_len: how many new tokens each decoded request has; 0 where block tables cannot be used.
        prompts: new tokens and keys of each prefilled request.
    """

    decode_query_len: int = 0
    prompts: tuple[tuple[int, int], ...] = ()


def uniform_query_len(query_start_loc_cpu: torch.Tensor, num_decodes: int, num_decode_tokens: int) -> int:
    """Tokens of each decoded request if the step's decode is a whole number of such requests, else 0.

    Under CUDA graphs both counts include padding: requests without tokens at the end, and the tokens that the graph
    computes for them. Without graphs there may be padding requests but no tokens for them.

    Args:
        query_start_loc_cpu: ``[b + 1]``, first token of each request.
        num_decodes, num_decode_tokens: the step's requests to decode, which come first, and their tokens.
    """
    lengths = query_start_loc_cpu[: num_decodes + 1].diff()
    real = int((lengths > 0).sum())
    length = int(lengths[0]) if real else 0
    if length == 0 or not bool((lengths[:real] == length).all()):
        return 0
    if num_decode_tokens % length or num_decode_tokens // length > num_decodes:
        return 0
    return length


class TokenGroup(NamedTuple):
    """Tokens of a step that one launch attends for.

    Attributes:
        tokens: which.
        s_q: how many of them, one after the other, have a row of the block table.
        block_table: ``[tokens / s_q, max_pages]`` int32, or None where slots are needed.
        prefill: whether they are of prefills.
        keys: of the request whose keys are converted first; 0 where none are.
    """

    tokens: slice
    s_q: int
    block_table: torch.Tensor | None
    prefill: bool
    keys: int = 0


def token_groups(
    metadata: FusedMLASparseMetadata, tokens: int, converts: Callable[[int, int], bool]
) -> list[TokenGroup]:
    """The first `tokens` tokens of the step: its decodes, and its prefills unless vLLM's dense prefill has them.

    A prompt for which `converts(new tokens, keys)` is a group of its own, as is a step's only one.
    """
    decodes = min(metadata.num_decode_tokens, tokens)
    groups = []
    if decodes:
        s_q = metadata.decode_query_len
        table = metadata.block_table[: decodes // s_q] if s_q else None
        groups.append(TokenGroup(slice(0, decodes), s_q or 1, table, False))
    begin = end = decodes
    for request, (count, keys) in enumerate(metadata.prompts, metadata.num_decodes):
        begin_of_prompt, end = end, end + count
        if not converts(count, keys):
            keys = 0
        if (keys or metadata.num_prefills == 1) and end <= tokens:
            if begin < begin_of_prompt:
                groups.append(TokenGroup(slice(begin, begin_of_prompt), 1, None, True))
            table = metadata.block_table[request : request + 1].expand(count, -1)  # a row, without copies
            groups.append(TokenGroup(slice(begin_of_prompt, end), 1, table, True, keys))
            begin = end
    if begin < tokens:
        groups.append(TokenGroup(slice(begin, tokens), 1, None, True))
    return groups


def local_positions(indices: torch.Tensor, world_size: int, rank: int, interleave: int) -> torch.Tensor:
    """Positions within a request on this rank of decode context parallelism, -1 for other ranks' keys.

    Args:
        indices: ``[T, topk]`` int32 positions within the whole request; negative for none.
        world_size, rank: of the group. Runs of `interleave` keys go to the ranks in turn.

    Returns:
        ``[T, topk]`` int32, positions among the rank's own keys.
    """
    run = indices // interleave
    local = run // world_size * interleave + indices % interleave
    return torch.where((indices >= 0) & (run % world_size == rank), local, -1)


def cache_slots(
    indices: torch.Tensor, request_of_token: torch.Tensor, block_table: torch.Tensor, page_size: int
) -> torch.Tensor:
    """Slots ``page * page_size + offset`` of positions ``[T, topk]``, -1 for none and for what is out of range.

    Args:
        indices: ``[T, topk]`` int32.
        request_of_token: ``[T]`` int32, the row of each token in `block_table`.
        block_table: ``[b, max_pages]`` int32.
        page_size: of the cache.
    """
    if indices.device.type == "cuda":
        return compat.convert_to_slots(indices, request_of_token, block_table, page_size)
    column = indices // page_size
    valid = (indices >= 0) & (column < block_table.shape[1])
    table = block_table[request_of_token.long()]
    page = torch.gather(table, 1, torch.where(valid, column, 0).long())
    return torch.where(valid, page * page_size + indices % page_size, -1)


class FusedMLASparseMetadataBuilder(SparseMLACommonMetadataBuilder[FusedMLASparseMetadata]):
    """Builds a step's metadata: vLLM's, for which nothing need be scheduled ahead of the layers."""

    metadata_cls = FusedMLASparseMetadata
    require_uniform_decodes: ClassVar[bool] = True
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # Requests of different lengths are safe on one rank each: the indices alone say what a token sees.
        self._init_reorder_batch_threshold(
            decode_threshold(),
            supports_spec_as_decode=True,
            supports_dcp_with_varlen=self.cp_kv_cache_interleave_size == 1,
        )
        self.supports_draft_decode_metadata_update = self.dcp_world_size == 1
        heads = self.model_config.get_num_attention_heads(vllm_config.parallel_config) * self.dcp_world_size
        cache_dtype = getattr(kv_cache_spec, "cache_dtype_str", None) or vllm_config.cache_config.cache_dtype
        self._limits = SparseLimits.of(vllm_config, heads, cache_dtype)
        if not uses_reference():
            self._limits.reserve_workspace(device)
            self._limits.warm_up(kv_cache_spec.block_size, device)
            if plugin.offers_indexer():
                heads = self.model_config.hf_text_config.index_n_heads
                indexer.warm_up(heads, self.topk_tokens, self._limits.query_lens, self._limits.max_seq_len, device)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        return AttentionCGSupport.NEVER if uses_reference() else cls._cudagraph_support  # the reference synchronises

    def _build_req_id_per_token(self, common_attn_metadata: Any) -> torch.Tensor:
        if current_platform.is_cpu():
            return compat.request_of_token(common_attn_metadata, self.req_id_per_token_buffer)
        return super()._build_req_id_per_token(common_attn_metadata)

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> FusedMLASparseMetadata:
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        sparse_tokens.scheduled += metadata.num_actual_tokens
        tokens = metadata.num_decode_tokens
        kernel = "reference" if uses_reference() else self._limits.plan(self.device, tokens=tokens).config.kernel
        sparse_tokens.record(kernel, tokens)
        length = uniform_query_len(
            common_attn_metadata.query_start_loc_cpu, metadata.num_decodes, metadata.num_decode_tokens
        )
        metadata.decode_query_len = length if length in self._limits.query_lens else 0
        first, last = metadata.num_decodes, metadata.num_decodes + metadata.num_prefills
        if last > first:
            counts = common_attn_metadata.query_start_loc_cpu[first : last + 1].diff()
            keys = common_attn_metadata.seq_lens_cpu_upper_bound[first:last]
            metadata.prompts = tuple(zip(counts.tolist(), keys.tolist(), strict=True))
        return metadata

    def update_draft_decode_metadata(self, metadata: FusedMLASparseMetadata) -> None:
        """Follow a drafter's step; safe inside a graph capture.

        Where block tables are used there is nothing to follow: they are the model runner's own buffer, and the indexer
        alone reads sequence lengths. Slots need the request of each token.
        """
        if metadata.num_decode_tokens and not metadata.decode_query_len:
            compat.refresh_request_of_token(metadata)
