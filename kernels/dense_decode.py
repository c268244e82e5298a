# SPDX-License-Identifier: Apache-2.0
"""Portable split-KV MLA decode in Triton, over a paged bf16, fp16 or per-tensor fp8 cache.

A program owns BLOCK_H query rows (s_q x h_q rows of a request share its cache, so they are packed together) and runs
through the items the scheduler gave it. For each tile of BLOCK_N tokens: S = Q K^T over 512 latent and 64 rope values,
online softmax, O += P V, where V is the latent part of the K tile that is already on chip. An item that is a whole
request writes the result, a part of one a float32 partial result for `combine`.

An fp8 tile is widened to float16, which holds every e4m3 value exactly, by integer instructions on pairs of values; as
a tile of 16-bit elements it takes the same path through shared memory to the matrix unit as a 16-bit cache does. The
query is scaled into float16's range by a power of two per row, P in float16 is more accurate than in bfloat16, and
`k_scale` is applied to the scores and to the output, never to the elements of the tile.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from . import layout
from .combine import combine
from .common import LOG2_E, dependent_launch, interpreted
from .plan import DecodePlan, decode_plan
from .reference import split_query
from .schedule import TileSchedule, build_schedule


def mla_decode(
    q,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    sm_scale: float | None = None,
    causal: bool = True,
    k_scale: float | torch.Tensor = 1.0,
    plan: DecodePlan | None = None,
    schedule: TileSchedule | None = None,
    workspace: tuple[torch.Tensor, ...] | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of the last `s_q` tokens of each request over its paged cache. Inputs are trusted; `ops` checks them.

    Args:
        q: ``[b, s_q, h_q, 576]`` bf16 or fp16, or the tuple of its latent part ``[b, s_q, h_q, 512]`` and rope part
            ``[b, s_q, h_q, 64]``, each with any strides but a contiguous last dimension.
        cache: ``[num_pages, page_size, 576]``, see `layout`; page_size a multiple of 16.
        block_table: ``[b, max_pages]`` int32; entries past a request's last page are never read.
        seq_lens: ``[b]`` int32, keys of each request including its `s_q` new tokens; 0 for an empty request.
        sm_scale: softmax scale, ``576 ** -0.5`` by default.
        causal: query row i sees the keys before ``seq_len - s_q + 1 + i``; without it, all keys.
        k_scale: scale of an `fp8` cache, a number or a float32 tensor of one element on the device.
        plan: from `plan.decode_plan`, chosen if not given.
        schedule: from `schedule.build_schedule` with ``plan.params``, built if not given.
        workspace: float32 tensors of at least ``plan.workspace_shapes``, allocated if not given.
        out: ``[b, s_q, h_q, 512]`` in q's dtype, contiguous; lse: ``[b, s_q, h_q]`` float32, contiguous.

    Returns:
        out and lse (natural logarithm). A row without any key to attend to: out 0, lse -inf.
    """
    q_nope, q_rope = split_query(q)
    b, s_q, h_q, _ = q_nope.shape
    device = q_nope.device
    name = layout.cache_format(cache)
    out = q_nope.new_empty(b, s_q, h_q, layout.D_V) if out is None else out
    lse = torch.empty(b, s_q, h_q, dtype=torch.float32, device=device) if lse is None else lse
    if b == 0:
        return out, lse
    plan = decode_plan(s_q, h_q, name, device) if plan is None else plan
    config, params = plan.config, plan.params
    schedule = build_schedule(seq_lens, params) if schedule is None else schedule
    if workspace is None:
        workspace = tuple(
            torch.empty(s, dtype=torch.float32, device=device) for s in plan.workspace_shapes(b, s_q, h_q)
        )
    partial_out, partial_lse = workspace
    eight_bit = name == "fp8"
    scale_is_tensor = isinstance(k_scale, torch.Tensor)
    sm_scale = layout.D_QK**-0.5 if sm_scale is None else sm_scale
    _decode_kernel[(triton.cdiv(s_q * h_q, config.block_h), params.num_programs)](
        q_nope,
        q_rope,
        cache.view(torch.uint16) if eight_bit else cache,
        block_table,
        seq_lens,
        schedule.program_begin,
        schedule.items,
        out,
        lse,
        partial_out,
        partial_lse,
        k_scale if scale_is_tensor else lse,  # any pointer: read only if K_SCALE_POINTER
        1.0 if scale_is_tensor else float(k_scale),
        sm_scale * LOG2_E,
        *q_nope.stride()[:3],
        *q_rope.stride()[:3],
        cache.stride(0) // 2 if eight_bit else cache.stride(0),
        block_table.stride(0),
        S_Q=s_q,
        H_Q=h_q,
        PAGE_SIZE=cache.shape[1],
        CAUSAL=causal and s_q > 1,
        EIGHT_BIT=eight_bit,
        K_SCALE_POINTER=eight_bit and scale_is_tensor,
        BLOCK_H=config.block_h,
        BLOCK_N=config.block_n,
        INTERPRETED=interpreted(),
        **dependent_launch(device),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if params.max_pieces() > 1:
        combine(partial_out, partial_lse, schedule, params, out, lse)
    return out, lse


@triton.jit
def _widen_pair(pair, INTERPRETED: tl.constexpr):
    """Two e4m3 codes in a uint16, the earlier one below, to two float16 values divided by 2^8.

    A code's sign goes to bit 15, exponent and mantissa to bits 13..7: exact for subnormals too; NaN becomes 480 / 2^8.
    """
    if INTERPRETED:
        low = ((pair & 0x80) << 8) | ((pair & 0x7F) << 7)
        high = (pair & 0x8000) | ((pair & 0x7F00) >> 1)
    else:  # on two pairs at once: Triton's own 16-bit integer arithmetic takes a register and a byte shuffle a value
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
def _decode_kernel(
    q_nope,  # [b, S_Q, H_Q, 512]
    q_rope,  # [b, S_Q, H_Q, 64]
    cache,  # [num_pages, PAGE_SIZE, 576]
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
    K_SCALE_POINTER: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INTERPRETED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    D_V: tl.constexpr = 512
    D_ROPE: tl.constexpr = 64
    ROWS: tl.constexpr = S_Q * H_Q
    # An fp8 tile is handled as pairs of neighbouring values: even and odd columns are separate operands.
    PARTS: tl.constexpr = 2 if EIGHT_BIT else 1
    WIDTH: tl.constexpr = (D_V + D_ROPE) // PARTS  # elements of a cache row
    row = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    row_in = row < ROWS
    column = tl.arange(0, D_V // PARTS)
    column_rope = tl.arange(0, D_ROPE // PARTS)
    column_out = tl.arange(0, D_V)
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
        q = tl.load(q_row[:, None] + column[None, :] * PARTS, mask=row_in[:, None], other=0.0)
        r = tl.load(r_row[:, None] + column_rope[None, :] * PARTS, mask=row_in[:, None], other=0.0)
        score_scale = scale_log2
        if EIGHT_BIT:
            q_odd = tl.load(q_row[:, None] + column[None, :] * 2 + 1, mask=row_in[:, None], other=0.0)
            r_odd = tl.load(r_row[:, None] + column_rope[None, :] * 2 + 1, mask=row_in[:, None], other=0.0)
            # Into float16 by a power of two per row: bf16's 8 bits fit, its exponent range may not.
            largest = tl.maximum(tl.max(tl.abs(q).to(tl.float32), 1), tl.max(tl.abs(q_odd).to(tl.float32), 1))
            largest = tl.maximum(largest, tl.max(tl.abs(r).to(tl.float32), 1))
            largest = tl.maximum(largest, tl.max(tl.abs(r_odd).to(tl.float32), 1))
            exponent = _power_of_two_above(tl.maximum(largest, 1e-30)).to(tl.float32)
            down = tl.exp2(-exponent)[:, None]
            q = (q.to(tl.float32) * down).to(tl.float16)
            q_odd = (q_odd.to(tl.float32) * down).to(tl.float16)
            r = (r.to(tl.float32) * down).to(tl.float16)
            r_odd = (r_odd.to(tl.float32) * down).to(tl.float16)
            score_scale = (scale_log2 * k_scale * tl.exp2(exponent + 8.0))[:, None]  # 2^8: see _widen_pair
        row_len = seq_len - (S_Q - 1) + row // H_Q

        top = tl.full([BLOCK_H], -1.0e30, tl.float32)  # finite: a row without keys so far must not give NaN
        total = tl.zeros([BLOCK_H], tl.float32)
        acc = tl.zeros([BLOCK_H, D_V // PARTS], tl.float32)
        acc_odd = acc
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
            k = tl.load(token[:, None] + column[None, :], mask=live[:, None], other=0)
            kr = tl.load(token[:, None] + D_V // PARTS + column_rope[None, :], mask=live[:, None], other=0)
            score = tl.zeros([BLOCK_H, BLOCK_N], tl.float32)
            if EIGHT_BIT:
                k, k_odd = _widen_pair(k, INTERPRETED)
                kr, kr_odd = _widen_pair(kr, INTERPRETED)
                score = _dot(q_odd, tl.trans(k_odd), score, INTERPRETED)
                score = _dot(r_odd, tl.trans(kr_odd), score, INTERPRETED)
            score = _dot(q, tl.trans(k), score, INTERPRETED)
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
            weight = weight.to(k.dtype)
            acc = _dot(weight, k, acc * shrink[:, None], INTERPRETED)
            if EIGHT_BIT:
                acc_odd = _dot(weight, k_odd, acc_odd * shrink[:, None], INTERPRETED)

        seen = total > 0
        norm = tl.where(seen, 1.0 / total, 0.0)
        if EIGHT_BIT:
            norm *= k_scale * 256.0
            acc = tl.interleave(acc * norm[:, None], acc_odd * norm[:, None])
        else:
            acc *= norm[:, None]
        log_sum = tl.where(seen, top + tl.log2(total), -float("inf"))
        if slot < 0:
            index = request * ROWS + row
            target = out + index[:, None] * D_V + column_out[None, :]
            tl.store(target, acc.to(out.dtype.element_ty), mask=row_in[:, None])
            tl.store(lse + index, log_sum * 0.6931471805599453, mask=row_in)
        else:
            index = slot.to(tl.int64) * ROWS + row
            tl.store(partial_out + index[:, None] * D_V + column_out[None, :], acc, mask=row_in[:, None])
            tl.store(partial_lse + index, log_sum, mask=row_in)
