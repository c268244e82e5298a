# SPDX-License-Identifier: Apache-2.0
"""Dense MLA decode on Hopper: one launch of a CUDA kernel that schedules, decodes and merges."""

import ctypes

import torch

from .. import layout
from ..common import LOG2_E
from ..plan import DecodePlan
from ..schedule import ScheduleParams
from ..select import DecodeConfig
from . import cluster as cluster_size
from . import launch, row_blocks, variant_of
from .params import Params, Schedule, Strides

_GROUP = 8  # tokens of a copy: kGroup in params.cuh


def copied_groups(page_size: int) -> int:
    """Groups of tokens that a copy takes from a page."""
    return min(64, page_size & -page_size) // _GROUP


def tensor_maps(cache: torch.Tensor, name: str) -> tuple[bytes, ...]:
    """Descriptors of a paged cache: latent part in blocks of 128 bytes; of 8-bit caches also rope part and scales.

    A copy brings as many groups of tokens as surely lie in one page, at most a tile.
    """
    pages, page_size = cache.shape[:2]
    start, row, page = cache.data_ptr(), layout.row_bytes(name), cache.stride(0) * cache.element_size()
    groups = copied_groups(page_size)

    def blocks(width: int, count: int, element_bytes: int) -> bytes:
        shape, box = (width, _GROUP, count, page_size // _GROUP, pages), (width, _GROUP, count, groups, 1)
        return launch.tensor_map(start, element_bytes, shape, (row, 128, _GROUP * row, page), box, 128)

    def part(offset: int, width: int, swizzle: int) -> bytes:
        shape, box = (width, page_size, pages), (width, _GROUP * groups, 1)
        return launch.tensor_map(start + offset, 1, shape, (row, page), box, swizzle)

    if name in ("bf16", "fp16"):
        return (blocks(64, layout.D_QK // 64, 2),)
    latent = blocks(128, layout.D_V // 128, 1)
    if name == "fp8":
        return latent, part(layout.D_V, layout.D_ROPE, 64)
    scales = layout.DS_MLA_ROPE_OFFSET - layout.DS_MLA_SCALES_OFFSET
    return latent, part(layout.DS_MLA_ROPE_OFFSET, 2 * layout.D_ROPE, 128), part(layout.DS_MLA_SCALES_OFFSET, scales, 0)


def twowg_tensor_maps(cache: torch.Tensor, name: str) -> tuple[bytes, ...]:
    """Descriptors of a paged cache for the twowg kernel, which copies quarters of a tile: latent, rope part."""
    pages, page_size = cache.shape[:2]
    size, start = cache.element_size(), cache.data_ptr()
    row, page = layout.row_bytes(name), cache.stride(0) * size
    groups = copied_groups(page_size)

    def blocks(offset: int, width: int, count: int, copied: int) -> bytes:
        shape, box = (width, _GROUP, count, page_size // _GROUP, pages), (width, _GROUP, copied, groups, 1)
        return launch.tensor_map(start + offset, size, shape, (row, 128, _GROUP * row, page), box, width * size)

    if name == "fp8":
        return blocks(0, 128, layout.D_V // 128, 1), blocks(layout.D_V, layout.D_ROPE, 1, 1)
    return tuple(blocks(0, 64, layout.D_QK // 64, copied) for copied in (2, 1))


def launch_params(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    lengths: torch.Tensor | int,
    out: torch.Tensor,
    lse: torch.Tensor,
    workspace: tuple[torch.Tensor, ...],
    config: DecodeConfig,
    schedule: ScheduleParams,
    sm_scale: float,
) -> tuple[Params, torch.Tensor]:
    """What all launches have: query, lengths, results, schedule. Also the counters, to be kept until the launch.

    `lengths` are ``[b]`` int32, or one for all.
    """
    b, s_q, h_q, _ = q_nope.shape
    p = Params()
    p.q_nope, p.q_rope, p.out, p.lse = q_nope.data_ptr(), q_rope.data_ptr(), out.data_ptr(), lse.data_ptr()
    length = 0
    if isinstance(lengths, torch.Tensor):
        p.seq_lens = lengths.data_ptr()
    else:
        length = lengths
    p.partial_out, p.partial_lse = workspace[0].data_ptr(), workspace[1].data_ptr()
    arrivals = launch.counters(b * row_blocks(config, s_q * h_q))
    p.arrivals = arrivals.data_ptr()
    p.q_nope_stride = Strides(*q_nope.stride()[:3])
    p.q_rope_stride = Strides(*q_rope.stride()[:3])
    p.schedule = Schedule(
        b, schedule.num_programs, schedule.fixed_tiles, schedule.min_tiles, schedule.min_tiles,
        schedule.batch_invariant, schedule.max_splits, length,
    )  # fmt: skip
    p.scale_log2 = sm_scale * LOG2_E
    p.s_q, p.h_q, p.q_is_fp16 = s_q, h_q, q_nope.dtype == torch.float16
    return p, arrivals


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
    s_q, h_q = q_nope.shape[1:3]
    config, rows = plan.config, s_q * h_q
    name = layout.cache_format(cache)
    cluster = cluster_size(config, rows)
    p, arrivals = launch_params(q_nope, q_rope, seq_lens, out, lse, workspace, config, plan.params, sm_scale)
    if config.kernel == "twowg_rows":
        p.cache, p.page_stride = cache.data_ptr(), cache.stride(0) * cache.element_size()
    else:
        maps = twowg_tensor_maps(cache, name) if config.kernel.startswith("twowg") else tensor_maps(cache, name)
        for field, encoded in zip(("latent", "rope", "scales"), maps, strict=False):
            ctypes.memmove(getattr(p, field), encoded, 128)
    p.block_table, p.table_stride, p.max_pages = block_table.data_ptr(), block_table.stride(0), block_table.shape[1]
    if isinstance(k_scale, torch.Tensor):
        p.k_scale = k_scale.data_ptr()
    else:
        p.k_scale_value = k_scale
    p.causal, p.page_size = causal and s_q > 1, cache.shape[1]
    grid = row_blocks(config, rows), plan.params.num_programs
    launch.launch(variant_of(config, name, rows), p, grid, cluster)
    del arrivals  # alive until the launch
