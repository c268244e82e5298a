# SPDX-License-Identifier: Apache-2.0
"""Device kernel of the tile scheduler; `schedule.py` says what it computes and why it needs no loop over requests."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit(do_not_specialize=["b"])
def schedule_kernel(
    seq_lens,  # [b]
    program_begin,  # [NUM_PROGRAMS + 1]
    items,  # [max_items, 4]
    num_splits,  # [b + 1]
    b,
    NUM_PROGRAMS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FIXED: tl.constexpr,
    MIN_TILES: tl.constexpr,
    BATCH_INVARIANT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_J: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    x = tl.program_id(0)  # the program and the request whose entries are written here
    request = tl.arange(0, BLOCK_B)
    inside = request < b
    tiles = tl.cdiv(tl.load(seq_lens + request, mask=inside, other=0), BLOCK_N)
    if BATCH_INVARIANT:
        chunk = tl.maximum(tl.cdiv(tiles, MAX_SPLITS), MIN_TILES)
        pieces = tl.where(inside, tl.maximum(tl.cdiv(tiles, chunk), 1), 0)
        cost = pieces * (chunk + FIXED)
    else:
        chunk = tiles
        pieces = tiles
        cost = tl.where(inside, tiles + FIXED, 0)
    start = tl.cumsum(cost, 0) - cost
    share = tl.maximum(tl.cdiv(tl.sum(cost, 0), NUM_PROGRAMS), MIN_TILES + FIXED)
    if BATCH_INVARIANT:
        first = start  # unused
        before = tl.cdiv(tl.maximum(x * share - start, 0), chunk + FIXED)  # pieces that begin before program x's share
    else:
        # A request's pieces go to consecutive programs, from that of its first tile to that of its last.
        first = tl.where(tiles > 0, (start + FIXED) // share, (start + FIXED - 1) // share)
        last = tl.where(tiles > 0, (start + FIXED + tiles - 1) // share, first)
        pieces = tl.where(inside, last - first + 1, 0)
        before = tl.maximum(x - first, 0)
    if x <= NUM_PROGRAMS:
        tl.store(program_begin + x, tl.sum(tl.minimum(before, pieces), 0))
    slots = tl.where(pieces > 1, pieces, 0)
    slot_base = tl.sum(tl.where(request < x, slots, 0), 0)
    if x <= b:
        tl.store(num_splits + x, slot_base)
    if x < b:
        mine = request == x
        item_base = tl.sum(tl.where(request < x, pieces, 0), 0)
        my_tiles = tl.sum(tl.where(mine, tiles, 0), 0)
        my_pieces = tl.sum(tl.where(mine, pieces, 0), 0)
        my_start = tl.sum(tl.where(mine, start, 0), 0) + FIXED
        my_first = tl.sum(tl.where(mine, first, 0), 0)
        my_chunk = tl.sum(tl.where(mine, chunk, 0), 0)
        for j0 in range(0, my_pieces, BLOCK_J):
            j = j0 + tl.arange(0, BLOCK_J)
            if BATCH_INVARIANT:
                begin = j * my_chunk
                end = begin + my_chunk
            else:
                begin = (my_first + j) * share - my_start
                end = begin + share
            item = items + (item_base + j) * 4
            live = j < my_pieces
            tl.store(item, tl.zeros_like(j) + x, mask=live)
            tl.store(item + 1, tl.maximum(begin, 0), mask=live)
            tl.store(item + 2, tl.minimum(end, my_tiles), mask=live)
            tl.store(item + 3, tl.where(my_pieces > 1, slot_base + j, -1), mask=live)
