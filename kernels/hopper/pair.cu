// SPDX-License-Identifier: Apache-2.0
// Split-KV MLA decode over an fp8 cache for blocks of 64 query rows.
//
// Tokens take wgmma's M side and query rows its N side, as in swapab.cu, but 64 rows of results do not fit the registers
// of one warpgroup. So two work on a pair of tiles: each makes the weights of its own tile, under maxima of both, and
// multiplies the weights of both by its own half of the columns of V. Bytes are widened to fp16 on the way to the tensor
// cores, nothing is rounded but P; twowg.cu has a kernel that multiplies in e4m3.

#include "pair_plan.cuh"
#include "swapab_query.cuh"
#include "swapab_tile.cuh"

namespace {

constexpr Format FORMAT = Format::kFp8;
using Element = fp16;
constexpr int N = 64;
using Layout = PairPlan;

}  // namespace

#include "swapab_store.cuh"

namespace {

struct State {
    float o[4][N / 2];
    float total[kColumns];  // this lane's share of the sum of weights; the maxima are in shared memory for want of registers
};

__device__ inline float* row_values(const Shared& shared) { return reinterpret_cast<float*>(shared.base + Layout::kRowValues); }
__device__ inline float* tops_of(const Shared& shared, int pair) {
    return reinterpret_cast<float*>(shared.base + Layout::kTops) + (pair & 1) * N;
}

// Scores of a tile in base 2, masked.
__device__ inline void score_tile(const Params& p, const Shared& shared, int stage, int tokens, float (&s)[N / 2]) {
    const uint32_t tile = shared.tile(stage), query = shared.address + Layout::kQuery;
    scores_8bit<N, 0, 16, false>(s, tile, query, false);
    scores_8bit<N, 0, 2, true>(s, tile + Layout::kRopeOffset, query, true);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
        const float scale = shared.row_scale()[column_of(c)];
        s[c / 2 * 4 + c % 2] *= scale, s[c / 2 * 4 + 2 + c % 2] *= scale;
    }
    if (tokens - (p.causal ? p.s_q - 1 : 0) >= kTile) return;
    const int token = threadIdx.x / kWarp % 4 * 16 + threadIdx.x % kWarp / 4;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
        const int row = first_row_of_block() + column_of(i / 4 * 2 + i % 2);
        const int limit = p.causal ? tokens - p.s_q + 1 + divide(row, p.h_q) : tokens;
        if (token + i / 2 % 2 * 8 >= limit) s[i] = -INFINITY;
    }
}

// Maxima over the tokens of both tiles, weights of this warpgroup's, and the results brought to the new maxima.
__device__ inline void weigh_tile(const Shared& shared, int pair, float (&s)[N / 2], State& state) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    float* maxima = shared.exchange();  // [N][8 warps]
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
        float most = fmaxf(s[c / 2 * 4 + c % 2], s[c / 2 * 4 + 2 + c % 2]);
#pragma unroll
        for (int step = 4; step < kWarp; step <<= 1) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
        if (lane < 4) maxima[column_of(c) * 8 + warp] = most;
    }
    named_barrier_sync(kAllConsumers, kConsumers);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
        const float4* column = reinterpret_cast<const float4*>(maxima + column_of(c) * 8);
        const float4 a = column[0], b = column[1];
        const float most = fmaxf(fmaxf(fmaxf(a.x, a.y), fmaxf(a.z, a.w)), fmaxf(fmaxf(b.x, b.y), fmaxf(b.z, b.w)));
        const float old = tops_of(shared, pair)[column_of(c)], top = fmaxf(old, most);
        if (threadIdx.x < 4) tops_of(shared, pair + 1)[column_of(c)] = top;
        float(&low) = s[c / 2 * 4 + c % 2], (&high) = s[c / 2 * 4 + 2 + c % 2];
        low = exp2_approx(low - top), high = exp2_approx(high - top);
        if (__any_sync(~0u, top > old)) {
            const float shrink = exp2_approx(old - top);
            state.total[c] *= shrink;
#pragma unroll
            for (int block = 0; block < 4; ++block) {
                state.o[block][c / 2 * 4 + c % 2] *= shrink;
                state.o[block][c / 2 * 4 + 2 + c % 2] *= shrink;
            }
        }
        state.total[c] += low + high;
    }
}

__device__ inline void put_weights(const Shared& shared, const float (&w)[N / 2]) {
    const int lane = threadIdx.x % kWarp, warpgroup = threadIdx.x / kWarpgroup;
    const uint32_t to = Layout::kWeights + warpgroup * Layout::kWeightBytes;
    const int unit = threadIdx.x / kWarp % 4 * 2 + lane / 8 % 2;
#pragma unroll
    for (int i = 0; i < N / 8; ++i) {
        const int row = i * 8 + lane % 8;
        stmatrix_x2_trans(shared.address + to + row * 128 + ((unit ^ (row & 7)) << 4),
                          pack_16bit(w[4 * i], w[4 * i + 1], true), pack_16bit(w[4 * i + 2], w[4 * i + 3], true));
    }
    fence_proxy_async();
}

// Two tiles from `tile` on, or the last one.
__device__ void attend_pair(const Params& p, const Shared& shared, Ring<Layout::kStages>& ring, int tile, const Item& item,
                            State& state) {
    const int warpgroup = threadIdx.x / kWarpgroup, tiles = min(item.tile_end - tile, 2);
    const int pair = (tile - item.tile_begin) / 2;
    float s[N / 2];
    if (warpgroup < tiles) {
        Ring<Layout::kStages> mine = ring;
        mine.count += warpgroup;
        mbarrier_wait(shared.full(mine.stage()), mine.phase());
        const int tokens = item.seq_len - (tile + warpgroup) * kTile;
        if (tokens < kTile)
            clear_rows_from(shared.base + mine.stage() * Layout::kStageBytes, tokens, threadIdx.x % kWarpgroup);
        score_tile(p, shared, mine.stage(), tokens, s);
    } else {
#pragma unroll
        for (int i = 0; i < N / 2; ++i) s[i] = -INFINITY;
    }
    weigh_tile(shared, pair, s, state);
    put_weights(shared, s);
    named_barrier_sync(kAllConsumers, kConsumers);
    for (int i = 0; i < tiles; ++i) {
        mbarrier_wait(shared.full(ring.stage()), ring.phase());  // long complete
        const uint32_t values = shared.tile(ring.stage()) + warpgroup * 2 * kBlock;
        const uint32_t weights = shared.address + Layout::kWeights + i * Layout::kWeightBytes;
        accumulate_8bit<N, 4, 0>(state.o, values, weights);
        mbarrier_arrive(shared.empty(ring.stage()));
        ring.advance();
    }
}

__device__ void finish_item(const Params& p, const Shared& shared, const Item& item, float scale, State& state) {
    const int lane = threadIdx.x % kWarp;
    float* sums = shared.exchange();  // [N][8 warps]
    const float* tops = tops_of(shared, (item.tile_end - item.tile_begin + 1) / 2);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
        float total = state.total[c];
#pragma unroll
        for (int step = 4; step < kWarp; step <<= 1) total += __shfl_xor_sync(~0u, total, step);
        if (lane < 4) sums[column_of(c) * 8 + threadIdx.x / kWarp] = total;
    }
    named_barrier_sync(kAllConsumers, kConsumers);
    if (threadIdx.x < N) {
        const int n = threadIdx.x, rows = p.s_q * p.h_q, row = first_row_of_block() + n;
        float total = 0.f;
#pragma unroll
        for (int w = 0; w < 8; ++w) total += sums[n * 8 + w];
        row_values(shared)[n] = total > 0.f ? scale / total : 0.f;
        if (row < rows) {
            const float log_sum = total > 0.f ? tops[n] + log2_approx(total) : -INFINITY;
            if (item.slot < 0)
                p.lse[int64_t(item.request) * rows + row] = log_sum * 0.6931471805599453f;
            else
                __stcg(p.partial_lse + int64_t(item.slot) * rows + row, log_sum);
        }
    }
    named_barrier_sync(kAllConsumers, kConsumers);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
        const float factor = row_values(shared)[column_of(c)];
#pragma unroll
        for (int block = 0; block < 4; ++block) {
            state.o[block][c / 2 * 4 + c % 2] *= factor;
            state.o[block][c / 2 * 4 + 2 + c % 2] *= factor;
        }
    }
    if (item.slot < 0)
        store_whole(p, shared, item.request, first_row_of_block(), state.o);
    else
        store_partial(p, item.slot, first_row_of_block(), state.o);
    named_barrier_sync(kAllConsumers, kConsumers);
}

__device__ void attend(const Params& p, const Shared& shared, Ring<Layout::kStages>& ring, const Item& item) {
    uint8_t* query = shared.base + Layout::kQuery;
    load_query_8bit<N, false>(p, query, shared.row_scale(), p.scale_log2 * k_scale_of(p), item.request, first_row_of_block());
    fence_proxy_async();
    State state;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) state.total[c] = 0.f;
    if (threadIdx.x < N) tops_of(shared, 0)[threadIdx.x] = -1e30f;
#pragma unroll
    for (int block = 0; block < 4; ++block)
#pragma unroll
        for (int i = 0; i < N / 2; ++i) state.o[block][i] = 0.f;
    named_barrier_sync(kAllConsumers, kConsumers);
    for (int tile = item.tile_begin; tile < item.tile_end; tile += 2) attend_pair(p, shared, ring, tile, item, state);
    finish_item(p, shared, item, k_scale_of(p), state);
}

}  // namespace

#include "swapab_kernel.cuh"
