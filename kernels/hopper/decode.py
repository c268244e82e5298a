# SPDX-License-Identifier: Apache-2.0
"""Dense MLA decode on Hopper: one launch of a CUDA kernel that schedules, decodes and merges."""

import ctypes

import torch

from .. import layout
from ..common import LOG2_E
from ..plan import DecodePlan
from . import cluster as cluster_size
from . import launch, row_blocks, variant_of
from .params import Params, Schedule, Strides

_ROW_BYTES = {"bf16": 1152, "fp16": 1152, "fp8": 576, "fp8_ds_mla": 656}


def tensor_maps(cache: torch.Tensor, name: str) -> tuple[bytes, ...]:
    """Descriptors of a paged cache: latent part in blocks of 128 bytes; of 8-bit caches also rope part and scales."""
    pages, page_size = cache.shape[:2]
    row, page, group = _ROW_BYTES[name], cache.stride(0) * cache.element_size(), 8
    start = cache.data_ptr()
    if name in ("bf16", "fp16"):
        return (launch.tensor_map(start, 2, (64, page_size, 9, pages), (row, 128, page), (64, group, 9, 1), 128),)
    latent = launch.tensor_map(start, 1, (128, page_size, 4, pages), (row, 128, page), (128, group, 4, 1), 128)

    def part(offset: int, width: int, swizzle: int) -> bytes:
        return launch.tensor_map(start + offset, 1, (width, page_size, pages), (row, page), (width, group, 1), swizzle)

    if name == "fp8":
        return latent, part(512, 64, 64)
    return latent, part(528, 128, 128), part(512, 16, 0)


def twowg_tensor_maps(cache: torch.Tensor) -> tuple[bytes, ...]:
    """Descriptors of a 16-bit paged cache for the twowg kernel, which copies quarters of a tile: latent, rope part."""
    pages, page_size = cache.shape[:2]
    page = cache.stride(0) * cache.element_size()
    groups = min(64, page_size & -page_size) // 8  # of 8 tokens, that a copy takes from a page
    shape, strides = (64, 8, 9, page_size // 8, pages), (1152, 128, 8 * 1152, page)
    return tuple(
        launch.tensor_map(cache.data_ptr(), 2, shape, strides, (64, 8, blocks, groups, 1), 128) for blocks in (2, 1)
    )


def decode(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    workspace: tuple[torch.Tensor, ...],
    *,
    plan: DecodePlan,
    sm_scale: float,
    causal: bool,
    k_scale: float | torch.Tensor,
) -> None:
    """Launch on the current device and stream; arguments as in `dense_decode.mla_decode`, none left out."""
    b, s_q, h_q, _ = q_nope.shape
    params, config, rows = plan.params, plan.config, s_q * h_q
    name = layout.cache_format(cache)
    blocks, cluster = row_blocks(config, rows), cluster_size(config, rows)
    maps = twowg_tensor_maps(cache) if config.kernel == "twowg" else tensor_maps(cache, name)
    p = Params()
    for field, encoded in zip(("latent", "rope", "scales"), maps, strict=False):
        ctypes.memmove(getattr(p, field), encoded, 128)
    p.q_nope, p.q_rope, p.out, p.lse = q_nope.data_ptr(), q_rope.data_ptr(), out.data_ptr(), lse.data_ptr()
    p.block_table, p.seq_lens = block_table.data_ptr(), seq_lens.data_ptr()
    p.partial_out, p.partial_lse = workspace[0].data_ptr(), workspace[1].data_ptr()
    arrivals = launch.counters(b * blocks)  # alive until the launch
    p.arrivals = arrivals.data_ptr()
    if isinstance(k_scale, torch.Tensor):
        p.k_scale = k_scale.data_ptr()
    else:
        p.k_scale_value = k_scale
    p.q_nope_stride = Strides(*q_nope.stride()[:3])
    p.q_rope_stride = Strides(*q_rope.stride()[:3])
    p.table_stride = block_table.stride(0)
    p.schedule = Schedule(
        b, params.num_programs, params.fixed_tiles, params.min_tiles, params.min_tiles, params.batch_invariant,
        params.max_splits,
    )  # fmt: skip
    p.scale_log2 = sm_scale * LOG2_E
    p.s_q, p.h_q, p.causal, p.page_size = s_q, h_q, causal and s_q > 1, cache.shape[1]
    p.q_is_fp16 = q_nope.dtype == torch.float16
    launch.launch(variant_of(config, name, rows), p, (blocks, params.num_programs), cluster)
