# SPDX-License-Identifier: Apache-2.0
"""Kernel of the portable sparse MLA attention: each query token attends to the cache rows that a list names.

A program owns BLOCK_H heads of one query token and a piece of its list, a multiple of BLOCK_N entries; the tiles are
gathered row by row and `attend.py` has the arithmetic. The programs of one piece, which gather the same rows, follow
each other in the grid, so that all but the first find them in the L2 cache. A token in one piece has its result
written, pieces are float32 partial results for `combine`.

An entry that names no row, be it negative, past the end of the cache or past the list's length, is masked in every
load, so neither what an index nor what a block table says can make the kernel read outside the cache.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .attend import D_V, attend, finish, load_query, nothing_seen, row_elements, scale_output, store_output
from .common import LOG2_E

_LOG2_E = tl.constexpr(LOG2_E)
_SCAN = tl.constexpr(1024)  # entries that are looked at at once for the last one that names a row


@triton.jit
def _find_rows(entry, live, num_pages, max_pages, table, PAGE_SIZE: tl.constexpr, HAS_TABLE: tl.constexpr):
    """Page and offset in it of the rows that entries name, and which entries do name one."""
    page = entry // PAGE_SIZE
    if HAS_TABLE:
        live = live & (entry >= 0) & (page < max_pages)
        offset = entry - page * PAGE_SIZE
        page = tl.load(table + page, mask=live, other=-1)
        live = live & (page >= 0) & (page < num_pages)
    else:
        live = live & (entry >= 0) & (page < num_pages)
        offset = entry - page * PAGE_SIZE
    return page.to(tl.int64), offset, live


@triton.jit
def _share_beside_sink(log_sum, sink):
    """The keys' part of the softmax's sum, from the logarithm of that part and the sink, both in base 2."""
    seen = log_sum != -float("inf")
    return tl.where(seen, 1.0 / (1.0 + tl.exp2(sink - tl.where(seen, log_sum, 0.0))), 0.0)


@triton.jit
def apply_sink_kernel(
    out,  # [tokens, H_Q, 512]
    lse,  # [tokens, H_Q]
    attn_sink,  # [H_Q]
    H_Q: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Scale merged outputs by what the sink leaves them; only after the merge is the whole sum known."""
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    share = _share_beside_sink(tl.load(lse + row) * _LOG2_E, tl.load(attn_sink + row % H_Q) * _LOG2_E)
    place = out + row * D_V + tl.arange(0, D_V)
    tl.store(place, (tl.load(place).to(tl.float32) * share).to(out.dtype.element_ty))


_VARIES = ["s_q", "topk", "num_pages", "max_pages", "length_stride_b", "length_stride_s", "table_stride", "pieces"]


@triton.jit(do_not_specialize=[*_VARIES, "piece_tiles"])
def sparse_kernel(
    q_nope,  # [b, s_q, H_Q, 512]
    q_rope,  # [b, s_q, H_Q, 64]
    cache,  # [num_pages, PAGE_SIZE, width]
    indices,  # [b, s_q, topk]
    topk_length,  # [b, s_q] if HAS_LENGTH
    block_table,  # [b, max_pages] if HAS_TABLE
    attn_sink,  # [H_Q] if HAS_SINK
    out,  # [b * s_q, H_Q, 512]
    lse,  # [b * s_q, H_Q]
    max_logits,  # [b * s_q * pieces, H_Q] if HAS_MAX
    partial_out,  # [b * s_q * pieces, H_Q, 512]
    partial_lse,  # [b * s_q * pieces, H_Q]
    num_splits,  # [b * s_q + 1]
    k_scale_pointer,
    k_scale_value,
    scale_log2,
    q_nope_stride_b,
    q_nope_stride_s,
    q_nope_stride_h,
    q_rope_stride_b,
    q_rope_stride_s,
    q_rope_stride_h,
    index_stride_b,
    index_stride_s,
    length_stride_b,
    length_stride_s,
    page_step,
    table_stride,
    s_q,
    topk,
    num_pages,
    max_pages,
    pieces,
    piece_tiles,
    H_Q: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,  # elements of a page_step
    HAS_TABLE: tl.constexpr,
    HAS_LENGTH: tl.constexpr,
    HAS_SINK: tl.constexpr,
    HAS_MAX: tl.constexpr,
    EIGHT_BIT: tl.constexpr,
    DS_MLA: tl.constexpr,
    K_SCALE_POINTER: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUPS: tl.constexpr,
    INTERPRETED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    WIDTH: tl.constexpr = row_elements(EIGHT_BIT, DS_MLA)
    ROW_BLOCKS: tl.constexpr = (H_Q + BLOCK_H - 1) // BLOCK_H
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    program = tl.program_id(0)
    head = program % ROW_BLOCKS * BLOCK_H + tl.arange(0, BLOCK_H)
    head_in = head < H_Q
    slot = program // ROW_BLOCKS  # of a partial result
    token = slot // pieces
    piece = slot % pieces
    request = (token // s_q).to(tl.int64)
    query_token = (token % s_q).to(tl.int64)
    k_scale = k_scale_value
    if K_SCALE_POINTER:
        k_scale = tl.load(k_scale_pointer)
    if piece == 0:
        if program % ROW_BLOCKS == 0:  # for `combine`
            tl.store(num_splits + token + 1, (token + 1) * pieces)
            if token == 0:
                tl.store(num_splits, 0)

    entries = indices + request * index_stride_b + query_token * index_stride_s
    length = topk
    if HAS_LENGTH:
        length = tl.load(topk_length + request * length_stride_b + query_token * length_stride_s)
        length = tl.minimum(length, topk)
    begin = piece * piece_tiles * BLOCK_N
    end = tl.minimum(begin + piece_tiles * BLOCK_N, length)
    # Lists of short requests end in entries that name nothing: their tiles are left out. Not worth a look for one tile;
    # a branch would say so more plainly, but with one the compiler of Triton 3.6 spills up to 270 bytes more a thread.
    last = tl.where(piece_tiles > 1, begin, end) - 1
    for start in range(begin, tl.where(piece_tiles > 1, end, begin), _SCAN):
        position = start + tl.arange(0, _SCAN)
        entry = tl.load(entries + position, mask=position < end, other=-1)
        last = tl.maximum(last, tl.max(tl.where(entry >= 0, position, -1), 0))

    q_row = q_nope + request * q_nope_stride_b + query_token * q_nope_stride_s + head * q_nope_stride_h
    r_row = q_rope + request * q_rope_stride_b + query_token * q_rope_stride_s + head * q_rope_stride_h
    query = load_query(q_row, r_row, head_in, scale_log2, k_scale, GROUPS, EIGHT_BIT, DS_MLA)
    top, total, acc, acc_odd = nothing_seen(BLOCK_H, GROUPS, EIGHT_BIT)
    table = block_table + request * table_stride
    for start in range(begin, last + 1, BLOCK_N):
        position = start + tl.arange(0, BLOCK_N)
        entry = tl.load(entries + position, mask=position < end, other=-1)
        page, offset, live = _find_rows(entry, entry >= 0, num_pages, max_pages, table, PAGE_SIZE, HAS_TABLE)
        row = cache + page * page_step * STRIDE_UNIT + offset * WIDTH
        top, total, acc, acc_odd = attend(
            *query, row, live, live[None, :], top, total, acc, acc_odd,
            BLOCK_H, BLOCK_N, GROUPS, EIGHT_BIT, DS_MLA, INTERPRETED,
        )  # fmt: skip

    result, log_sum = finish(top, total, acc, acc_odd, k_scale, GROUPS, EIGHT_BIT, DS_MLA)
    index = slot.to(tl.int64) * H_Q + head
    if HAS_MAX:
        tl.store(max_logits + index, tl.where(total > 0, top * 0.6931471805599453, -float("inf")), mask=head_in)
    if pieces == 1:
        tl.store(lse + index, log_sum * 0.6931471805599453, mask=head_in)
        if HAS_SINK:
            sink = tl.load(attn_sink + head, mask=head_in, other=0.0)
            result = scale_output(result, _share_beside_sink(log_sum, sink * _LOG2_E), GROUPS)
        store_output(out, index, result, head_in, GROUPS)
    else:
        tl.store(partial_lse + index, log_sum, mask=head_in)
        store_output(partial_out, index, result, head_in, GROUPS)
