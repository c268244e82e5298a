// SPDX-License-Identifier: Apache-2.0
// The schedule of a small batch: every request gets as many programs, each an equal part. What takes Work many steps is
// one step then, and which request a program has is known before the lengths are.
#pragma once

#include "work.cuh"

constexpr int kFewTiles = 2;  // that a program may have where fewer would do with a better balance

// How many programs a request gets; 0 where it is not this way.
__device__ inline int programs_each(const Schedule& schedule) {
    return schedule.batch_invariant || schedule.b > kWarp ? 0 : divide(schedule.programs, schedule.b);
}

enum class Even { kNo, kNothing, kItem };

// A warp's work: this program's item, or that it has none, or that the batch would be out of balance. `total` gets the
// batch's tiles.
__device__ inline Even even_item(const Schedule& schedule, const int* seq_lens, int each, int program, Item& item,
                                 int& total) {
    const int lane = threadIdx.x % kWarp;
    const int length = lane >= schedule.b ? 0 : seq_lens ? seq_lens[lane] : schedule.length;
    const int tiles = (length + kTile - 1) / kTile;
    const int request = divide(program, each), piece = program - request * each;
    const int most = __reduce_max_sync(~0u, tiles);
    total = __reduce_add_sync(~0u, tiles);
    const int part = max(divide(most + each - 1, each), 1);
    if (part > kFewTiles) {
        const int ideal = divide(total + schedule.b * schedule.fixed_tiles + schedule.programs - 1, schedule.programs);
        if (16 * (part - max(ideal, schedule.min_share)) > ideal) return Even::kNo;
    }
    item.request = request;
    item.seq_len = __shfl_sync(~0u, length, request % kWarp);
    item.tile_begin = piece * part;
    item.tile_end = min(item.tile_begin + part, (item.seq_len + kTile - 1) / kTile);
    item.piece = piece;
    item.pieces = max(divide((item.seq_len + kTile - 1) / kTile + part - 1, part), 1);
    const bool split = item.pieces > 1;
    item.slot0 = split ? slot_of(schedule, request, request * each, 0) : -1;
    item.slot = split ? slot_of(schedule, request, request * each, piece) : -1;
    return request < schedule.b && piece < item.pieces ? Even::kItem : Even::kNothing;
}
