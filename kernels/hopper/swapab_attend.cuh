// SPDX-License-Identifier: Apache-2.0
// What the computing warpgroups do with an item.
// Included by a kernel after it has defined FORMAT, Element, N and Layout, and what tiles are.
#pragma once

#include "swapab_join.cuh"
#include "swapab_pairs.cuh"
#include "swapab_query.cuh"
#include "swapab_turns.cuh"

namespace {

// Up to so many tiles two warpgroups work at the same ones.
constexpr int kMostInPairs = 2;

__device__ inline void load_query(const Params& p, const Shared& shared, int request) {
    if (thread_anew() >= kTwo) return;
    uint8_t* const to = shared.base + Layout::kQuery;
    if constexpr (FORMAT == Format::kSixteenBit)
        load_query_16bit<N>(p, to, request, first_row_of_block());
    else
        load_query_8bit<N, FORMAT == Format::kFp8DsMla>(p, to, shared.row_scale(), p.scale_log2, k_scale_of(p), request,
                                                        first_row_of_block(), threadIdx.x / kWarp);
    fence_proxy_async();
}

__device__ inline void attend_in_pairs_alone(const Params& p, const Shared& shared, TileRing& ring, const Item& item,
                                             float (&o)[4][N / 2]) {
    attend_in_pairs(p, shared, ring, item, o, [&] {
        named_barrier_sync(kFirstTwo, kTwo);
        if (threadIdx.x < N) {
            const RowSum<2> row = sum_of_row<2>(shared, threadIdx.x);
            shared.tops()[threadIdx.x] = norm_of(row) * value_scale(p);
            store_log_sum(p, shared, item, threadIdx.x, log_sum_of(row));
        }
        __syncwarp();
    });
    named_barrier_sync(kFirstTwo, kTwo);
    release_pair(p, shared, ring, item);
    float norm[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) norm[c] = shared.tops()[column_of(c)];
    multiply_rows(o, norm);
}

// What a CTA that shares no list does with an item, once the query is in shared memory: computes and stores results, or
// those of a piece.
__device__ void attend(const Params& p, const Shared& shared, TileRing& ring, const Item& item) {
    const int tiles = item.tile_end - item.tile_begin;
    float o[4][N / 2];  // of the first two warpgroups
    if (tiles > kMostInPairs) {
        State state;
        attend_in_turns<false>(p, shared, ring, item, state, [] {}, [] {});
        join(p, shared, item, state, o);
    } else if (thread_anew() < kTwo) {
        attend_in_pairs_alone(p, shared, ring, item, o);
    } else {
        for (int i = 0; i < tiles; ++i) ring.advance();
    }
    if (thread_anew() < kTwo) store_results(p, shared, item, o);
    named_barrier_sync(kAllConsumers, kConsumers);
}

}  // namespace
