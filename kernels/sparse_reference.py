# SPDX-License-Identifier: Apache-2.0
"""Eager PyTorch sparse MLA attention: what the kernels must compute, and what runs where there is no Triton.

DeepSeek Sparse Attention (DeepSeek-V3.2-Exp): an indexer lists for each query token the keys that it attends to.
"""

import math

import torch

from . import layout
from .reference import split_query

_MAX_GATHERED_VALUES = 1 << 26
"""Query tokens are taken in chunks whose gathered keys hold at most this many values."""


def mla_sparse_decode(
    q,
    cache: torch.Tensor,
    indices: torch.Tensor,
    *,
    topk_length: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    sm_scale: float | None = None,
    k_scale: float | torch.Tensor = 1.0,
    attn_sink: torch.Tensor | None = None,
    compute_dtype: torch.dtype = torch.float32,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of each query token to the rows of a paged cache that its list names.

    Args:
        q: ``[b, s_q, h_q, 576]`` in any float dtype, or the tuple of its latent and rope parts.
        cache: ``[num_pages, page_size, width]`` in any format of `layout`.
        indices: ``[b, s_q, topk]`` int32 in any order: slots ``page * page_size + offset`` of the cache, or with
            `block_table` positions within the request. Negative entries and entries outside the cache or the block
            table, anywhere in the list, name no key. A key that is named twice counts twice.
        topk_length: ``[b, s_q]`` or ``[b]`` int32, how many entries of a list count; all by default.
        block_table: ``[b, max_pages]`` int32, pages of each request, or None.
        sm_scale: softmax scale, ``576 ** -0.5`` by default.
        k_scale: scale of an `fp8` cache.
        attn_sink: ``[h_q]`` float32: a score (natural units) that takes part in the sum by which the weights are
            divided, and has no value. -inf takes nothing, +inf everything.
        compute_dtype: arithmetic, float64 for an oracle.
        out, lse: results are copied into them if given.

    Returns:
        out ``[b, s_q, h_q, 512]`` in q's dtype and lse ``[b, s_q, h_q]``, float32 (compute_dtype if that is wider),
        natural logarithm, without the sink. A token without keys: out 0, lse -inf.
    """
    latent, rope = split_query(q)
    b, s_q, h_q, _ = latent.shape
    slots = _slots(indices, topk_length, block_table, *cache.shape[:2]).flatten(0, 1)
    query = (latent.flatten(0, 1), rope.flatten(0, 1))
    result, _, result_lse = _attend(query, cache, slots, sm_scale, k_scale, attn_sink, compute_dtype)
    result, result_lse = result.view(b, s_q, h_q, layout.D_V), result_lse.view(b, s_q, h_q)
    return _into(out, result), _into(lse, result_lse)


def mla_sparse_prefill(
    q,
    kv: torch.Tensor,
    indices: torch.Tensor,
    *,
    topk_length: torch.Tensor | None = None,
    sm_scale: float | None = None,
    k_scale: float | torch.Tensor = 1.0,
    attn_sink: torch.Tensor | None = None,
    compute_dtype: torch.dtype = torch.float32,
    out: torch.Tensor | None = None,
    max_logits: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention of each query token to the rows of `kv` that its list names; no batch dimension.

    Args:
        q: ``[s, h_q, 576]``, or its two parts; otherwise, as all arguments not named here, as in `mla_sparse_decode`.
        kv: ``[s_kv, width]`` in any format of `layout`.
        indices: ``[s, topk]`` int32, rows of `kv`.
        topk_length: ``[s]`` int32 or None.
        out, max_logits, lse: results are copied into them if given.

    Returns:
        out ``[s, h_q, 512]``, max_logits ``[s, h_q]`` and lse ``[s, h_q]``; max_logits is the largest score times
        `sm_scale`, -inf for a token without keys.
    """
    cache = kv.unsqueeze(1)
    slots = _slots(indices.unsqueeze(1), topk_length, None, *cache.shape[:2]).squeeze(1)
    results = _attend(split_query(q), cache, slots, sm_scale, k_scale, attn_sink, compute_dtype)
    result, largest, result_lse = results
    return _into(out, result), _into(max_logits, largest), _into(lse, result_lse)


def _slots(
    indices: torch.Tensor,
    topk_length: torch.Tensor | None,
    block_table: torch.Tensor | None,
    num_pages: int,
    page_size: int,
) -> torch.Tensor:
    """Slots ``[b, s_q, topk]`` int64 of the rows that entries name, -1 where they name none."""
    b, s_q, topk = indices.shape
    entry = indices.long()
    named = entry >= 0
    if topk_length is not None:
        named &= torch.arange(topk, device=entry.device) < topk_length.reshape(b, -1, 1)
    if block_table is not None:
        named &= entry < block_table.shape[1] * page_size
        page = torch.where(named, entry // page_size, 0).flatten(1)
        page = block_table.long().gather(1, page).view(b, s_q, topk) if block_table.shape[1] else page.view_as(entry)
        named &= (page >= 0) & (page < num_pages)
        entry = page * page_size + entry % page_size
    named &= entry < num_pages * page_size
    return torch.where(named, entry, -1)


def _attend(
    q: tuple[torch.Tensor, torch.Tensor],  # [n, h_q, 512], [n, h_q, 64]
    cache: torch.Tensor,
    slots: torch.Tensor,  # [n, topk], -1 for none
    sm_scale: float | None,
    k_scale: float | torch.Tensor,
    attn_sink: torch.Tensor | None,
    compute_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """out, max_logits and lse of `n` query tokens."""
    n, h_q, _ = q[0].shape
    topk, page_size = slots.shape[1], cache.shape[1]
    name = layout.cache_format(cache)
    stored = cache.view(torch.uint8) if cache.element_size() == 1 else cache  # CPUs have no indexed loads of float8
    sm_scale = layout.D_QK**-0.5 if sm_scale is None else sm_scale
    wide = torch.promote_types(torch.float32, compute_dtype)
    out = q[0].new_empty(n, h_q, layout.D_V)
    lse = torch.full((n, h_q), -math.inf, dtype=wide, device=out.device)
    largest = lse.clone()
    if topk == 0 or cache.numel() == 0:
        return out.zero_(), largest, lse
    step = max(1, _MAX_GATHERED_VALUES // (topk * layout.D_QK))
    for start in range(0, n, step):
        part = slice(start, start + step)
        named = slots[part] >= 0
        slot = torch.where(named, slots[part], 0)
        rows = stored[slot // page_size, slot % page_size].view(cache.dtype)
        keys = layout.unpack_rows(rows, name, k_scale, compute_dtype)  # [n, topk, 576]
        keys = keys.masked_fill(~named.unsqueeze(-1), 0.0)  # NaN there must not leak
        query = torch.cat([q[0][part], q[1][part]], -1).to(compute_dtype)
        scores = torch.einsum("nhd,ntd->nht", query, keys) * sm_scale
        scores = scores.masked_fill(~named.unsqueeze(1), -math.inf)
        part_lse = torch.logsumexp(scores, -1)
        weights = torch.exp(scores - part_lse.masked_fill(part_lse == -math.inf, 0.0).unsqueeze(-1))
        values = torch.einsum("nht,ntd->nhd", weights, keys[..., : layout.D_V])
        if attn_sink is not None:
            share = torch.sigmoid(part_lse - attn_sink.to(compute_dtype))
            values *= torch.where(part_lse == -math.inf, 0.0, share).unsqueeze(-1)
        out[part] = values.to(out.dtype)
        lse[part] = part_lse
        largest[part] = scores.amax(-1)
    return out, largest, lse


def _into(given: torch.Tensor | None, result: torch.Tensor) -> torch.Tensor:
    return result if given is None else given.copy_(result)
