// SPDX-License-Identifier: Apache-2.0
// Split-KV MLA decode for few query rows: one launch, from sequence lengths to merged results.
//
// With 16 heads a 64-row matrix instruction is three quarters padding, so the operands are swapped: tokens take the M
// side of wgmma, query rows (s_q x h_q, padded to a multiple of 8) the N side (ETAP, arXiv 2506.01969, does so on
// Hopper). A warp copies tiles of 64 tokens with TMA through a ring of stages; two warpgroups take turns at the tiles,
// each with its own maximum, sum and accumulators, so that one computes scores while the other multiplies by V, and
// nothing but the ring connects them until the end of an item.
//
// 8-bit tiles stay 8 bits in shared memory. Their fragments are widened to fp16 in registers on the way to wgmma, the
// transposed ones too, so the tile is neither written a second time nor multiplied by its scale: `k_scale`, or the four
// scales of an fp8_ds_mla token, are applied to the scores and to the weights.
//
// Where keys are listed (sparse attention, FUSEDMLA_GATHER=1) four warps gather rows, every operand from a cache goes
// through registers, and a cluster shares a list: swapab_listed.cuh, swapab_gather.cuh, swapab_cluster.cuh. Otherwise
// the grid is row blocks x programs.
//
// Compiled once for each format and number of rows: FUSEDMLA_FORMAT, FUSEDMLA_TYPE, FUSEDMLA_ROWS, FUSEDMLA_ENTRY.

#include <type_traits>

#include "swapab_query.cuh"
#include "swapab_tile.cuh"

#ifndef FUSEDMLA_GATHER
#define FUSEDMLA_GATHER 0
#endif

namespace {

constexpr Format FORMAT = Format::FUSEDMLA_FORMAT;
using Element = FUSEDMLA_TYPE;  // of a 16-bit cache; fp16 otherwise
constexpr int N = FUSEDMLA_ROWS;
constexpr bool kGather = FUSEDMLA_GATHER;
using Layout = std::conditional_t<kGather, ListedPlan<FORMAT, N>, Plan<FORMAT, N>>;

}  // namespace

#if FUSEDMLA_GATHER
#include "swapab_cluster.cuh"
#else
#include "swapab_staged.cuh"
#endif

namespace {

struct State {
    float o[8][N / 2];
    float top[kColumns];    // running maximum of a query row's scores, base 2
    float total[kColumns];  // this lane's share of the sum of weights
};

struct Scales {  // of the lane's two tokens, fp8_ds_mla, and the largest one's base-2 logarithm
    float scale[2][4];
    float log2_most[2];
};

// Scores of the lane's two tokens in base 2, from the tile and the query.
__device__ inline void score_tile(const Params& p, const Shared& shared, Place place, Scales& scales,
                                  float (&s)[N / 2]) {
    const auto tile = shared.tile(place);
    const uint32_t query = shared.address + Layout::kQuery;
    if constexpr (FORMAT == Format::kSixteenBit) {
        scores_16bit<Element, N>(s, tile, query);
#pragma unroll
        for (int i = 0; i < N / 2; ++i) s[i] *= p.scale_log2;
    } else if constexpr (FORMAT == Format::kFp8) {
        scores_8bit<N, 0, 16, false>(s, tile, query, false);
        scores_rope_8bit(s, tile, query);
#pragma unroll
        for (int i = 0; i < N / 2; ++i) s[i] *= shared.row_scale()[column_of(i / 4 * 2 + i % 2)];
    } else {
        const int token = threadIdx.x / kWarp % 4 * 16 + threadIdx.x % kWarp / 4;
        auto& scale = scales.scale;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float4 four = scales_of(shared, place, token + 8 * half);
            scale[half][0] = four.x, scale[half][1] = four.y, scale[half][2] = four.z, scale[half][3] = four.w;
            const float most = fmaxf(fmaxf(four.x, four.y), fmaxf(four.z, four.w));
            scales.log2_most[half] = fmaxf(log2_approx(most), -60.f);  // finite even if all scales are 0
        }
        float sum[N / 2] = {};
        const auto add = [&](int group) {
#pragma unroll
            for (int i = 0; i < N / 2; ++i) sum[i] += s[i] * scale[i / 2 % 2][group];
        };
        if constexpr (kGather && N < 24) {  // more would not fit the registers
            scores_rope<false>(s, tile, query);
            scores_in_groups<N>(tile, query, [&](int group, const float (&part)[N / 2]) {
#pragma unroll
                for (int i = 0; i < N / 2; ++i) sum[i] += part[i] * scale[i / 2 % 2][group];
            });
            keep_in_order(s);
        } else {
            scores_8bit<N, 0, 4, false>(s, tile, query, false), add(0);
            scores_8bit<N, 128, 4, false>(s, tile, query, false), add(1);
            scores_8bit<N, 256, 4, false>(s, tile, query, false), add(2);
            scores_8bit<N, 384, 4, false>(s, tile, query, false), add(3);
            scores_rope<true>(s, tile, query);
        }
#pragma unroll
        for (int i = 0; i < N / 2; ++i) {
            const float latent = sum[i] * shared.row_scale()[column_of(i / 4 * 2 + i % 2)];
            s[i] = latent + s[i] * p.scale_log2;
        }
    }
}

// P^T of the warp's 16 tokens to N rows of 64 tokens.
__device__ inline void put_weights(uint32_t to, const float (&w)[N / 2]) {
    const int lane = threadIdx.x % kWarp, unit = threadIdx.x / kWarp % 4 * 2 + lane / 8 % 2;
#pragma unroll
    for (int i = 0; i < N / 8; ++i) {
        const int row = i * 8 + lane % 8;
        stmatrix_x2_trans(to + row * 128 + ((unit ^ (row & 7)) << 4), pack_16bit(w[4 * i], w[4 * i + 1], kElementIsFp16),
                          pack_16bit(w[4 * i + 2], w[4 * i + 3], kElementIsFp16));
    }
}

__device__ inline float max_over_tokens(float x) {  // of a warp: lanes with the same columns
#pragma unroll
    for (int step = 4; step < kWarp; step <<= 1) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
    return x;
}

// One tile: scores, online softmax, results.
__device__ void attend_tile(const Params& p, const Shared& shared, Place place, int tile, const Item& item,
                            State& state) {
    const int thread = threadIdx.x % kWarpgroup, warpgroup = threadIdx.x / kWarpgroup, warp = thread / kWarp;
    const int barrier = kFirstWarpgroup + warpgroup;
    if (!prepare_tile(shared, place, tile, item)) return;

    float s[N / 2];
    Scales scales;
    score_tile(p, shared, place, scales, s);
    mask_tile(p, shared, place, tile, item, s);

    float* exchange = shared.exchange() + warpgroup * 4 * N;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
        float low = s[c / 2 * 4 + c % 2], high = s[c / 2 * 4 + 2 + c % 2];
        if constexpr (FORMAT == Format::kFp8DsMla) low += scales.log2_most[0], high += scales.log2_most[1];
        const float most = max_over_tokens(fmaxf(low, high));
        if (thread % kWarp < 4) exchange[warp * N + column_of(c)] = most;
    }
    named_barrier_sync(barrier, kWarpgroup);
    bool changed = false;
    float shrink[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
        const float* column = exchange + column_of(c);
        const float most = fmaxf(fmaxf(column[0], column[N]), fmaxf(column[2 * N], column[3 * N]));
        const float top = fmaxf(state.top[c], most);
        changed |= top > state.top[c];
        shrink[c] = exp2_approx(state.top[c] - top);
        state.top[c] = top;
        state.total[c] *= shrink[c];
    }
    const uint32_t weights =
        shared.address + Layout::kWeights + warpgroup * Layout::kWeightVersions * Layout::kWeightBytes;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
        s[i] = exp2_approx(s[i] - state.top[i / 4 * 2 + i % 2]);
        state.total[i / 4 * 2 + i % 2] += s[i];
    }
    if constexpr (FORMAT == Format::kFp8DsMla) {  // a scale of a token that is not there may be anything
        float w[N / 2];
#pragma unroll
        for (int group = 0; group < 4; ++group) {
#pragma unroll
            for (int i = 0; i < N / 2; ++i) w[i] = s[i] == 0.f ? 0.f : s[i] * scales.scale[i / 2 % 2][group];
            put_weights(weights + group * Layout::kWeightBytes, w);
        }
    } else {
        put_weights(weights, s);
    }
    fence_proxy_async();
    if (__any_sync(~0u, changed)) {
#pragma unroll
        for (int block = 0; block < 8; ++block)
#pragma unroll
            for (int i = 0; i < N / 2; ++i) state.o[block][i] *= shrink[i / 4 * 2 + i % 2];
    }
    named_barrier_sync(barrier, kWarpgroup);
    if constexpr (FORMAT == Format::kSixteenBit)
        accumulate_16bit<Element, N>(state.o, shared.tile(place), weights);
    else
        accumulate_8bit<N, 8, Layout::kWeightVersions == 4 ? Layout::kWeightBytes : 0>(state.o, shared.tile(place), weights);
}

// Joins the two warpgroups' states and writes the result, or the partial result of a split request. Each warpgroup gives
// the other its results of half the columns and keeps the other half.
__device__ void finish_item(const Params& p, const Shared& shared, const Item& item, float scale,
                            State& state) {
    const int thread = threadIdx.x % kWarpgroup, warpgroup = threadIdx.x / kWarpgroup, lane = threadIdx.x % kWarp;
    const bool alone = item.slot >= 0 && item.tile_end - item.tile_begin == 1;  // nothing to join: a common case
    if (alone && warpgroup == 1) return;
    const int barrier = alone ? kFirstWarpgroup : kAllConsumers, threads = alone ? kWarpgroup : kConsumers;
    float* sums = shared.exchange();          // [warpgroup][warp][N]
    float* tops = shared.exchange() + 8 * N;  // [warpgroup][N], later what to multiply by
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
        float total = state.total[c];
#pragma unroll
        for (int step = 4; step < kWarp; step <<= 1) total += __shfl_xor_sync(~0u, total, step);
        if (lane < 4) sums[threadIdx.x / kWarp * N + column_of(c)] = total;
        if (thread < 4) tops[warpgroup * N + column_of(c)] = state.top[c];
    }
    named_barrier_sync(barrier, threads);
    if (threadIdx.x < N) {
        const int n = threadIdx.x;
        const float tops_here[2] = {tops[n], alone ? -INFINITY : tops[N + n]};
        const float top = fmaxf(tops_here[0], tops_here[1]);
        const float factors[2] = {exp2_approx(tops_here[0] - top), exp2_approx(tops_here[1] - top)};
        float total = 0.f;
#pragma unroll
        for (int w = 0; w < 4; ++w)
            total += sums[w * N + n] * factors[0] + (alone ? 0.f : sums[(4 + w) * N + n] * factors[1]);
        const float norm = total > 0.f ? scale / total : 0.f;
        tops[n] = factors[0] * norm, tops[N + n] = factors[1] * norm;
        store_log_sum(p, shared, item, n, total > 0.f ? top + log2_approx(total) : -INFINITY);
    }
    named_barrier_sync(barrier, threads);
    float factor[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) factor[c] = tops[warpgroup * N + column_of(c)];
    if (alone) {
#pragma unroll
        for (int b = 0; b < 8; ++b)
#pragma unroll
            for (int i = 0; i < N / 2; ++i) state.o[b][i] *= factor[i / 4 * 2 + i % 2];
        store_partial(p, item.slot, first_row_of_block(), state.o);
        named_barrier_sync(barrier, threads);
        return;
    }
    float4* parcels = reinterpret_cast<float4*>(shared.base + Layout::kQuery);  // [warpgroup][2 blocks][N / 8][thread]
    float kept[4][N / 2];
#pragma unroll
    for (int round = 0; round < 2; ++round) {
#pragma unroll
        for (int b = round * 2; b < round * 2 + 2; ++b) {
#pragma unroll
            for (int i = 0; i < N / 2; i += 4) {
                float given[4];
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    const float f = factor[i / 2 + k % 2], first = state.o[b][i + k] * f, second = state.o[4 + b][i + k] * f;
                    kept[b][i + k] = warpgroup ? second : first;
                    given[k] = warpgroup ? first : second;
                }
                parcels[((warpgroup * 2 + b % 2) * (N / 8) + i / 4) * kWarpgroup + thread] =
                    float4{given[0], given[1], given[2], given[3]};
            }
        }
        named_barrier_sync(kAllConsumers, kConsumers);
#pragma unroll
        for (int b = round * 2; b < round * 2 + 2; ++b) {
#pragma unroll
            for (int i = 0; i < N / 2; i += 4) {
                const float4 taken = parcels[(((1 - warpgroup) * 2 + b % 2) * (N / 8) + i / 4) * kWarpgroup + thread];
                kept[b][i] += taken.x, kept[b][i + 1] += taken.y, kept[b][i + 2] += taken.z, kept[b][i + 3] += taken.w;
            }
        }
        named_barrier_sync(kAllConsumers, kConsumers);
    }
    store_results(p, shared, item, kept);
    named_barrier_sync(kAllConsumers, kConsumers);
}

__device__ void attend(const Params& p, const Shared& shared, TileRing& ring, const Item& item) {
    const int warpgroup = threadIdx.x / kWarpgroup;
    named_barrier_sync(kAllConsumers, kConsumers);  // the other warpgroup may still be at the last item
    if constexpr (FORMAT == Format::kSixteenBit)
        load_query_16bit<N>(p, shared.base + Layout::kQuery, item.request, first_row_of_block());
    else
        load_query_8bit<N, FORMAT == Format::kFp8DsMla>(p, shared.base + Layout::kQuery, shared.row_scale(),
                                                        p.scale_log2 * k_scale_of(p), item.request, first_row_of_block(),
                                                        threadIdx.x / kWarp);
    fence_proxy_async();
    State state;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) state.top[c] = -1e30f, state.total[c] = 0.f;
#pragma unroll
    for (int block = 0; block < 8; ++block)
#pragma unroll
        for (int i = 0; i < N / 2; ++i) state.o[block][i] = 0.f;
    named_barrier_sync(kAllConsumers, kConsumers);
    for (int tile = item.tile_begin; tile < item.tile_end; ++tile) {
        if ((tile - item.tile_begin) % 2 == warpgroup) {
            wait_for_tile(shared, ring);
            attend_tile(p, shared, place_of(ring), tile, item, state);
            release_tile(shared, ring);
        }
        ring.advance();
    }
    const float scale = FORMAT == Format::kSixteenBit ? 1.f : k_scale_of(p);
    if (!merge_in_cluster(p, shared, item, scale, state.o, state.top, state.total))
        finish_item(p, shared, item, scale, state);
}

}  // namespace

#if FUSEDMLA_GATHER
#include "swapab_listed_kernel.cuh"
#else
#include "swapab_kernel.cuh"
#endif
