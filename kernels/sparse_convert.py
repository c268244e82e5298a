# SPDX-License-Identifier: Apache-2.0
"""Rows of an `fp8_ds_mla` cache as bfloat16, for prefill with many heads.

A prefilled request reads each of its rows hundreds of times, and the kernel for 16-bit rows is faster than the one that
widens codes each time; so vLLM's backend converts a long prompt's once a layer (`SparsePlan.converts`). Scales that are
powers of two, as vLLM's and this project's writers make them, lose nothing; others round each value to bfloat16, which
is why the operators, whose caches may be anyone's, do not do it.
"""

import torch
import triton
import triton.language as tl

from . import layout
from .common import interpreted
from .e4m3 import round_to_bfloat16, widen_pair_bfloat16

_PAIRS = tl.constexpr(layout.D_V // 2)
_D_ROPE = tl.constexpr(layout.D_ROPE)
_PAIRS_OF_GROUP = tl.constexpr(layout.QUANT_GROUP // 2)
_SCALES_AT = tl.constexpr(layout.DS_MLA_SCALES_OFFSET // 4)
_ROPE_AT = tl.constexpr(layout.DS_MLA_ROPE_OFFSET // 2)
_ROW_ELEMENTS = tl.constexpr(layout.DS_MLA_ROW_BYTES // 2)
_UNIT_BYTES = 16
_UNIT_ELEMENTS = tl.constexpr(_UNIT_BYTES // 2)
_ROWS_OF_PROGRAM = 8


def rows_to_bfloat16(
    cache: torch.Tensor, pages: torch.Tensor | None, rows: int, out: torch.Tensor | None = None
) -> torch.Tensor:
    """A request's first rows in bfloat16. Shapes and dtypes are trusted.

    Args:
        cache: ``[num_pages, page_size, 656]`` in the format `fp8_ds_mla`; pages any multiple of 16 bytes apart.
        pages: ``[max_pages]`` int32, the request's row of a block table; without it the cache is taken as it lies.
        rows: how many. Those past the request's pages are set to 0.
        out: ``[rows, 576]`` bfloat16, contiguous, allocated if not given.

    Returns:
        out.
    """
    num_pages, page_size, _ = cache.shape
    out = torch.empty(rows, layout.D_QK, dtype=torch.bfloat16, device=cache.device) if out is None else out
    if rows:
        kernel_arguments = (
            cache.view(torch.uint16),
            cache if pages is None else pages,  # any pointer
            out.view(torch.uint16),
            rows,
            num_pages,
            num_pages if pages is None else len(pages),
            cache.stride(0) // _UNIT_BYTES,
        )
        convert_kernel[(triton.cdiv(rows, _ROWS_OF_PROGRAM),)](
            *kernel_arguments,
            PAGE_SIZE=page_size,
            HAS_PAGES=pages is not None,
            ROWS=_ROWS_OF_PROGRAM,
            INTERPRETED=interpreted(),
            num_warps=4,
        )
    return out


@triton.jit
def _bits(x, INTERPRETED: tl.constexpr):
    rounded = round_to_bfloat16(x, INTERPRETED).to(tl.float32)
    return rounded.to(tl.uint32, bitcast=True) >> 16


@triton.jit(do_not_specialize=["rows", "num_pages", "max_pages"])
def convert_kernel(
    cache,  # [num_pages, PAGE_SIZE, 656] as uint16
    pages,  # [max_pages] int32
    out,  # [rows, 576] bfloat16 as uint16
    rows,
    num_pages,
    max_pages,
    page_stride,  # in 16 bytes, so that Triton sees what copies may be wide
    PAGE_SIZE: tl.constexpr,
    HAS_PAGES: tl.constexpr,
    ROWS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    wanted = row < rows
    page = row // PAGE_SIZE
    wanted_page = wanted & (page < max_pages)
    if HAS_PAGES:
        page = tl.load(pages + page, mask=wanted_page, other=-1)
    live = wanted_page & (page >= 0) & (page < num_pages)
    source = cache + page.to(tl.int64) * page_stride * _UNIT_ELEMENTS + (row % PAGE_SIZE) * _ROW_ELEMENTS
    target = out + row.to(tl.int64) * (2 * _PAIRS + _D_ROPE)
    pair = tl.arange(0, _PAIRS)
    codes = tl.load(source[:, None] + pair[None, :], mask=live[:, None], other=0)
    scales = source.to(tl.pointer_type(tl.float32), bitcast=True) + _SCALES_AT
    scale = tl.load(scales[:, None] + (pair // _PAIRS_OF_GROUP)[None, :], mask=live[:, None], other=0.0)
    low, high = widen_pair_bfloat16(codes, INTERPRETED)
    words = _bits(low.to(tl.float32) * scale, INTERPRETED) | _bits(high.to(tl.float32) * scale, INTERPRETED) << 16
    words_of_row = target.to(tl.pointer_type(tl.uint32), bitcast=True)
    tl.store(words_of_row[:, None] + pair[None, :], words, mask=wanted[:, None])
    column = tl.arange(0, _D_ROPE)
    rope = tl.load(source[:, None] + _ROPE_AT + column[None, :], mask=live[:, None], other=0)
    tl.store(target[:, None] + 2 * _PAIRS + column[None, :], rope, mask=wanted[:, None])
