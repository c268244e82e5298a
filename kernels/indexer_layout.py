# SPDX-License-Identifier: Apache-2.0
"""Byte layout of the indexer's key cache, and the quantisation of its keys.

DeepSeek Sparse Attention's indexer (DeepSeek-V3.2, arXiv 2512.02556) caches one key of 128 values a token as e4m3 codes
with one float32 scale, a power of two. A cache is ``[num_pages, page_size, 132]`` uint8, as vLLM allocates it, but a
page is not made of rows of 132: it holds the codes of all its tokens, then their scales. The page stride is
``cache.stride(0)`` and may exceed ``page_size * 132``.
"""

import torch

from .layout import E4M3_MAX

INDEX_DIM = 128
"""Values of an indexer key, and of a head of the indexer's query."""
SCALE_BYTES = 4
INDEX_BYTES = INDEX_DIM + SCALE_BYTES
"""Bytes that a token takes in a page."""
SMALLEST_AMAX = 1e-4
"""A key is scaled as if its largest value were at least this."""


def page_views(cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of a cache: codes ``[num_pages, page_size, 128]`` uint8 and scales ``[num_pages, page_size]`` float32.

    Raises:
        ValueError: not a cache of this layout, or pages that overlap or whose scales are not aligned to 4 bytes.
    """
    if cache.dim() != 3 or cache.dtype != torch.uint8 or cache.shape[2] != INDEX_BYTES:
        raise ValueError(
            f"index cache must be [num_pages, page_size, {INDEX_BYTES}] uint8, got {list(cache.shape)} {cache.dtype}"
        )
    pages, size, _ = cache.shape
    stride = cache.stride(0)
    if cache.stride(1) != INDEX_BYTES or cache.stride(2) != 1 or stride < size * INDEX_BYTES:
        raise ValueError(f"index cache pages must be contiguous, got strides {list(cache.stride())}")
    if any(n % SCALE_BYTES for n in (stride, cache.storage_offset(), size * INDEX_DIM)):
        raise ValueError(f"index cache pages must begin at multiples of {SCALE_BYTES} bytes, got stride {stride}")
    flat = cache.as_strided((pages, size * INDEX_BYTES), (stride, 1))
    codes = flat[:, : size * INDEX_DIM].unflatten(1, (size, INDEX_DIM))
    return codes, flat[:, size * INDEX_DIM :].view(torch.float32)


def quantise_keys(k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Indexer keys ``[T, 128]`` of any float dtype as e4m3 ``[T, 128]`` and float32 scales ``[T]``, powers of two.

    The scale is the smallest power of two that brings the largest value to 448 or less, as vLLM's
    `indexer_k_quant_and_cache` chooses it with `ue8m0`.
    """
    k = k.float()
    mantissa, exponent = torch.frexp(k.abs().amax(-1).clamp_min(SMALLEST_AMAX) / E4M3_MAX)
    scales = torch.ldexp(torch.ones_like(mantissa), exponent - (mantissa == 0.5).int())
    return (k / scales.unsqueeze(-1)).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scales
