# SPDX-License-Identifier: Apache-2.0
"""The indexer of DeepSeek Sparse Attention in eager PyTorch: what the kernels must compute, and what runs on a CPU.

A query token's score of a key is ``sum_h weights[h] * relu(q[h] . k) * k_scale`` over the indexer's heads
(DeepSeek-V3.2, arXiv 2512.02556); the `k` best keys are attended to. vLLM's models fold the scale of the quantised
query, the softmax scale and ``heads ** -0.5`` into `weights`.
"""

import math

import torch

from .indexer_layout import INDEX_DIM, page_views, quantise_keys

_MAX_SCORES = 1 << 26
"""Query rows are taken in chunks with at most this many scores."""


def row_lengths(seq_lens: torch.Tensor, s_q: int) -> torch.Tensor:
    """Keys that each query row sees, ``[b * s_q]``: of ``[b]`` lengths, or of ``[b, s_q]`` as they are."""
    if seq_lens.dim() == 2 and seq_lens.shape[1] == s_q:
        return seq_lens.flatten().clamp_min(0)
    rows = torch.arange(s_q, device=seq_lens.device, dtype=seq_lens.dtype) - (s_q - 1)
    return (seq_lens.reshape(-1, 1) + rows).clamp_min(0).flatten()


def index_logits_paged(
    q: torch.Tensor,
    index_cache: torch.Tensor,
    weights: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    max_len: int,
    *,
    clean: bool = True,
    compute_dtype: torch.dtype = torch.float32,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Scores of all keys of each request, from the paged cache.

    Args:
        q: ``[b, s_q, heads, 128]`` e4m3.
        index_cache: ``[num_pages, page_size, 132]`` uint8, see `indexer_layout`.
        weights: ``[b * s_q, heads]`` float32.
        seq_lens: int32, ``[b]`` keys of each request including its `s_q` new tokens, of which row i sees the first
            ``seq_len - s_q + 1 + i``; or ``[b, s_q]`` keys that each row sees.
        block_table: ``[b, max_pages]`` int32; entries past a request's last page are never used.
        max_len: columns of the result; keys from there on are left out.
        clean: columns past the row's keys are -inf; without it their contents are undefined (here: also -inf).
        compute_dtype: arithmetic, and dtype of the result if wider than float32.
        out: ``[b * s_q, max_len]``, the result is copied into it if given.

    Returns:
        ``[b * s_q, max_len]`` float32.
    """
    b, s_q, heads, _ = q.shape
    codes, scales = page_views(index_cache)
    page_size = codes.shape[1]
    lengths = row_lengths(seq_lens[:b], s_q).clamp_max(max_len).tolist()
    dtype = torch.promote_types(torch.float32, compute_dtype)
    result = torch.full((b * s_q, max_len), -math.inf, dtype=dtype, device=q.device)
    for request in range(b):
        rows = range(request * s_q, (request + 1) * s_q)
        longest = max(lengths[row] for row in rows)
        if longest == 0:
            continue
        pages = block_table[request, : -(-longest // page_size)].long()
        keys = codes[pages].flatten(0, 1)[:longest].view(torch.float8_e4m3fn).to(compute_dtype)
        starts = torch.zeros(s_q, dtype=torch.int32, device=q.device)
        ends = torch.tensor([lengths[row] for row in rows], dtype=torch.int32, device=q.device)
        part = slice(rows.start, rows.stop)
        result[part, :longest] = _scores(
            q[request], keys, scales[pages].flatten()[:longest], weights[part], starts, ends, compute_dtype
        )
    return result if out is None else out.copy_(result)


def index_logits_ragged(
    q: torch.Tensor,
    k: torch.Tensor,
    k_scales: torch.Tensor,
    weights: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    *,
    max_len: int | None = None,
    clean: bool = True,
    compute_dtype: torch.dtype = torch.float32,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Scores of a range of keys for each query token, from contiguous keys.

    Args:
        q: ``[T, heads, 128]`` e4m3.
        k: ``[S, 128]`` e4m3.
        k_scales: ``[S]`` float32.
        weights: ``[T, heads]`` float32.
        starts, ends: ``[T]`` int32, the first key that a token sees and one past the last; empty is allowed.
        max_len: if given, column c of row t is key ``starts[t] + c`` and there are `max_len` columns, vLLM 0.33's
            compressed form; otherwise column c is key c.
        clean, compute_dtype, out: as for `index_logits_paged`.

    Returns:
        ``[T, S]`` or ``[T, max_len]`` float32.
    """
    tokens, total = q.shape[0], k.shape[0]
    starts, ends = starts.long().clamp_min(0), ends.long().clamp_max(total)
    dtype = torch.promote_types(torch.float32, compute_dtype)
    keys = k.to(compute_dtype)
    result = torch.empty((tokens, total), dtype=dtype, device=q.device)
    step = max(1, _MAX_SCORES // max(1, total * q.shape[1]))
    for first in range(0, tokens, step):
        part = slice(first, first + step)
        result[part] = _scores(q[part], keys, k_scales, weights[part], starts[part], ends[part], compute_dtype)
    if max_len is not None:
        column = torch.arange(max_len, device=q.device)
        source = starts.unsqueeze(1) + column
        inside = source < ends.unsqueeze(1)
        wide = torch.cat([result, result.new_full((tokens, 1), -math.inf)], 1)
        result = wide.gather(1, torch.where(inside, source, total))
    return result if out is None else out.copy_(result)


def _scores(q, keys, k_scales, weights, starts, ends, dtype: torch.dtype) -> torch.Tensor:
    """Scores ``[T, S]`` of all keys, -inf outside a row's range whatever lies there."""
    scores = torch.einsum("thd,sd->ths", q.to(dtype), keys)
    scores = torch.einsum("ths,th->ts", torch.relu(scores), weights.to(dtype)) * k_scales.to(dtype)
    column = torch.arange(keys.shape[0], device=keys.device)
    return scores.masked_fill((column < starts.unsqueeze(1)) | (column >= ends.unsqueeze(1)), -math.inf)


def topk_indices(
    logits: torch.Tensor,
    visible: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    k: int,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Indices of the `k` largest values of each row; arguments and result as in `topk.topk_indices`."""
    rows, n = logits.shape
    if isinstance(visible, tuple):
        starts, ends = (t.long().clamp(0, n) for t in visible)
    else:
        ends = row_lengths(visible.flatten(), rows // max(visible.numel(), 1)).long().clamp_max(n)
        starts = torch.zeros_like(ends)
    column = torch.arange(n, device=logits.device)
    usable = (column >= starts.unsqueeze(1)) & (column < ends.unsqueeze(1)) & (logits > -math.inf)  # NaN is not
    order = torch.sort(logits.masked_fill(~usable, -math.inf), dim=1, descending=True, stable=True).indices[:, :k]
    chosen = torch.where(usable.gather(1, order), order, n).sort(1).values
    chosen = torch.where(chosen < n, chosen - starts.unsqueeze(1), -1).int()
    result = logits.new_full((rows, k), -1, dtype=torch.int32) if out is None else out.fill_(-1)
    result[:, : chosen.shape[1]] = chosen
    return result


def write_index_cache(k: torch.Tensor, index_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Quantise indexer keys and store them in the paged cache, as vLLM's `indexer_k_quant_and_cache` with `ue8m0`.

    Args:
        k: ``[T, 128]`` of any float dtype; rows beyond ``len(slot_mapping)`` are ignored.
        index_cache: ``[num_pages, page_size, 132]`` uint8, written in place.
        slot_mapping: ``[t]`` integers, ``page * page_size + offset`` of each token; a negative one skips the token.
    """
    slots = slot_mapping.flatten().long()
    keep = slots >= 0
    codes, scales = page_views(index_cache)
    page, offset = slots[keep] // codes.shape[1], slots[keep] % codes.shape[1]
    new_codes, new_scales = quantise_keys(k[: slots.numel()][keep])
    codes[page, offset] = new_codes.view(torch.uint8)
    scales[page, offset] = new_scales


def gather_index_cache(
    index_cache: torch.Tensor, block_table: torch.Tensor, cu_seq_lens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys of several requests end to end, as vLLM's `cp_gather_indexer_k_quant_cache`.

    Args:
        index_cache: ``[num_pages, page_size, 132]`` uint8.
        block_table: ``[b, max_pages]`` int32.
        cu_seq_lens: ``[b + 1]`` int32, where each request's keys begin in the result, and their total.

    Returns:
        k ``[S, 128]`` e4m3 and k_scales ``[S]`` float32 for `index_logits_ragged`.
    """
    codes, scales = page_views(index_cache)
    page_size = codes.shape[1]
    bounds = cu_seq_lens.tolist()
    k = torch.empty(bounds[-1], INDEX_DIM, dtype=torch.uint8, device=index_cache.device)
    k_scales = torch.empty(bounds[-1], device=index_cache.device)
    for table, begin, end in zip(block_table, bounds, bounds[1:], strict=False):
        pages = table[: -(-(end - begin) // page_size)].long()
        k[begin:end] = codes[pages].flatten(0, 1)[: end - begin]
        k_scales[begin:end] = scales[pages].flatten()[: end - begin]
    return k.view(torch.float8_e4m3fn), k_scales
