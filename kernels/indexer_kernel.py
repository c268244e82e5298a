# SPDX-License-Identifier: Apache-2.0
# The kernels build tuples piece by piece, which Triton unrolls and mypy cannot follow.
# mypy: disable-error-code="assignment, misc"
"""Kernels of the indexer's scores, ``sum_h weights[h] * relu(q[h] . k) * k_scale``, over paged or contiguous keys.

A tile of BLOCK_N keys is one operand of the matrix unit and the heads of a query row the other, so a score is a sum
along a row of the accumulator: in registers and between the few threads that share the row. BLOCK_R query rows use a
tile of keys while it is on chip. Codes go to the matrix unit as they are where it takes e4m3 (compute capability 8.9
and later), elsewhere widened to float16 by `e4m3.widen_pair`. Products are exact either way; Hopper's e4m3 unit keeps
about 13 bits of their sums below the largest addend (DeepSeek-V3, arXiv 2412.19437, 3.3.2), as DeepGEMM's scores do.

Whatever lies in rows of the cache past a request's end stays in its own column, which is not written.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .e4m3 import widen_pair
from .indexer_layout import INDEX_DIM

_DIM = tl.constexpr(INDEX_DIM)
_CLEAN_BLOCK = tl.constexpr(1024)


@triton.jit
def _operands(pointer, mask, FP8: tl.constexpr, INTERPRETED: tl.constexpr):
    """Rows of 128 codes at `pointer` ``[n, 1]`` as operands: one of e4m3, or even and odd columns over 2^8."""
    if FP8:
        codes = tl.load(pointer + tl.arange(0, _DIM)[None, :], mask=mask, other=0.0)
        if INTERPRETED:
            codes = codes.to(tl.float32)
        return (codes,)
    else:
        even, odd = widen_pair(tl.load(pointer + tl.arange(0, _DIM // 2)[None, :], mask=mask, other=0), INTERPRETED)
        if INTERPRETED:
            even = even.to(tl.float32)
            odd = odd.to(tl.float32)
        return even, odd


@triton.jit
def _scores(k, q, weight, BLOCK_N: tl.constexpr, BLOCK_HEADS: tl.constexpr, FP8: tl.constexpr):
    """Scores of a tile of keys for one query row, without the keys' scales."""
    score = tl.dot(k[0], tl.trans(q[0]), tl.zeros([BLOCK_N, BLOCK_HEADS], tl.float32))
    if not FP8:
        score = tl.dot(k[1], tl.trans(q[1]), score)
    return tl.sum(tl.maximum(score, 0.0) * weight[None, :], 1)


@triton.jit
def _load_query(q, weights, row, inside, HEADS: tl.constexpr, BLOCK_HEADS: tl.constexpr, FP8: tl.constexpr,
                INTERPRETED: tl.constexpr):  # fmt: skip
    """Query row `row` as operands, and its weights, those of heads and rows that are not there 0."""
    head = tl.arange(0, BLOCK_HEADS)
    mask = head < tl.where(inside, HEADS, 0)
    width: tl.constexpr = _DIM if FP8 else _DIM // 2
    operands = _operands(q + (row * HEADS + head)[:, None] * width, mask[:, None], FP8, INTERPRETED)
    weight = tl.load(weights + row * HEADS + head, mask=mask, other=0.0)
    if not FP8:
        weight *= 65536.0  # 2^8 of both operands
    return operands, weight


@triton.jit(do_not_specialize=["b", "max_len", "table_stride", "lens_stride"])
def paged_logits_kernel(
    q,  # [b, S_Q, HEADS, 128], e4m3 or pairs of codes as uint16
    cache,  # the same, pages of PAGE_SIZE * 128 codes and PAGE_SIZE float32 scales
    weights,  # [b * S_Q, HEADS]
    seq_lens,  # [b], or [b, S_Q] with LENGTH_PER_ROW
    block_table,  # [b, max_pages]
    logits,  # [b * S_Q, max_len]
    b,
    max_len,
    page_stride,
    table_stride,
    lens_stride,
    logits_stride,
    S_Q: tl.constexpr,
    HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    LENGTH_PER_ROW: tl.constexpr,
    CLEAN: tl.constexpr,
    FP8: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    width: tl.constexpr = _DIM if FP8 else _DIM // 2
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    first_row = tl.program_id(1) * BLOCK_R
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    # The requests' tiles lie end to end and are cut into equal shares; every program finds its own.
    request = tl.arange(0, BLOCK_B)
    longest = tl.zeros([BLOCK_B], tl.int32)
    for s in tl.static_range(S_Q if LENGTH_PER_ROW else 1):
        longest = tl.maximum(longest, tl.load(seq_lens + request * lens_stride + s, mask=request < b, other=0))
    tiles = tl.cdiv(tl.minimum(longest, max_len), BLOCK_N)
    after = tl.cumsum(tiles, 0)
    share = tl.cdiv(tl.sum(tiles, 0), programs)
    share_begin = program * share
    share_end = share_begin + share
    before_me = after <= share_begin
    stop_request = tl.sum(((after - tiles < share_end) & (request < b)).to(tl.int32), 0)

    for index in range(tl.sum(before_me.to(tl.int32), 0), stop_request):
        wide = tl.zeros([], tl.int64) + index  # the interpreter's index is a number
        request_row = wide * S_Q
        longest_here = 0
        for s in tl.static_range(S_Q if LENGTH_PER_ROW else 1):
            longest_here = tl.maximum(longest_here, tl.load(seq_lens + index * lens_stride + s))
        longest_here = tl.minimum(longest_here, max_len)
        my_tiles = tl.cdiv(longest_here, BLOCK_N)
        line = tl.sum(tl.where(request < index, tiles, 0), 0)  # where its first tile lies
        rows = ()
        row_len = ()
        for i in tl.static_range(BLOCK_R):
            row = first_row + i
            inside = row < S_Q
            rows += (_load_query(q, weights, request_row + row, inside, HEADS, BLOCK_HEADS, FP8, INTERPRETED),)
            if LENGTH_PER_ROW:
                seen = tl.load(seq_lens + index * lens_stride + row, mask=inside, other=0)
            else:
                seen = tl.load(seq_lens + index * lens_stride) - (S_Q - 1) + row
            row_len += (tl.where(inside, tl.minimum(seen, max_len), 0),)
        table = block_table + wide * table_stride
        first = tl.maximum(share_begin - line, 0)
        for tile in tl.range(first, tl.minimum(share_end - line, my_tiles), num_stages=STAGES):
            position = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            if PAGE_SIZE % BLOCK_N == 0:  # one page a tile, all of whose rows may be read
                page = cache + tl.load(table + tile * BLOCK_N // PAGE_SIZE).to(tl.int64) * page_stride
                offset = tile * BLOCK_N % PAGE_SIZE + tl.arange(0, BLOCK_N)
                live = tl.full([BLOCK_N], True, tl.int1)
                scales = (page + PAGE_SIZE * width).to(tl.pointer_type(tl.float32), bitcast=True) + offset
            else:
                offset = position % PAGE_SIZE
                live = position < longest_here
                page = cache + tl.load(table + position // PAGE_SIZE, mask=live, other=0).to(tl.int64) * page_stride
                scales = page + PAGE_SIZE * width + offset * (4 * width // _DIM)
                scales = scales.to(tl.pointer_type(tl.float32), bitcast=True)
            k = _operands((page + offset * width)[:, None], live[:, None], FP8, INTERPRETED)
            scale = tl.load(scales, mask=live, other=0.0)
            for i in tl.static_range(BLOCK_R):
                score = _scores(k, rows[i][0], rows[i][1], BLOCK_N, BLOCK_HEADS, FP8) * scale
                place = logits + (request_row + first_row + i) * logits_stride + position
                tl.store(place, score, mask=position < row_len[i])

    if CLEAN and first_row == 0:
        blocks = tl.cdiv(max_len, _CLEAN_BLOCK)
        for item in range(program, b * S_Q * blocks, programs):
            index = item // blocks // S_Q
            row = item // blocks % S_Q
            if LENGTH_PER_ROW:
                seen = tl.load(seq_lens + index * lens_stride + row)
            else:
                seen = tl.load(seq_lens + index * lens_stride) - (S_Q - 1) + row
            column = item % blocks * _CLEAN_BLOCK + tl.arange(0, _CLEAN_BLOCK)
            place = logits + (tl.zeros([], tl.int64) + item // blocks) * logits_stride + column
            tl.store(
                place, tl.full([_CLEAN_BLOCK], -float("inf"), tl.float32), mask=(column >= seen) & (column < max_len)
            )


@triton.jit(do_not_specialize=["tokens", "total", "max_len"])
def ragged_logits_kernel(
    q,  # [tokens, HEADS, 128], e4m3 or pairs of codes as uint16
    k,  # [total, 128], the same
    k_scales,  # [total]
    weights,  # [tokens, HEADS]
    starts,  # [tokens]
    ends,  # [tokens]
    logits,  # [tokens, max_len]
    tokens,
    total,
    max_len,
    logits_stride,
    HEADS: tl.constexpr,
    COMPRESSED: tl.constexpr,
    CLEAN: tl.constexpr,
    FP8: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    width: tl.constexpr = _DIM if FP8 else _DIM // 2
    # Later tokens see more keys: the longest work first.
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64) * BLOCK_R
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    rows = ()
    begins = ()
    stops = ()
    lowest = total
    highest = 0
    for i in tl.static_range(BLOCK_R):
        inside = first_row + i < tokens
        begin = tl.maximum(tl.load(starts + first_row + i, mask=inside, other=0), 0)
        stop = tl.minimum(tl.load(ends + first_row + i, mask=inside, other=0), total)
        if COMPRESSED:
            stop = tl.minimum(stop, begin + max_len)
        stop = tl.maximum(stop, begin)
        lowest = tl.where(stop > begin, tl.minimum(lowest, begin), lowest)
        highest = tl.where(stop > begin, tl.maximum(highest, stop), highest)
        begins += (begin,)
        stops += (stop,)
        rows += (_load_query(q, weights, first_row + i, inside, HEADS, BLOCK_HEADS, FP8, INTERPRETED),)
    first_tile = lowest // BLOCK_N
    tiles = tl.maximum(tl.cdiv(highest, BLOCK_N) - first_tile, 0)
    share = tl.cdiv(tiles, splits)
    first_tile += split * share
    for tile in tl.range(first_tile, first_tile + tl.minimum(share, tiles - split * share), num_stages=STAGES):
        position = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        live = position < total
        keys = _operands((k + position.to(tl.int64) * width)[:, None], live[:, None], FP8, INTERPRETED)
        scale = tl.load(k_scales + position, mask=live, other=0.0)
        for i in tl.static_range(BLOCK_R):
            score = _scores(keys, rows[i][0], rows[i][1], BLOCK_N, BLOCK_HEADS, FP8) * scale
            column = position - begins[i] if COMPRESSED else position
            place = logits + (first_row + i) * logits_stride + column
            tl.store(place, score, mask=(position >= begins[i]) & (position < stops[i]))

    if CLEAN:
        for i in tl.static_range(BLOCK_R):
            if first_row + i < tokens:
                begin = 0 if COMPRESSED else begins[i]
                stop = stops[i] - begins[i] + begin
                for first in range(split * _CLEAN_BLOCK, max_len, splits * _CLEAN_BLOCK):
                    column = first + tl.arange(0, _CLEAN_BLOCK)
                    place = logits + (first_row + i) * logits_stride + column
                    outside = ((column < begin) | (column >= stop)) & (column < max_len)
                    tl.store(place, tl.full([_CLEAN_BLOCK], -float("inf"), tl.float32), mask=outside)
