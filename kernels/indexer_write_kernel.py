# SPDX-License-Identifier: Apache-2.0
"""Kernel that quantises indexer keys and stores them in the paged cache, in integer arithmetic on any GPU."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .indexer_layout import INDEX_DIM, SMALLEST_AMAX
from .layout import E4M3_MAX

_DIM = tl.constexpr(INDEX_DIM)
_LARGEST = tl.constexpr(E4M3_MAX)
_LEAST = tl.constexpr(SMALLEST_AMAX)


@triton.jit
def _round_to_e4m3(x):
    """Codes of float32 values of at most 448 in size, rounded to nearest even; NaN becomes 0x7F or 0xFF.

    Compute capability 8.0 has no such conversion, and the interpreter's truncates.
    """
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # Normal codes: drop 20 bits of the mantissa and make the exponent's bias 7 instead of 127.
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 codes count in steps of 2^-9: adding 2^14 leaves no finer bits in a float32.
    step = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(size < (121 << 23), step, normal)
    code = tl.where(size > 0x7F800000, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


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
    tl.store((page + offset * _DIM)[:, None] + column[None, :], _round_to_e4m3(scaled), mask=live[:, None])
    scales = (page + PAGE_SIZE * _DIM + offset * 4).to(tl.pointer_type(tl.float32), bitcast=True)
    tl.store(scales, scale, mask=live)
