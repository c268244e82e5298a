// SPDX-License-Identifier: Apache-2.0
// An item of many tiles: warpgroups take turns at them, each with its own reference, sum and accumulators, so that one
// computes scores while another multiplies by V. swapab_join.cuh joins their results at the end.
// Included by a kernel after it has defined FORMAT, Element, N and Layout.
#pragma once

#include "swapab_score.cuh"

namespace {

struct State {
    float o[8][N / 2];
    float top[kColumns];    // reference of a query row's weights, base 2
    float total[kColumns];  // this lane's share of the sum of weights
};

// Weights are related to a row's reference, a maximum of its scores so far. It stays as long as none is more than 2^kSlack
// times as heavy: what a fp16 weight may be and still be added up.
constexpr float kSlack = 8.f;

// New references from this lane's maxima, and what is there already related to them.
__device__ inline void move_references(const Shared& shared, const float (&most)[kColumns], State& state) {
    const int thread = threadIdx.x % kWarpgroup, warpgroup = threadIdx.x / kWarpgroup;
    float* exchange = shared.exchange() + warpgroup * 4 * N;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
        const float of_warp = max_over_tokens(most[c]);
        if (thread % kWarp < 4) exchange[thread / kWarp * N + column_of(c)] = of_warp;
    }
    named_barrier_sync(kFirstWarpgroup + warpgroup, kWarpgroup);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
        const float* column = exchange + column_of(c);
        const float of_tile = fmaxf(fmaxf(column[0], column[N]), fmaxf(column[2 * N], column[3 * N]));
        const float top = fmaxf(state.top[c], of_tile), shrink = exp2_approx(state.top[c] - top);
        state.top[c] = top;
        state.total[c] *= shrink;
#pragma unroll
        for (int block = 0; block < 8; ++block)
#pragma unroll
            for (int half = 0; half < 2; ++half) state.o[block][c / 2 * 4 + half * 2 + c % 2] *= shrink;
    }
}

// A tile's scores and online softmax; its weights into shared memory. False if it has no keys.
__device__ inline bool weigh_tile(const Params& p, const Shared& shared, Place place, int tile, const Item& item,
                                  State& state) {
    const int barrier = kFirstWarpgroup + threadIdx.x / kWarpgroup;
    if (!prepare_tile(shared, place, tile, item)) return false;

    float s[N / 2];
    LargestScales largest;
    score_tile(p, shared, place, largest, s);
    mask_tile(p, shared, place, tile, item, s);

    float most[kColumns];
    bool exceeds = false;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
        float low = s[c / 2 * 4 + c % 2], high = s[c / 2 * 4 + 2 + c % 2];
        if constexpr (FORMAT == Format::kFp8DsMla) low += largest.log2[0], high += largest.log2[1];
        most[c] = fmaxf(low, high);
        exceeds |= most[c] > state.top[c] + kSlack;
    }
    if (named_barrier_any(barrier, kWarpgroup, exceeds)) move_references(shared, most, state);
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
        s[i] = exp2_approx(s[i] - state.top[i / 4 * 2 + i % 2]);
        state.total[i / 4 * 2 + i % 2] += s[i];
    }
    put_all_weights(shared, place, own_weights(shared), s);
    fence_proxy_async();
    named_barrier_sync(barrier, kWarpgroup);
    return true;
}

__device__ inline void multiply_tile(const Shared& shared, Place place, State& state) {
    const uint32_t weights = own_weights(shared);
    if constexpr (FORMAT == Format::kSixteenBit)
        accumulate_16bit<Element, N, 8>(state.o, shared.tile(place), weights);
    else
        accumulate_8bit<N, 8, Layout::kWeightVersions == 4 ? Layout::kWeightBytes : 0>(state.o, shared.tile(place),
                                                                                      weights);
}

// Leaves this warpgroup's state. If KEEPS_LAST every consumer calls last() before it begins its last tile, and tell()
// when its sums and maxima are in shared memory; and the last tiles are not released yet.
template <bool KEEPS_LAST, typename Last, typename Tell>
__device__ inline void attend_in_turns(const Params& p, const Shared& shared, TileRing& ring, const Item& item,
                                       State& state, const Last& last, const Tell& tell) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) state.top[c] = -1e30f, state.total[c] = 0.f;
#pragma unroll
    for (int block = 0; block < 8; ++block)
#pragma unroll
        for (int i = 0; i < N / 2; ++i) state.o[block][i] = 0.f;
#pragma unroll 1
    for (int tile = item.tile_begin; tile < item.tile_end; ++tile) {
        if ((tile - item.tile_begin) % Layout::kWarpgroups == int(threadIdx.x / kWarpgroup)) {
            const bool ends = KEEPS_LAST && tile + Layout::kWarpgroups >= item.tile_end;
            if (ends) last();
            wait_for_tile(shared, ring);
            const bool any = weigh_tile(p, shared, place_of(ring), tile, item, state);
            if (ends) {
                put_sums(shared, state.top, state.total);
                tell();
            }
            if (any) multiply_tile(shared, place_of(ring), state);
            if (!ends) release_tile(shared, ring);
        }
        ring.advance();
    }
}

// What belongs to a half of the columns, of two blocks: `block` and the fourth after it.
__device__ inline float of_half(const State& state, bool second, int block, int i) {
    return second ? state.o[4 + block][i] : state.o[block][i];
}

}  // namespace
