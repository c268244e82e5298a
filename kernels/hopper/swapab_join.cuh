// SPDX-License-Identifier: Apache-2.0
// The end of an item at which warpgroups took turns: the first two get all results of half of the columns each. They go
// where the query was, in two rounds: the room of the last tiles, where they could go at once (swapab_join_listed.cuh),
// is wanted for the next item's, and where requests differ in length that costs 2 %.
// Included by a kernel after it has defined FORMAT, Element, N and Layout.
#pragma once

#include "swapab_turns.cuh"

namespace {

// Results of half of the columns for each of the first two warpgroups.
__device__ inline void join(const Params& p, const Shared& shared, const Item& item, const State& state,
                            float (&o)[4][N / 2]) {
    static_assert(2 * 2 * N * 64 * 4 <= Layout::kQueryBytes);
    constexpr int kTurns = Layout::kWarpgroups;
    const int thread = thread_anew() % kWarpgroup, warpgroup = thread_anew() / kWarpgroup;
    put_sums(shared, state.top, state.total);
    named_barrier_sync(kAllConsumers, kConsumers);
    if (threadIdx.x < N) {
        const int n = threadIdx.x;
        const RowSum<kTurns> row = sum_of_row<kTurns>(shared, n);
        const float norm = norm_of(row) * value_scale(p);
#pragma unroll
        for (int i = 0; i < kTurns; ++i) shared.tops()[i * N + n] = row.factor[i] * norm;
        store_log_sum(p, shared, item, n, log_sum_of(row));
    }
    named_barrier_sync(kAllConsumers, kConsumers);
    float factor[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) factor[c] = shared.tops()[warpgroup * N + column_of(c)];
#pragma unroll
    for (int b = 0; b < 4; ++b)
#pragma unroll
        for (int i = 0; i < N / 2; ++i) o[b][i] = of_half(state, warpgroup == 1, b, i) * factor[i / 4 * 2 + i % 2];
    float4* parcels = shared.parcels();  // [half][2 blocks][N / 8][thread]
#pragma unroll
    for (int step = 1; step < kTurns; ++step) {  // each half gets those of the warpgroup so many after its own
        const int half = (warpgroup + kTurns - step) % kTurns;
#pragma unroll
        for (int round = 0; round < 4; round += 2) {
            if (half < 2) {
#pragma unroll
                for (int b = 0; b < 2; ++b) {
#pragma unroll
                    for (int i = 0; i < N / 2; i += 4) {
                        float given[4];
#pragma unroll
                        for (int k = 0; k < 4; ++k)
                            given[k] = of_half(state, half == 1, round + b, i + k) * factor[i / 2 + k % 2];
                        parcels[((half * 2 + b) * (N / 8) + i / 4) * kWarpgroup + thread] = {given[0], given[1],
                                                                                             given[2], given[3]};
                    }
                }
            }
            named_barrier_sync(kAllConsumers, kConsumers);
            if (warpgroup < 2) {
#pragma unroll
                for (int b = 0; b < 2; ++b) {
#pragma unroll
                    for (int i = 0; i < N / 2; i += 4) {
                        const float4 taken = parcels[((warpgroup * 2 + b) * (N / 8) + i / 4) * kWarpgroup + thread];
                        float* const to = o[round + b] + i;
                        to[0] += taken.x, to[1] += taken.y, to[2] += taken.z, to[3] += taken.w;
                    }
                }
            }
            named_barrier_sync(kAllConsumers, kConsumers);
        }
    }
}

}  // namespace
