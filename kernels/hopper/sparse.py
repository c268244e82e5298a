# SPDX-License-Identifier: Apache-2.0
"""Sparse MLA attention on Hopper: one launch of a CUDA kernel that gathers listed keys."""

import torch

from .. import layout
from ..sparse_plan import SparsePlan
from . import launch, list_parts, row_blocks, variant_of
from .decode import launch_params

_SHORT_READ = 256 << 20
"""Bytes of rows up to which L2 should rather keep what it holds, where each is read once: not in prefill, whose caches
come as pages of one row. Longer reads would lose by it."""


def list_lengths(topk_length: torch.Tensor | None, b: int, s_q: int, topk: int) -> torch.Tensor | int:
    """How many entries of each query token's list count, ``[b * s_q]`` int32, contiguous; or of all."""
    if topk_length is None:
        return topk
    if topk_length.dim() == 1:
        topk_length = topk_length.unsqueeze(1)
    return topk_length.expand(b, s_q).reshape(-1).contiguous()


def sparse_decode(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    cache: torch.Tensor,
    indices: torch.Tensor,
    lengths: torch.Tensor | int,
    block_table: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    workspace: tuple[torch.Tensor, ...],
    *,
    plan: SparsePlan,
    sm_scale: float,
    max_logits: torch.Tensor | None = None,
) -> None:
    """Launch on the current device and stream; arguments as in `sparse_decode.mla_sparse_decode`, lengths as above.

    max_logits, for plans that give it: ``[b, s_q, h_q]`` float32, contiguous, as in `sparse_decode.mla_sparse_prefill`.
    """
    b, s_q, h_q, _ = q_nope.shape
    tokens = b * s_q
    # Each query token is a request of its own.
    q_nope, q_rope = (part.reshape(tokens, 1, h_q, part.shape[-1]) for part in (q_nope, q_rope))
    indices = indices.reshape(tokens, -1)
    p, arrivals = launch_params(q_nope, q_rope, lengths, out, lse, workspace, plan.config, plan.params, sm_scale)
    pages, page_size = cache.shape[:2]
    p.cache, p.page_stride = cache.data_ptr(), cache.stride(0) * cache.element_size()
    p.num_pages, p.page_size, p.sharers = pages, page_size, s_q
    p.indices, p.index_stride = indices.data_ptr(), indices.stride(0)
    if block_table is not None:
        p.block_table, p.table_stride, p.max_pages = block_table.data_ptr(), block_table.stride(0), block_table.shape[1]
    elif p.page_stride == page_size * layout.row_bytes(layout.cache_format(cache)):
        p.num_pages, p.page_size = pages * page_size, 0  # slots are rows
    p.k_scale_value = 1.0
    if max_logits is not None:
        p.max_logits = max_logits.fill_(-torch.inf).data_ptr()
    name = variant_of(plan.config, layout.cache_format(cache), h_q)
    grid, cluster = (row_blocks(plan.config, h_q), plan.params.num_programs), 1
    if plan.config.kernel == "swapab_gather":
        p.schedule.length = topk = indices.shape[1]
        blocks = row_blocks(plan.config, h_q)
        read = tokens * topk * layout.row_bytes(layout.cache_format(cache))
        p.schedule.fixed_tiles = s_q == blocks == 1 and page_size > 1 and read < _SHORT_READ
        device = torch.cuda.current_device()
        cluster = list_parts(tokens * blocks, topk, plan.params, lambda size: launch.most_clusters(name, size, device))
        p.schedule.min_share = -(-topk // (plan.params.block_n * cluster))  # a CTA's tiles where a list is full
        grid = (cluster * tokens if cluster > 1 else min(tokens, plan.params.num_programs)), blocks
    launch.launch(name, p, grid, cluster, together=plan.config.kernel != "swapab_gather")
    del arrivals, indices, q_nope, q_rope  # alive until the launch
