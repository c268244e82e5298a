# SPDX-License-Identifier: Apache-2.0
"""Writer of the indexer's key cache in portable Triton; `indexer_reference` has its twin in PyTorch."""

import torch
import triton

from .common import dependent_launch
from .indexer_layout import page_views
from .indexer_write_kernel import write_index_kernel

_BLOCK_T = 4


def write_index_cache(k: torch.Tensor, index_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Quantise indexer keys and store them in the paged cache, as vLLM's `indexer_k_quant_and_cache` with `ue8m0`.

    The bytes are those of `indexer_reference.write_index_cache`. Slots are trusted.

    Args:
        k: ``[T, 128]`` bf16, fp16 or float32, contiguous rows with any stride between them; rows beyond
            ``len(slot_mapping)`` are ignored.
        index_cache: ``[num_pages, page_size, 132]`` uint8, see `indexer_layout`; written in place.
        slot_mapping: ``[t]`` int64 or int32, ``page * page_size + offset`` of each token; a negative one skips it.

    Raises:
        ValueError: not an index cache.
    """
    page_views(index_cache)
    tokens = slot_mapping.numel()
    if tokens == 0:
        return
    write_index_kernel[(triton.cdiv(tokens, _BLOCK_T),)](
        k,
        index_cache,
        slot_mapping,
        tokens,
        k.stride(0),
        index_cache.stride(0),
        PAGE_SIZE=index_cache.shape[1],
        BLOCK_T=_BLOCK_T,
        **dependent_launch(k.device),
        num_warps=4,
    )
