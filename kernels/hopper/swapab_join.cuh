// SPDX-License-Identifier: Apache-2.0
// The end of an item at which the two warpgroups took turns: each gives the other its results of half of the columns
// and keeps the other half. They go where the query was, in two rounds: the room of the last tiles, where they could go
// at once (swapab_join_listed.cuh), is wanted for the next item's, and where requests differ in length that costs 2 %.
// Included by a kernel after it has defined FORMAT, Element, N and Layout.
#pragma once

#include "swapab_turns.cuh"

namespace {

// Results of this warpgroup's half of the columns.
__device__ inline void join(const Params& p, const Shared& shared, const Item& item, const State& state,
                            float (&o)[4][N / 2]) {
    static_assert(2 * 2 * N * 64 * 4 <= Layout::kQueryBytes);
    const int thread = threadIdx.x % kWarpgroup, warpgroup = threadIdx.x / kWarpgroup;
    put_sums(shared, state.top, state.total);
    named_barrier_sync(kAllConsumers, kConsumers);
    if (threadIdx.x < N) {
        const int n = threadIdx.x;
        const RowSum row = sum_of_row(shared, n);
        const float norm = norm_of(row) * value_scale(p);
        shared.tops()[n] = row.factor[0] * norm, shared.tops()[N + n] = row.factor[1] * norm;
        store_log_sum(p, shared, item, n, log_sum_of(row));
    }
    named_barrier_sync(kAllConsumers, kConsumers);
    float factor[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) factor[c] = shared.tops()[warpgroup * N + column_of(c)];
    float4* parcels = shared.parcels();  // [warpgroup][2 blocks][N / 8][thread]
#pragma unroll
    for (int round = 0; round < 2; ++round) {
#pragma unroll
        for (int b = round * 2; b < round * 2 + 2; ++b) {
#pragma unroll
            for (int i = 0; i < N / 2; i += 4) {
                float given[4];
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    o[b][i + k] = kept_of(state, b, i + k) * factor[i / 2 + k % 2];
                    given[k] = given_of(state, b, i + k) * factor[i / 2 + k % 2];
                }
                parcels[((warpgroup * 2 + b % 2) * (N / 8) + i / 4) * kWarpgroup + thread] = {given[0], given[1],
                                                                                              given[2], given[3]};
            }
        }
        named_barrier_sync(kAllConsumers, kConsumers);
#pragma unroll
        for (int b = round * 2; b < round * 2 + 2; ++b) {
#pragma unroll
            for (int i = 0; i < N / 2; i += 4) {
                const float4 taken = parcels[(((1 - warpgroup) * 2 + b % 2) * (N / 8) + i / 4) * kWarpgroup + thread];
                o[b][i] += taken.x, o[b][i + 1] += taken.y, o[b][i + 2] += taken.z, o[b][i + 3] += taken.w;
            }
        }
        named_barrier_sync(kAllConsumers, kConsumers);
    }
}

}  // namespace
