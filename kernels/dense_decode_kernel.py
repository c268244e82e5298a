# SPDX-License-Identifier: Apache-2.0
"""Kernel of the portable split-KV MLA decode, over a paged bf16, fp16, per-tensor fp8 or `fp8_ds_mla` cache.

A program owns BLOCK_H query rows (s_q x h_q rows of a request share its cache, so they are packed together) and runs
through the items the scheduler gave it, tile by tile of BLOCK_N tokens; `attend.py` has the arithmetic. An item that is
a whole request writes the result, a part of one a float32 partial result for `combine`.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .attend import SCALE_GROUPS, attend, finish, load_query, nothing_seen, row_elements, store_output


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
    ROWS: tl.constexpr = S_Q * H_Q
    GROUPS: tl.constexpr = SCALE_GROUPS if EIGHT_BIT else 1
    WIDTH: tl.constexpr = row_elements(EIGHT_BIT, DS_MLA)
    row = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    row_in = row < ROWS
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
        query = load_query(q_row, r_row, row_in, scale_log2, k_scale, GROUPS, EIGHT_BIT, DS_MLA)
        row_len = seq_len - (S_Q - 1) + row // H_Q

        top, total, acc, acc_odd = nothing_seen(BLOCK_H, GROUPS, EIGHT_BIT)
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
            visible = live[None, :]
            if CAUSAL:
                visible = position[None, :] < row_len[:, None]
            top, total, acc, acc_odd = attend(
                *query, token, live, visible, top, total, acc, acc_odd,
                BLOCK_H, BLOCK_N, GROUPS, EIGHT_BIT, DS_MLA, INTERPRETED,
            )  # fmt: skip

        result, log_sum = finish(top, total, acc, acc_odd, k_scale, GROUPS, EIGHT_BIT, DS_MLA)
        if slot < 0:
            index = request * ROWS + row
            store_output(out, index, result, row_in, GROUPS)
            tl.store(lse + index, log_sum * 0.6931471805599453, mask=row_in)
        else:
            index = slot.to(tl.int64) * ROWS + row
            store_output(partial_out, index, result, row_in, GROUPS)
            tl.store(partial_lse + index, log_sum, mask=row_in)
