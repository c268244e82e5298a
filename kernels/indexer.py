# SPDX-License-Identifier: Apache-2.0
"""Scores of the DeepSeek Sparse Attention indexer in portable Triton, without DeepGEMM: paged and contiguous keys."""

from dataclasses import dataclass

import torch
import triton

from .common import dependent_launch, device_facts, interpreted, next_power_of_2
from .indexer_kernel import paged_logits_kernel, ragged_logits_kernel
from .indexer_layout import INDEX_BYTES, INDEX_DIM, SCALE_BYTES

_ALIGNMENT = 64
"""Columns that the stride of an allocated result is a multiple of: rows begin at multiples of 256 bytes."""


@dataclass(frozen=True)
class IndexerConfig:
    """Launch shape of a kernel.

    Attributes:
        fp8: whether the matrix unit takes e4m3.
        block_r: query rows of a program.
        block_n: keys of a tile.
        num_warps, num_stages: Triton's launch options.
        programs_per_sm: programs resident on a multiprocessor; the paged grid has as many as the GPU can hold.
    """

    fp8: bool
    block_r: int
    block_n: int
    num_warps: int
    num_stages: int
    programs_per_sm: int


# First row that fits wins. Those for 9.0 and one query row a request were chosen by measurement on an H200
# (docs/performance.md), the others were compiled, not timed. A page's number is one load and its keys are the next, so
# half of the stages hold keys on their way.
_TABLE = (
    # capability from, to | kernel | most query rows of a request | fp8, block_r, block_n, warps, stages, programs a SM
    ((9, 0), (9, 0), "paged", 1, (True, 1, 64, 4, 6, 4)),
    ((9, 0), (9, 0), "paged", 2, (True, 2, 64, 4, 6, 3)),
    ((9, 0), (9, 0), "paged", 99, (True, 4, 64, 4, 5, 2)),
    ((9, 0), (9, 0), "ragged", 99, (True, 4, 128, 4, 3, 2)),
    ((8, 9), (99, 9), "paged", 99, (True, 1, 64, 8, 3, 2)),
    ((8, 9), (99, 9), "ragged", 99, (True, 2, 64, 8, 3, 1)),
    ((8, 0), (8, 8), "paged", 99, (False, 1, 64, 8, 2, 2)),
    ((8, 0), (8, 8), "ragged", 99, (False, 1, 64, 8, 2, 1)),
)


def select_indexer(arch: tuple[int, int], kernel: str, s_q: int = 1) -> IndexerConfig:
    """Launch shape of a kernel, "paged" or "ragged", for `s_q` query rows a request.

    Raises:
        ValueError: no kernel for this compute capability.
    """
    for least, most, name, most_rows, values in _TABLE:
        if least <= arch <= most and name == kernel and s_q <= most_rows:
            return IndexerConfig(*values)
    raise ValueError(f"the indexer needs compute capability 8.0 or later, got {arch[0]}.{arch[1]}")


def empty_logits(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """``[rows, columns]`` float32 whose rows begin at multiples of 256 bytes, so that top-k can read vectors."""
    padded = triton.cdiv(max(columns, 1), _ALIGNMENT) * _ALIGNMENT
    return torch.empty(rows, padded, dtype=torch.float32, device=device)[:, :columns]


def index_logits_paged(
    q: torch.Tensor,
    index_cache: torch.Tensor,
    weights: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    max_len: int,
    *,
    clean: bool = True,
    out: torch.Tensor | None = None,
    config: IndexerConfig | None = None,
) -> torch.Tensor:
    """Scores of all keys of each request, from the paged cache: one launch, no host synchronisation.

    ``logits[row, key] = sum_h weights[row, h] * relu(q[row, h] . k[key]) * k_scale[key]``. Inputs are trusted.

    Args:
        q: ``[b, s_q, heads, 128]`` e4m3, contiguous; 1 to 64 heads.
        index_cache: ``[num_pages, page_size, 132]`` uint8, see `indexer_layout`; page_size a multiple of 16, page
            stride a multiple of 16 bytes.
        weights: ``[b * s_q, heads]`` float32, contiguous. The query's scales belong in it.
        seq_lens: int32, ``[b]`` keys of each request including its `s_q` new tokens, of which row i sees the first
            ``seq_len - s_q + 1 + i``; or ``[b, s_q]`` keys that each row sees. 0 for an empty request.
        block_table: ``[b, max_pages]`` int32; entries past a request's last page are never read.
        max_len: columns of the result; keys from there on are left out.
        clean: fill the columns past the row's keys with -inf; otherwise they are not written, which saves their
            memory traffic, and readers must go by the lengths, as `topk.topk_indices` does.
        out: ``[b * s_q, max_len]`` float32, contiguous rows with any stride between them.
        config: from `select_indexer`, chosen if not given.

    Returns:
        ``[b * s_q, max_len]`` float32; if allocated, its row stride is a multiple of 64.
    """
    b, s_q, heads, _ = q.shape
    device = q.device
    out = empty_logits(b * s_q, max_len, device) if out is None else out
    if out.numel() == 0:
        return out
    arch, num_sms = device_facts(device)
    config = select_indexer(arch, "paged", s_q) if config is None else config
    dtype = torch.float8_e4m3fn if config.fp8 else torch.uint16
    row_blocks = triton.cdiv(s_q, config.block_r)
    paged_logits_kernel[(max(num_sms * config.programs_per_sm // row_blocks, 1), row_blocks)](
        q.view(dtype),
        page_words(index_cache, dtype),
        weights,
        seq_lens,
        block_table,
        out,
        b,
        max_len,
        index_cache.stride(0) // dtype.itemsize,
        block_table.stride(0),
        seq_lens.stride(0),
        out.stride(0),
        S_Q=s_q,
        HEADS=heads,
        PAGE_SIZE=index_cache.shape[1],
        LENGTH_PER_ROW=seq_lens.dim() == 2 and seq_lens.shape[1] == s_q,
        CLEAN=clean,
        FP8=config.fp8,
        BLOCK_R=config.block_r,
        BLOCK_HEADS=max(next_power_of_2(heads), 16),
        BLOCK_N=config.block_n,
        BLOCK_B=next_power_of_2(max(b, 16)),
        STAGES=config.num_stages,
        INTERPRETED=interpreted(),
        **dependent_launch(device),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out


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
    out: torch.Tensor | None = None,
    config: IndexerConfig | None = None,
) -> torch.Tensor:
    """Scores of a range of keys for each query token, from contiguous keys: one launch. Inputs are trusted.

    Args:
        q: ``[T, heads, 128]`` e4m3, contiguous; 1 to 64 heads.
        k: ``[S, 128]`` e4m3, contiguous.
        k_scales: ``[S]`` float32, contiguous.
        weights: ``[T, heads]`` float32, contiguous.
        starts, ends: ``[T]`` int32, the first key that a token sees and one past the last; empty is allowed. Tokens
            share tiles of keys with their neighbours, so neighbours with ranges far apart cost time.
        max_len: if given, column c of row t is key ``starts[t] + c`` and there are `max_len` columns, vLLM 0.33's
            compressed form; otherwise column c is key c, and there are S.
        clean: fill the columns outside the row's range with -inf; otherwise they are not written.
        out, config: as for `index_logits_paged`.

    Returns:
        ``[T, S]`` or ``[T, max_len]`` float32; if allocated, its row stride is a multiple of 64.
    """
    tokens, heads, _ = q.shape
    device = q.device
    columns = k.shape[0] if max_len is None else max_len
    out = empty_logits(tokens, columns, device) if out is None else out
    if out.numel() == 0:
        return out
    arch, num_sms = device_facts(device)
    config = select_indexer(arch, "ragged") if config is None else config
    dtype = torch.float8_e4m3fn if config.fp8 else torch.uint16
    row_blocks = triton.cdiv(tokens, config.block_r)
    # Few tokens: several programs share a row block's keys, so that every multiprocessor has work.
    splits = max(min(2 * num_sms * config.programs_per_sm // row_blocks, triton.cdiv(columns, 4 * config.block_n)), 1)
    ragged_logits_kernel[(row_blocks, splits)](
        q.view(dtype),
        k.view(dtype),
        k_scales,
        weights,
        starts,
        ends,
        out,
        tokens,
        k.shape[0],
        columns,
        out.stride(0),
        HEADS=heads,
        COMPRESSED=max_len is not None,
        CLEAN=clean,
        FP8=config.fp8,
        BLOCK_R=config.block_r,
        BLOCK_HEADS=max(next_power_of_2(heads), 16),
        BLOCK_N=config.block_n,
        STAGES=config.num_stages,
        INTERPRETED=interpreted(),
        **dependent_launch(device),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out


def page_words(index_cache: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A cache's pages as elements of `dtype`, for a kernel that takes their address and stride.

    Raises:
        ValueError: not a cache of `indexer_layout`, or pages that are not aligned for vectors of 16 bytes.
    """
    pages, size, width = index_cache.shape
    if width != INDEX_BYTES or index_cache.dtype != torch.uint8:
        raise ValueError(
            f"index cache must be [num_pages, page_size, {INDEX_BYTES}] uint8, "
            f"got {list(index_cache.shape)} {index_cache.dtype}"
        )
    if index_cache.stride(0) % 16 or index_cache.data_ptr() % 16 or size * INDEX_DIM % SCALE_BYTES:
        raise ValueError(f"index cache pages must begin at multiples of 16 bytes, got stride {index_cache.stride(0)}")
    return index_cache.as_strided((pages, size * width), (index_cache.stride(0), 1)).view(dtype)
