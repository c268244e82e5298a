# SPDX-License-Identifier: Apache-2.0
"""Eager PyTorch MLA decode: what the kernels must compute, and what runs where there is no Triton.

The absorbed form of Multi-head Latent Attention (DeepSeek-V2, arXiv 2405.04434): all query heads attend to one shared
key of 576 values per token, whose first 512 values are also the value.
"""

import math

import torch

from . import layout

_MAX_GATHERED_VALUES = 1 << 28
"""Requests are taken in chunks whose gathered keys hold at most this many values."""


def split_query(q) -> tuple[torch.Tensor, torch.Tensor]:
    """Query as (latent part ``[b, s_q, h_q, 512]``, rope part ``[b, s_q, h_q, 64]``), views where possible."""
    if isinstance(q, torch.Tensor):
        return q[..., : layout.D_V], q[..., layout.D_V :]
    return tuple(q)


def mla_decode(
    q,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    sm_scale: float | None = None,
    causal: bool = True,
    k_scale: float | torch.Tensor = 1.0,
    compute_dtype: torch.dtype = torch.float32,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of the last `s_q` tokens of each request over its paged cache.

    Args:
        q: ``[b, s_q, h_q, 576]``, or the tuple of its latent and rope parts.
        cache: ``[num_pages, page_size, width]`` in any format of `layout`.
        block_table: ``[b, max_pages]`` int32; entries past a request's last page are never used.
        seq_lens: ``[b]`` int32, keys of each request including its `s_q` new tokens; 0 for an empty request.
        sm_scale: softmax scale, ``576 ** -0.5`` by default.
        causal: query row i sees the keys before ``seq_len - s_q + 1 + i``; without it, all keys.
        k_scale: scale of an `fp8` cache.
        compute_dtype: arithmetic, float64 for an oracle.
        out, lse: results are copied into them if given.

    Returns:
        out ``[b, s_q, h_q, 512]`` in q's dtype and lse ``[b, s_q, h_q]``, float32 (compute_dtype if that is wider),
        natural logarithm. A row without any key to attend to: out 0, lse -inf.
    """
    q_nope, q_rope = split_query(q)
    b, s_q, h_q, _ = q_nope.shape
    sm_scale = layout.D_QK**-0.5 if sm_scale is None else sm_scale
    name = layout.cache_format(cache)
    page_size, device = cache.shape[1], cache.device
    lse_dtype = torch.promote_types(torch.float32, compute_dtype)
    result = q_nope.new_empty(b, s_q, h_q, layout.D_V)
    result_lse = torch.empty(b, s_q, h_q, dtype=lse_dtype, device=device)
    max_len = int(seq_lens.max()) if b else 0
    pages = math.ceil(max_len / page_size)
    position = torch.arange(pages * page_size, device=device)
    row_offset = torch.arange(s_q, device=device) - (s_q - 1 if causal else 0)
    row_offset = row_offset if causal else torch.zeros_like(row_offset)
    step = max(1, _MAX_GATHERED_VALUES // max(1, pages * page_size * layout.D_QK))
    for start in range(0, b, step):
        part = slice(start, start + step)
        lens = seq_lens[part].long()
        in_use = torch.arange(pages, device=device) * page_size < lens.unsqueeze(1)
        table = torch.where(in_use, block_table[part, :pages].long(), 0)
        rows = cache.view(torch.uint8)[table].view(cache.dtype) if cache.element_size() == 1 else cache[table]
        keys = layout.unpack_rows(rows, name, k_scale, compute_dtype).flatten(1, 2)  # [n, t, 576]
        keys = keys.masked_fill((position >= lens.unsqueeze(1)).unsqueeze(-1), 0.0)  # NaN there must not leak
        query = torch.cat([q_nope[part], q_rope[part]], -1).to(compute_dtype)  # [n, s_q, h_q, 576]
        scores = torch.einsum("nshd,ntd->nsht", query, keys) * sm_scale
        visible = position < (lens.unsqueeze(1) + row_offset).unsqueeze(-1)  # [n, s_q, t]
        scores = scores.masked_fill(~visible.unsqueeze(2), -math.inf)
        part_lse = torch.logsumexp(scores, -1) if pages else scores.new_full(scores.shape[:-1], -math.inf)
        weights = torch.exp(scores - part_lse.masked_fill(part_lse == -math.inf, 0.0).unsqueeze(-1))
        result[part] = torch.einsum("nsht,ntd->nshd", weights, keys[..., : layout.D_V]).to(result.dtype)
        result_lse[part] = part_lse
    if out is not None:
        result = out.copy_(result)
    if lse is not None:
        result_lse = lse.copy_(result_lse)
    return result, result_lse
