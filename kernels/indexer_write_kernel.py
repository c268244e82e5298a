# SPDX-License-Identifier: Apache-2.0
"""Kernel that quantises indexer keys and stores them in the paged cache, in integer arithmetic on any GPU."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .e4m3 import to_e4m3
from .indexer_layout import INDEX_DIM, SMALLEST_AMAX
from .layout import E4M3_MAX

_DIM = tl.constexpr(INDEX_DIM)
_LARGEST = tl.constexpr(E4M3_MAX)
_LEAST = tl.constexpr(SMALLEST_AMAX)


@triton.jit(do_not_specialize=["tokens"])
def write_index_kernel(
    k,  # [tokens, 128]
    cache,  # uint8, pages of PAGE_SIZE * 128 codes and PAGE_SIZE float32 scales
    slot_mapping,  # [tokens]
    tokens,
    k_stride,
    page_stride,
    PAGE_SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.arange(0, _DIM)
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    slot = tl.load(slot_mapping + token, mask=token < tokens, other=-1).to(tl.int64)
    live = slot >= 0
    place = k + token.to(tl.int64)[:, None] * k_stride + column[None, :]
    x = tl.load(place, mask=live[:, None], other=0.0).to(tl.float32)
    # The power of two at or above amax / 448, from the bits of the quotient: no mantissa, or one exponent more. Normal
    # numbers on all sides, and the reciprocal of a power of two is exact.
    ratio = (tl.maximum(tl.max(tl.abs(x), 1), _LEAST) / _LARGEST).to(tl.int32, bitcast=True)
    exponent = (ratio + 0x7FFFFF) >> 23
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    scaled = tl.minimum(tl.maximum(x * inverse[:, None], -_LARGEST), _LARGEST)
    page = cache + (slot // PAGE_SIZE) * page_stride
    offset = slot % PAGE_SIZE
    tl.store((page + offset * _DIM)[:, None] + column[None, :], to_e4m3(scaled), mask=live[:, None])
    scales = (page + PAGE_SIZE * _DIM + offset * 4).to(tl.pointer_type(tl.float32), bitcast=True)
    tl.store(scales, scale, mask=live)
