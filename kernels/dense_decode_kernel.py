# SPDX-License-Identifier: Apache-2.0
# The kernel builds tuples piece by piece, which Triton unrolls and mypy cannot follow.
# mypy: disable-error-code="assignment, misc"
"""Kernel of the portable split-KV MLA decode, over a paged bf16, fp16, per-tensor fp8 or `fp8_ds_mla` cache.

A program owns BLOCK_H query rows (s_q x h_q rows of a request share its cache, so they are packed together) and runs
through the items the scheduler gave it. For each tile of BLOCK_N tokens: S = Q K^T over 512 latent and 64 rope values,
online softmax, O += P V, where V is the latent part of the K tile that is already on chip. An item that is a whole
request writes the result, a part of one a float32 partial result for `combine`.

An fp8 tile is widened to float16, which holds every e4m3 value exactly, by integer instructions on pairs of values; as
a tile of 16-bit elements it takes the same path through shared memory to the matrix unit as a 16-bit cache does. The
query is scaled into float16's range by a power of two per row, P in float16 is more accurate than in bfloat16, and
`k_scale` is applied to the scores and to the output, never to the elements of the tile.

In an `fp8_ds_mla` row the rope part is bfloat16 and each quarter of the latent has a float32 scale of its own, of any
size. So the query stays bfloat16 and the codes are widened to bfloat16, exactly too; the four quarters are separate
operands, and their scales are applied to four partial scores, and to P before each quarter's P V. Every product of a
score is exact and P is rounded once, as beside a bfloat16 cache.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from . import layout
from .e4m3 import round_to_bfloat16, widen_pair, widen_pair_bfloat16

_GROUPS = tl.constexpr(layout.D_V // layout.QUANT_GROUP)
_SCALES_OFFSET = tl.constexpr(layout.DS_MLA_SCALES_OFFSET)
_ROPE_OFFSET = tl.constexpr(layout.DS_MLA_ROPE_OFFSET)
_ROW_BYTES = tl.constexpr(layout.DS_MLA_ROW_BYTES)


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


@triton.jit(do_not_specialize=["table_stride"])
def decode_kernel(
    q_nope,  # [b, S_Q, H_Q, 512]
    q_rope,  # [b, S_Q, H_Q, 64]
    cache,  # [num_pages, PAGE_SIZE, width]
    block_table,  # [b, max_pages]
    seq_lens,  # [b]
    program_begin,  # [programs + 1]
    items,  # [max_items, 4]
    out,  # [b, S_Q * H_Q, 512]
    lse,  # [b, S_Q * H_Q]
    partial_out,  # [max_slots, S_Q * H_Q, 512]
    partial_lse,  # [max_slots, S_Q * H_Q]
    k_scale_pointer,
    k_scale_value,
    scale_log2,
    q_nope_stride_b,
    q_nope_stride_s,
    q_nope_stride_h,
    q_rope_stride_b,
    q_rope_stride_s,
    q_rope_stride_h,
    page_stride,
    table_stride,
    S_Q: tl.constexpr,
    H_Q: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    CAUSAL: tl.constexpr,
    EIGHT_BIT: tl.constexpr,
    DS_MLA: tl.constexpr,
    K_SCALE_POINTER: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INTERPRETED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    D_V: tl.constexpr = 512
    D_ROPE: tl.constexpr = 64
    ROWS: tl.constexpr = S_Q * H_Q
    # e4m3 values are handled as pairs of neighbours: even and odd columns are separate operands.
    PARTS: tl.constexpr = 2 if EIGHT_BIT else 1
    ROPE_PARTS: tl.constexpr = 1 if DS_MLA else PARTS
    # So are latent values with separate scales: the operands of group g are q[g], k[g] and acc[g].
    GROUPS: tl.constexpr = _GROUPS if DS_MLA else 1
    D_GROUP: tl.constexpr = D_V // GROUPS
    # In elements of a cache row: its width and where its rope part begins.
    WIDTH: tl.constexpr = _ROW_BYTES // 2 if DS_MLA else (D_V + D_ROPE) // PARTS
    ROPE: tl.constexpr = _ROPE_OFFSET // 2 if DS_MLA else D_V // PARTS
    row = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    row_in = row < ROWS
    column = tl.arange(0, D_GROUP // PARTS)
    column_rope = tl.arange(0, D_ROPE // ROPE_PARTS)
    column_out = tl.arange(0, D_GROUP)
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    k_scale = k_scale_value
    if K_SCALE_POINTER:
        k_scale = tl.load(k_scale_pointer)

    program = tl.program_id(1)
    for item in range(tl.load(program_begin + program), tl.load(program_begin + program + 1)):
        request = tl.load(items + item * 4).to(tl.int64)
        tile_begin = tl.load(items + item * 4 + 1)
        tile_end = tl.load(items + item * 4 + 2)
        slot = tl.load(items + item * 4 + 3)
        seq_len = tl.load(seq_lens + request)

        q_row = q_nope + request * q_nope_stride_b + (row // H_Q) * q_nope_stride_s + (row % H_Q) * q_nope_stride_h
        r_row = q_rope + request * q_rope_stride_b + (row // H_Q) * q_rope_stride_s + (row % H_Q) * q_rope_stride_h
        q = ()
        for g in tl.static_range(GROUPS):
            q_group = q_row[:, None] + g * D_GROUP + column[None, :] * PARTS
            q += (tl.load(q_group, mask=row_in[:, None], other=0.0),)
        r = tl.load(r_row[:, None] + column_rope[None, :] * ROPE_PARTS, mask=row_in[:, None], other=0.0)
        q_odd = ()
        if EIGHT_BIT:
            for g in tl.static_range(GROUPS):
                q_group = q_row[:, None] + g * D_GROUP + column[None, :] * 2 + 1
                q_odd += (tl.load(q_group, mask=row_in[:, None], other=0.0),)
        score_scale = scale_log2
        if EIGHT_BIT and not DS_MLA:
            r_odd = tl.load(r_row[:, None] + column_rope[None, :] * 2 + 1, mask=row_in[:, None], other=0.0)
            # Into float16 by a power of two per row: bf16's 8 bits fit, its exponent range may not.
            largest = tl.maximum(tl.max(tl.abs(q[0]).to(tl.float32), 1), tl.max(tl.abs(q_odd[0]).to(tl.float32), 1))
            largest = tl.maximum(largest, tl.max(tl.abs(r).to(tl.float32), 1))
            largest = tl.maximum(largest, tl.max(tl.abs(r_odd).to(tl.float32), 1))
            exponent = _power_of_two_above(tl.maximum(largest, 1e-30)).to(tl.float32)
            down = tl.exp2(-exponent)[:, None]
            q = ((q[0].to(tl.float32) * down).to(tl.float16),)
            q_odd = ((q_odd[0].to(tl.float32) * down).to(tl.float16),)
            r = (r.to(tl.float32) * down).to(tl.float16)
            r_odd = (r_odd.to(tl.float32) * down).to(tl.float16)
            score_scale = (scale_log2 * k_scale * tl.exp2(exponent + 8.0))[:, None]  # 2^8: see e4m3.widen_pair
        row_len = seq_len - (S_Q - 1) + row // H_Q

        top = tl.full([BLOCK_H], -1.0e30, tl.float32)  # finite: a row without keys so far must not give NaN
        total = tl.zeros([BLOCK_H], tl.float32)
        acc = ()
        acc_odd = ()
        for _ in tl.static_range(GROUPS):
            acc += (tl.zeros([BLOCK_H, D_GROUP // PARTS], tl.float32),)
            if EIGHT_BIT:
                acc_odd += (tl.zeros([BLOCK_H, D_GROUP // PARTS], tl.float32),)
        table = block_table + request * table_stride
        for tile in range(tile_begin, tile_end):
            position = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            live = position < seq_len
            if PAGE_SIZE % BLOCK_N == 0:  # one page a tile: addresses are a scalar and constants
                page = tl.load(table + tile * BLOCK_N // PAGE_SIZE).to(tl.int64)
                start = cache + page * page_stride + (tile * BLOCK_N % PAGE_SIZE) * WIDTH
                token = start + tl.arange(0, BLOCK_N) * WIDTH
            else:
                page = tl.load(table + position // PAGE_SIZE, mask=live, other=0).to(tl.int64)
                token = cache + page * page_stride + (position % PAGE_SIZE) * WIDTH
            k = ()
            k_odd = ()
            for g in tl.static_range(GROUPS):
                k_group = token[:, None] + g * (D_GROUP // PARTS) + column[None, :]
                k += (tl.load(k_group, mask=live[:, None], other=0),)
            kr = tl.load(token[:, None] + ROPE + column_rope[None, :], mask=live[:, None], other=0)
            score = tl.zeros([BLOCK_H, BLOCK_N], tl.float32)
            if DS_MLA:
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
                    even, odd = widen_pair(k[0], INTERPRETED)
                    k = (even,)
                    k_odd = (odd,)
                    kr, kr_odd = widen_pair(kr, INTERPRETED)
                    score = _dot(q_odd[0], tl.trans(k_odd[0]), score, INTERPRETED)
                    score = _dot(r_odd, tl.trans(kr_odd), score, INTERPRETED)
                score = _dot(q[0], tl.trans(k[0]), score, INTERPRETED)
                score = _dot(r, tl.trans(kr), score, INTERPRETED)
            if CAUSAL:
                score = tl.where(position[None, :] < row_len[:, None], score * score_scale, -float("inf"))
            else:
                score = tl.where(live[None, :], score * score_scale, -float("inf"))
            new_top = tl.maximum(top, tl.max(score, 1))
            weight = tl.exp2(score - new_top[:, None])
            shrink = tl.exp2(top - new_top)
            total = total * shrink + tl.sum(weight, 1)
            top = new_top
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
            acc = new_acc
            acc_odd = new_acc_odd

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
        log_sum = tl.where(seen, top + tl.log2(total), -float("inf"))
        if slot < 0:
            index = request * ROWS + row
            for g in tl.static_range(GROUPS):
                place = index[:, None] * D_V + g * D_GROUP + column_out[None, :]
                tl.store(out + place, result[g].to(out.dtype.element_ty), mask=row_in[:, None])
            tl.store(lse + index, log_sum * 0.6931471805599453, mask=row_in)
        else:
            index = slot.to(tl.int64) * ROWS + row
            for g in tl.static_range(GROUPS):
                place = index[:, None] * D_V + g * D_GROUP + column_out[None, :]
                tl.store(partial_out + place, result[g], mask=row_in[:, None])
            tl.store(partial_lse + index, log_sum, mask=row_in)
