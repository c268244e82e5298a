// SPDX-License-Identifier: Apache-2.0
// The copying warp's part in joining the pieces of a request: the others' partial results, through the ring.
#pragma once

#include "twowg_partial.cuh"

__device__ inline void copy_others(const Params& p, const Item& item, Ring<kQuarterSlots>& ring) {
    if (kMostJoined == 1 || !joins(p, item)) return;
    const int lane = threadIdx.x % kWarp;
    const int live = (p.s_q * p.h_q - block_x_anew() * kRows + kGroupRows - 1) / kGroupRows;  // groups of rows, or more
    if (lane == 0) wait_for_pieces(counter_of(p, item), item.pieces - 1);
    __syncwarp();
    fence_proxy_async_global();
#pragma unroll 1
    for (int i = 0; i < (item.pieces - 1) * kSlotsOfPartial; ++i, ring.advance()) {
        const int slot = i % kSlotsOfPartial, half = slot % 4 / 2, first = (slot / 4 * 2 + slot % 2) * kGroupsOfSlot;
        const uint32_t full = Shared::quarter_full(ring.at());
        mbarrier_wait(Shared::quarter_empty(ring.at()), ring.phase() ^ 1);
        if (lane == 0) mbarrier_expect_tx(full, min(max(live - first, 0), kGroupsOfSlot) * kHalfBytes);
        __syncwarp();
        if (lane < kGroupsOfSlot && first + lane < live)
            bulk_load(Shared::quarter(ring.at()) + lane * kHalfBytes,
                      partial_of(p, item, 1 + i / kSlotsOfPartial) + ((first + lane) * 2 + half) * kUnitsOfHalf,
                      kHalfBytes, full);
    }
}
