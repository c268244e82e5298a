# SPDX-License-Identifier: Apache-2.0
"""e4m3 codes inside Triton kernels: widened to 16-bit floats, exactly and two neighbours at a time, and rounded to.

On compute capability 8.0 Triton has no e4m3, and its own 16-bit integer arithmetic takes a register and a byte shuffle
a value: a few instructions on two pairs at once are written out instead. The interpreter cannot run them, so there the
same is written in Triton.
"""

import triton
import triton.language as tl

from .layout import E4M3_MAX

_E4M3_MAX = tl.constexpr(E4M3_MAX)


@triton.jit
def widen_pair(pair, INTERPRETED: tl.constexpr):
    """Two e4m3 codes in a uint16, the earlier one below, to two float16 values divided by 2^8.

    A code's sign goes to bit 15, exponent and mantissa to bits 13..7: exact for subnormals too; NaN becomes 480 / 2^8.
    """
    if INTERPRETED:
        low = ((pair & 0x80) << 8) | ((pair & 0x7F) << 7)
        high = (pair & 0x8000) | ((pair & 0x7F00) >> 1)
    else:
        low, high = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 sign, rest;
            shl.b32 sign, $2, 8;
            and.b32 sign, sign, 0x80008000;
            shl.b32 rest, $2, 7;
            and.b32 rest, rest, 0x3f803f80;
            or.b32 $0, sign, rest;
            and.b32 sign, $2, 0x80008000;
            shr.u32 rest, $2, 1;
            and.b32 rest, rest, 0x3f803f80;
            or.b32 $1, sign, rest;
            }
            """,
            constraints="=r,=r,r",
            args=[pair],
            dtype=(tl.uint16, tl.uint16),
            is_pure=True,
            pack=2,
        )
    return low.to(tl.float16, bitcast=True), high.to(tl.float16, bitcast=True)


@triton.jit
def widen_pair_bfloat16(pair, INTERPRETED: tl.constexpr):
    """Two e4m3 codes in a uint16, the earlier one below, to two bfloat16 values; float32 in the interpreter.

    Exponent and mantissa go to bits 10..4, which is the value times 2^-120; a product with 2^120 ends it. That one is
    exact, because it takes and gives subnormal numbers as they are. NaN becomes 480.
    """
    if INTERPRETED:
        low, high = widen_pair(pair, INTERPRETED)
        return low.to(tl.float32) * 256.0, high.to(tl.float32) * 256.0
    else:
        low, high = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 sign, rest, scale, zero;
            mov.b32 scale, 0x7b807b80;
            mov.b32 zero, 0x80008000;
            shl.b32 sign, $2, 8;
            and.b32 sign, sign, 0x80008000;
            shl.b32 rest, $2, 4;
            and.b32 rest, rest, 0x07f007f0;
            or.b32 rest, sign, rest;
            fma.rn.bf16x2 $0, rest, scale, zero;
            and.b32 sign, $2, 0x80008000;
            shr.u32 rest, $2, 4;
            and.b32 rest, rest, 0x07f007f0;
            or.b32 rest, sign, rest;
            fma.rn.bf16x2 $1, rest, scale, zero;
            }
            """,
            constraints="=&r,=r,r",
            args=[pair],
            dtype=(tl.uint16, tl.uint16),
            is_pure=True,
            pack=2,
        )
        return low.to(tl.bfloat16, bitcast=True), high.to(tl.bfloat16, bitcast=True)


@triton.jit
def round_to_bfloat16(x, INTERPRETED: tl.constexpr):
    """Finite float32 values rounded to bfloat16, to nearest even; the interpreter's own cast would truncate."""
    if INTERPRETED:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return bits.to(tl.float32, bitcast=True)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def to_e4m3(x):
    """float32 rounded to e4m3 codes (uint8), to nearest even, values beyond 448 to 448; NaN stays NaN."""
    bits = x.to(tl.uint32, bitcast=True)
    sign = (bits >> 24) & 0x80
    size = tl.minimum(tl.abs(x), _E4M3_MAX)
    bits = size.to(tl.uint32, bitcast=True)
    # From 2^-6 on: keep 3 bits of the mantissa, and take 120 off the exponent, whose bias is 7 instead of 127.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # Below, codes are multiples of 2^-9, what the last place of a number just above 2^14 is worth.
    shifted = (size + 16384.0).to(tl.uint32, bitcast=True)
    code = tl.where(size < 0.015625, shifted - 0x46800000, normal)
    return (tl.where(x != x, 0x7F, code) | sign).to(tl.uint8)
