# SPDX-License-Identifier: Apache-2.0
# The functions build tuples piece by piece, which Triton unrolls and mypy cannot follow.
# mypy: disable-error-code="assignment, misc"
"""A block of query rows attends to a tile of cache rows: the arithmetic of portable decode kernels in Triton.

A kernel decides which rows these are; here they are pointers and masks. For each tile: S = Q K^T over 512 latent and 64
rope values, online softmax, O += P V, where V is the latent part of the K tile that is already on chip.

An fp8 tile is widened to float16, which holds every e4m3 value exactly, by integer instructions on pairs of values; as
a tile of 16-bit elements it takes the same path through shared memory to the matrix unit as a 16-bit cache does. The
query is scaled into float16's range by a power of two per row, P in float16 is more accurate than in bfloat16, and
`k_scale` is applied to the scores and to the output, never to the elements of the tile.

In an `fp8_ds_mla` row the rope part is bfloat16 and each quarter of the latent has a float32 scale of its own, of any
size. So the query stays bfloat16 and the codes are widened to bfloat16, exactly too; the four quarters are separate
operands, and their scales are applied to four partial scores, and to P before each quarter's P V. Every product of a
score is exact and P is rounded once, as beside a bfloat16 cache.

Pairs of e4m3 values make even and odd columns separate operands, and the latent's columns are taken in GROUPS equal
groups: `SCALE_GROUPS` for `fp8_ds_mla`, any number for other formats. Narrow groups spread a row over few threads, so
that a thread computes the addresses of few rows. So a query is a tuple `q` of operands, one a group, another, `q_odd`,
of the odd columns (empty for 16-bit caches), and the rope part `r` with its own `r_odd`; and the output is accumulated
in `acc` and `acc_odd`.
"""

import triton
import triton.language as tl

from . import layout
from .e4m3 import round_to_bfloat16, widen_pair, widen_pair_bfloat16

SCALE_GROUPS = tl.constexpr(layout.D_V // layout.QUANT_GROUP)
_SCALES_OFFSET = tl.constexpr(layout.DS_MLA_SCALES_OFFSET)
_ROPE_OFFSET = tl.constexpr(layout.DS_MLA_ROPE_OFFSET)
_ROW_BYTES = tl.constexpr(layout.DS_MLA_ROW_BYTES)
D_V = tl.constexpr(layout.D_V)
_D_ROPE = tl.constexpr(layout.D_ROPE)


@triton.jit
def _dot(a, b, acc, INTERPRETED: tl.constexpr):
    if INTERPRETED:  # its dot of bf16 is wrong
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a, b, acc)


@triton.jit
def _power_of_two_above(x):
    """Exponent e with x <= 2^e for positive x, taken from the bits, so exact."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits >> 23) - 126


@triton.jit
def row_elements(EIGHT_BIT: tl.constexpr, DS_MLA: tl.constexpr):
    """Width of a cache row in elements of 16 bits."""
    WIDTH: tl.constexpr = _ROW_BYTES // 2 if DS_MLA else (D_V + _D_ROPE) // (2 if EIGHT_BIT else 1)
    return WIDTH


@triton.jit
def load_query(
    q_row,
    r_row,
    row_in,
    scale_log2,
    k_scale,
    GROUPS: tl.constexpr,
    EIGHT_BIT: tl.constexpr,
    DS_MLA: tl.constexpr,
):
    """Query operands and the scale of their scores.

    Args:
        q_row, r_row: pointers ``[BLOCK_H]`` to the latent and rope part of each row.
        row_in: ``[BLOCK_H]``, which rows exist.
        scale_log2: softmax scale times log2(e).
        k_scale: of an `fp8` cache.

    Returns:
        q, q_odd, r, r_odd, and the factor that makes a dot product a score in base 2.
    """
    D_GROUP: tl.constexpr = D_V // GROUPS
    column = tl.arange(0, D_GROUP)
    column_rope = tl.arange(0, _D_ROPE)
    q = ()
    q_odd = ()
    for g in tl.static_range(GROUPS):
        q_group = tl.load(q_row[:, None] + g * D_GROUP + column[None, :], mask=row_in[:, None], other=0.0)
        if EIGHT_BIT:
            even, odd = tl.split(tl.reshape(q_group, [q_row.shape[0], D_GROUP // 2, 2]))
            q += (even,)
            q_odd += (odd,)
        else:
            q += (q_group,)
    r = tl.load(r_row[:, None] + column_rope[None, :], mask=row_in[:, None], other=0.0)
    r_odd = r
    score_scale = scale_log2
    if EIGHT_BIT and not DS_MLA:
        r, r_odd = tl.split(tl.reshape(r, [r_row.shape[0], _D_ROPE // 2, 2]))
        # Into float16 by a power of two per row: bf16's 8 bits fit, its exponent range may not.
        largest = tl.maximum(tl.max(tl.abs(q[0]).to(tl.float32), 1), tl.max(tl.abs(q_odd[0]).to(tl.float32), 1))
        for g in tl.static_range(1, GROUPS):
            largest = tl.maximum(largest, tl.max(tl.abs(q[g]).to(tl.float32), 1))
            largest = tl.maximum(largest, tl.max(tl.abs(q_odd[g]).to(tl.float32), 1))
        largest = tl.maximum(largest, tl.max(tl.abs(r).to(tl.float32), 1))
        largest = tl.maximum(largest, tl.max(tl.abs(r_odd).to(tl.float32), 1))
        exponent = _power_of_two_above(tl.maximum(largest, 1e-30)).to(tl.float32)
        down = tl.exp2(-exponent)[:, None]
        scaled = ()
        scaled_odd = ()
        for g in tl.static_range(GROUPS):
            scaled += ((q[g].to(tl.float32) * down).to(tl.float16),)
            scaled_odd += ((q_odd[g].to(tl.float32) * down).to(tl.float16),)
        q = scaled
        q_odd = scaled_odd
        r = (r.to(tl.float32) * down).to(tl.float16)
        r_odd = (r_odd.to(tl.float32) * down).to(tl.float16)
        score_scale = (scale_log2 * k_scale * tl.exp2(exponent + 8.0))[:, None]  # 2^8: see e4m3.widen_pair
    return q, q_odd, r, r_odd, score_scale


@triton.jit
def nothing_seen(BLOCK_H: tl.constexpr, GROUPS: tl.constexpr, EIGHT_BIT: tl.constexpr):
    """State before the first tile: top, the largest score so far; total, the sum of weights; acc, acc_odd."""
    PARTS: tl.constexpr = 2 if EIGHT_BIT else 1
    D_GROUP: tl.constexpr = D_V // GROUPS
    top = tl.full([BLOCK_H], -1.0e30, tl.float32)  # finite: a row without keys so far must not give NaN
    total = tl.zeros([BLOCK_H], tl.float32)
    acc = ()
    acc_odd = ()
    for _ in tl.static_range(GROUPS):
        acc += (tl.zeros([BLOCK_H, D_GROUP // PARTS], tl.float32),)
        if EIGHT_BIT:
            acc_odd += (tl.zeros([BLOCK_H, D_GROUP // PARTS], tl.float32),)
    return top, total, acc, acc_odd


@triton.jit
def attend(
    q,
    q_odd,
    r,
    r_odd,
    score_scale,
    token,  # [BLOCK_N], pointers to cache rows
    live,  # [BLOCK_N], rows to read; the others count as zero and are not touched
    visible,  # [BLOCK_H or 1, BLOCK_N], which query row sees which of them
    top,
    total,
    acc,
    acc_odd,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUPS: tl.constexpr,
    EIGHT_BIT: tl.constexpr,
    DS_MLA: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The state after one more tile."""
    PARTS: tl.constexpr = 2 if EIGHT_BIT else 1
    ROPE_PARTS: tl.constexpr = 1 if DS_MLA else PARTS
    D_GROUP: tl.constexpr = D_V // GROUPS
    ROPE: tl.constexpr = _ROPE_OFFSET // 2 if DS_MLA else D_V // PARTS  # where the rope part begins, in elements
    column = tl.arange(0, D_GROUP // PARTS)
    column_rope = tl.arange(0, _D_ROPE // ROPE_PARTS)
    k = ()
    k_odd = ()
    for g in tl.static_range(GROUPS):
        k_group = token[:, None] + g * (D_GROUP // PARTS) + column[None, :]
        k += (tl.load(k_group, mask=live[:, None], other=0),)
    kr = tl.load(token[:, None] + ROPE + column_rope[None, :], mask=live[:, None], other=0)
    score = tl.zeros([BLOCK_H, BLOCK_N], tl.float32)
    if DS_MLA:
        tl.static_assert(GROUPS == SCALE_GROUPS)
        scales = (token + _SCALES_OFFSET // 2).to(tl.pointer_type(tl.float32), bitcast=True)
        scale = ()
        score = _dot(r, tl.trans(kr.to(tl.bfloat16, bitcast=True)), score, INTERPRETED)
        codes = k
        k = ()
        for g in tl.static_range(GROUPS):
            scale += (tl.load(scales + g, mask=live, other=0.0),)
            even, odd = widen_pair_bfloat16(codes[g], INTERPRETED)
            k += (even,)
            k_odd += (odd,)
            part = _dot(q[g], tl.trans(even), tl.zeros([BLOCK_H, BLOCK_N], tl.float32), INTERPRETED)
            part = _dot(q_odd[g], tl.trans(odd), part, INTERPRETED)
            score += part * scale[g][None, :]
    else:
        if EIGHT_BIT:
            codes = k
            k = ()
            for g in tl.static_range(GROUPS):
                even, odd = widen_pair(codes[g], INTERPRETED)
                k += (even,)
                k_odd += (odd,)
            kr, kr_odd = widen_pair(kr, INTERPRETED)
            for g in tl.static_range(GROUPS):
                score = _dot(q_odd[g], tl.trans(k_odd[g]), score, INTERPRETED)
            score = _dot(r_odd, tl.trans(kr_odd), score, INTERPRETED)
        for g in tl.static_range(GROUPS):
            score = _dot(q[g], tl.trans(k[g]), score, INTERPRETED)
        score = _dot(r, tl.trans(kr), score, INTERPRETED)
    score = tl.where(visible, score * score_scale, -float("inf"))
    new_top = tl.maximum(top, tl.max(score, 1))
    weight = tl.exp2(score - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(weight, 1)
    new_acc = ()
    new_acc_odd = ()
    for g in tl.static_range(GROUPS):
        if DS_MLA:
            p = round_to_bfloat16(weight * scale[g][None, :], INTERPRETED)
        else:
            p = weight.to(k[g].dtype)
        new_acc += (_dot(p, k[g], acc[g] * shrink[:, None], INTERPRETED),)
        if EIGHT_BIT:
            new_acc_odd += (_dot(p, k_odd[g], acc_odd[g] * shrink[:, None], INTERPRETED),)
    return new_top, total, new_acc, new_acc_odd


@triton.jit
def finish(top, total, acc, acc_odd, k_scale, GROUPS: tl.constexpr, EIGHT_BIT: tl.constexpr, DS_MLA: tl.constexpr):
    """Output of all tiles, one operand a group, and its log-sum-exp in base 2: 0 and -inf for a row without keys."""
    seen = total > 0
    norm = tl.where(seen, 1.0 / total, 0.0)
    if EIGHT_BIT and not DS_MLA:
        norm *= k_scale * 256.0
    result = ()
    for g in tl.static_range(GROUPS):
        if EIGHT_BIT:
            result += (tl.interleave(acc[g] * norm[:, None], acc_odd[g] * norm[:, None]),)
        else:
            result += (acc[g] * norm[:, None],)
    return result, tl.where(seen, top + tl.log2(total), -float("inf"))


@triton.jit
def scale_output(result, factor, GROUPS: tl.constexpr):
    """`finish`'s output with its rows multiplied by `factor` ``[BLOCK_H]``."""
    scaled = ()
    for g in tl.static_range(GROUPS):
        scaled += (result[g] * factor[:, None],)
    return scaled


@triton.jit
def store_output(out, index, result, row_in, GROUPS: tl.constexpr):
    """Store `finish`'s output to the rows `index` of `out`, whose rows are 512 wide."""
    D_GROUP: tl.constexpr = D_V // GROUPS
    column_out = tl.arange(0, D_GROUP)
    for g in tl.static_range(GROUPS):
        place = index[:, None] * D_V + g * D_GROUP + column_out[None, :]
        tl.store(out + place, result[g].to(out.dtype.element_ty), mask=row_in[:, None])
