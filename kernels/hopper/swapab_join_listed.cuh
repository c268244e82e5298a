// SPDX-License-Identifier: Apache-2.0
// swapab_join.cuh for listed keys: results go where each warpgroup's last tile lay, all at once.
// Included by a kernel after it has defined FORMAT, Element, N and Layout.
#pragma once

#include "swapab_turns.cuh"

namespace {

// Where a warpgroup's last tile lies, after the item.
__device__ inline TileRing last_of(int warpgroup, TileRing ring, int tiles) {
    ring.retreat();
    if ((tiles - 1) % 2 != warpgroup) ring.retreat();
    return ring;
}

// Results of this warpgroup's half of the columns, and what normalises a row. A warpgroup's sums are in shared memory
// when it comes here.
__device__ inline void join_in_ring(const Shared& shared, const TileRing& ring, int tiles, const State& state,
                                    float (&o)[4][N / 2], float (&norm)[kColumns]) {
    const int thread = threadIdx.x % kWarpgroup, warpgroup = threadIdx.x / kWarpgroup;
    const TileRing own = last_of(warpgroup, ring, tiles), others = last_of(1 - warpgroup, ring, tiles);
    named_barrier_sync(kFirstWarpgroup + warpgroup, kWarpgroup);  // nobody reads the tile any more
#pragma unroll
    for (int b = 0; b < 4; ++b) {
        float4* to = room_in(shared, place_of(own), b) + thread;
#pragma unroll
        for (int i = 0; i < N / 2; i += 4) {
            to[i / 4 * kWarpgroup] = {of_half(state, 1 - warpgroup, b, i), of_half(state, 1 - warpgroup, b, i + 1),
                                      of_half(state, 1 - warpgroup, b, i + 2), of_half(state, 1 - warpgroup, b, i + 3)};
#pragma unroll
            for (int k = 0; k < 4; ++k) o[b][i + k] = of_half(state, warpgroup, b, i + k);
        }
    }
    fence_proxy_async();  // a later tile's copy must not come before them
    named_barrier_sync(kAllConsumers, kConsumers);
    float mine[kColumns], theirs[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
        const RowSum<2> row = sum_of_row<2>(shared, column_of(c));
        mine[c] = warpgroup ? row.factor[1] : row.factor[0], theirs[c] = warpgroup ? row.factor[0] : row.factor[1];
        norm[c] = norm_of(row);
    }
#pragma unroll
    for (int b = 0; b < 4; ++b) {
        const float4* from = room_in(shared, place_of(others), b) + thread;
#pragma unroll
        for (int i = 0; i < N / 2; i += 4) {
            const float4 taken = from[i / 4 * kWarpgroup];
            const float four[4] = {taken.x, taken.y, taken.z, taken.w};
#pragma unroll
            for (int k = 0; k < 4; ++k)
                o[b][i + k] = o[b][i + k] * mine[i / 2 + k % 2] + four[k] * theirs[i / 2 + k % 2];
        }
    }
    release_tile(shared, others);
}

}  // namespace
