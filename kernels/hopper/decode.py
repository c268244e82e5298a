# SPDX-License-Identifier: Apache-2.0
"""Dense MLA decode on Hopper: one launch of a CUDA kernel that schedules, decodes and merges."""

import ctypes

import torch

from .. import layout
from ..common import LOG2_E
from . import launch

_ROW_BYTES = {"bf16": 1152, "fp16": 1152, "fp8": 576, "fp8_ds_mla": 656}


def tensor_maps(cache: torch.Tensor, name: str) -> tuple[bytes, ...]:
    """Descriptors of a paged cache: its latent part in blocks of 128 bytes, and of 8-bit caches rope part and scales."""
    pages, page_size = cache.shape[:2]
    row, page, group = _ROW_BYTES[name], cache.stride(0) * cache.element_size(), 8
    start = cache.data_ptr()
    if name in ("bf16", "fp16"):
        return (
            launch.tensor_map(start, 2, (64, page_size, 9, pages), (row, 128, page), (64, group, 9, 1), 128),
        )
    latent = launch.tensor_map(start, 1, (128, page_size, 4, pages), (row, 128, page), (128, group, 4, 1), 128)

    def part(offset: int, width: int, swizzle: int) -> bytes:
        return launch.tensor_map(start + offset, 1, (width, page_size, pages), (row, page), (width, group, 1), swizzle)

    if name == "fp8":
        return latent, part(512, 64, 64)
    return latent, part(528, 128, 128), part(512, 16, 0)


def decode(
    q_nope, q_rope, cache, block_table, seq_lens, out, lse, workspace, *, variant, block_h, shared_bytes, params,
    sm_scale, causal, k_scale, cluster=1, min_share=1,
) -> None:
    """Launch; arguments as in `dense_decode.mla_decode`."""
    b, s_q, h_q, _ = q_nope.shape
    name = layout.cache_format(cache)
    p = launch.Params()
    for field, encoded in zip(("latent", "rope", "scales"), tensor_maps(cache, name), strict=False):
        ctypes.memmove(getattr(p, field), encoded, 128)
    partial_out, partial_lse, arrivals = workspace
    for field, tensor in (
        ("q_nope", q_nope), ("q_rope", q_rope), ("block_table", block_table), ("seq_lens", seq_lens), ("out", out), ("lse", lse),
        ("partial_out", partial_out), ("partial_lse", partial_lse), ("arrivals", arrivals),
    ):  # fmt: skip
        setattr(p, field, tensor.data_ptr())
    if isinstance(k_scale, torch.Tensor):
        p.k_scale = k_scale.data_ptr()
    else:
        p.k_scale_value = k_scale
    p.q_nope_stride = launch.Strides(*q_nope.stride()[:3])
    p.q_rope_stride = launch.Strides(*q_rope.stride()[:3])
    p.table_stride = block_table.stride(0)
    p.schedule = launch.Schedule(
        b, params.num_programs, params.fixed_tiles, params.min_tiles, min_share, params.batch_invariant, params.max_splits
    )
    p.scale_log2 = sm_scale * LOG2_E
    p.s_q, p.h_q, p.causal, p.page_size = s_q, h_q, causal and s_q > 1, cache.shape[1]
    p.q_is_fp16 = q_nope.dtype == torch.float16
    row_blocks = -(-s_q * h_q // block_h)
    launch.launch(variant, p, (row_blocks, params.num_programs), shared_bytes, cluster)
