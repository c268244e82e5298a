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
// The grid is row blocks x programs. Compiled once for each format and number of rows: FUSEDMLA_FORMAT, FUSEDMLA_TYPE, FUSEDMLA_ROWS, FUSEDMLA_ENTRY.

#include "swapab_query.cuh"
#include "swapab_tile.cuh"

namespace {

constexpr Format FORMAT = Format::FUSEDMLA_FORMAT;
using Element = FUSEDMLA_TYPE;  // of a 16-bit cache; fp16 otherwise
constexpr int N = FUSEDMLA_ROWS;
using Layout = Plan<FORMAT, N>;

}  // namespace

#include "swapab_store.cuh"

namespace {

struct State {
    float o[8][N / 2];
    float top[kColumns];    // running maximum of a query row's scores, base 2
    float total[kColumns];  // this lane's share of the sum of weights
};

struct Scales {  // of the lane's two tokens, fp8_ds_mla: base-2 logarithms and the larger end of them
    float log2[2][4];
    float most[2];
};

// Scores of the lane's two tokens in base 2, from the tile and the query.
__device__ inline void score_tile(const Params& p, const Shared& shared, int stage, Scales& scales, float (&s)[N / 2]) {
    const uint32_t tile = shared.tile(stage), query = shared.address + Layout::kQuery;
    if constexpr (FORMAT == Format::kSixteenBit) {
        scores_16bit<Element, N>(s, tile, query);
#pragma unroll
        for (int i = 0; i < N / 2; ++i) s[i] *= p.scale_log2;
    } else if constexpr (FORMAT == Format::kFp8) {
        scores_8bit<N, 0, 16, false>(s, tile, query, false);
        scores_8bit<N, 0, 2, true>(s, tile + Layout::kRopeOffset, query, true);
#pragma unroll
        for (int i = 0; i < N / 2; ++i) s[i] *= shared.row_scale()[column_of(i / 4 * 2 + i % 2)];
    } else {
        const int token = threadIdx.x / kWarp % 4 * 16 + threadIdx.x % kWarp / 4;
        const uint8_t* all = shared.base + stage * Layout::kStageBytes + Layout::kScalesOffset;
        float scale[2][4];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float4 four = *reinterpret_cast<const float4*>(all + (token + 8 * half) * 16);
            scale[half][0] = four.x, scale[half][1] = four.y, scale[half][2] = four.z, scale[half][3] = four.w;
            scales.most[half] = -60.f;  // finite even if all scales are 0
#pragma unroll
            for (int group = 0; group < 4; ++group) {
                scales.log2[half][group] = log2_approx(scale[half][group]);
                scales.most[half] = fmaxf(scales.most[half], scales.log2[half][group]);
            }
        }
        float sum[N / 2] = {};
        const auto add = [&](int group) {
#pragma unroll
            for (int i = 0; i < N / 2; ++i) sum[i] += s[i] * scale[i / 2 % 2][group];
        };
        scores_8bit<N, 0, 4, false>(s, tile, query, false), add(0);
        scores_8bit<N, 128, 4, false>(s, tile, query, false), add(1);
        scores_8bit<N, 256, 4, false>(s, tile, query, false), add(2);
        scores_8bit<N, 384, 4, false>(s, tile, query, false), add(3);
        const uint64_t k = descriptor_128b(tile + Layout::kRopeOffset), q = descriptor_128b(query + 8 * N * 128);
        keep_in_order(s);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < 4; ++step) Wgmma<bf16, N>::template shared<false>(s, k + step * 2, q + step * 2, step > 0);
        wgmma_commit();
        wgmma_wait<0>();
        keep_in_order(s);
#pragma unroll
        for (int i = 0; i < N / 2; ++i) {
            const float latent = sum[i] * shared.row_scale()[column_of(i / 4 * 2 + i % 2)];
            s[i] = latent + s[i] * p.scale_log2;
        }
    }
}

__device__ void mask_tile(const Params& p, int first_token, int seq_len, float (&s)[N / 2]) {
    const int token = first_token + threadIdx.x / kWarp % 4 * 16 + threadIdx.x % kWarp / 4;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
        const int row = first_row_of_block() + column_of(i / 4 * 2 + i % 2);
        const int limit = p.causal ? seq_len - p.s_q + 1 + divide(row, p.h_q) : seq_len;
        if (token + i / 2 % 2 * 8 >= limit) s[i] = -INFINITY;
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
__device__ void attend_tile(const Params& p, const Shared& shared, int stage, int tile, const Item& item,
                            State& state) {
    const int thread = threadIdx.x % kWarpgroup, warpgroup = threadIdx.x / kWarpgroup, warp = thread / kWarp;
    const int barrier = kFirstWarpgroup + warpgroup;
    const int tokens = item.seq_len - tile * kTile;
    if (tokens < kTile) clear_rows_from(shared.base + stage * Layout::kStageBytes, tokens, thread);

    float s[N / 2];
    Scales scales;
    score_tile(p, shared, stage, scales, s);
    if (tokens - (p.causal ? p.s_q - 1 : 0) < kTile) mask_tile(p, tile * kTile, item.seq_len, s);

    float* exchange = shared.exchange() + warpgroup * 4 * N;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
        float low = s[c / 2 * 4 + c % 2], high = s[c / 2 * 4 + 2 + c % 2];
        if constexpr (FORMAT == Format::kFp8DsMla) low += scales.most[0], high += scales.most[1];
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
    if constexpr (FORMAT == Format::kFp8DsMla) {
        float w[N / 2];
#pragma unroll
        for (int i = 0; i < N / 2; ++i) {
            s[i] -= state.top[i / 4 * 2 + i % 2];
            state.total[i / 4 * 2 + i % 2] += exp2_approx(s[i]);
        }
#pragma unroll
        for (int group = 0; group < 4; ++group) {
#pragma unroll
            for (int i = 0; i < N / 2; ++i)
                w[i] = s[i] == -INFINITY ? 0.f : exp2_approx(s[i] + scales.log2[i / 2 % 2][group]);
            put_weights(weights + group * Layout::kWeightBytes, w);
        }
    } else {
#pragma unroll
        for (int i = 0; i < N / 2; ++i) {
            s[i] = exp2_approx(s[i] - state.top[i / 4 * 2 + i % 2]);
            state.total[i / 4 * 2 + i % 2] += s[i];
        }
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
        accumulate_16bit<Element, N>(state.o, shared.tile(stage), weights);
    else
        accumulate_8bit<N, 8, Layout::kWeightVersions == 4 ? Layout::kWeightBytes : 0>(state.o, shared.tile(stage), weights);
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
        const int rows = p.s_q * p.h_q, row = first_row_of_block() + n;
        if (row < rows) {
            const float log_sum = total > 0.f ? top + log2_approx(total) : -INFINITY;
            if (item.slot < 0)
                p.lse[int64_t(item.request) * rows + row] = log_sum * 0.6931471805599453f;
            else
                __stcg(p.partial_lse + int64_t(item.slot) * rows + row, log_sum);
        }
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
    if (item.slot < 0)
        store_whole(p, shared, item.request, first_row_of_block(), kept);
    else
        store_partial(p, item.slot, first_row_of_block(), kept);
    named_barrier_sync(kAllConsumers, kConsumers);
}

__device__ void attend(const Params& p, const Shared& shared, Ring<Layout::kStages>& ring, const Item& item) {
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
            mbarrier_wait(shared.full(ring.stage()), ring.phase());
            attend_tile(p, shared, ring.stage(), tile, item, state);
            mbarrier_arrive(shared.empty(ring.stage()));
        }
        ring.advance();
    }
    finish_item(p, shared, item, FORMAT == Format::kSixteenBit ? 1.f : k_scale_of(p), state);
}

}  // namespace

#include "swapab_kernel.cuh"
