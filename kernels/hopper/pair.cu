// SPDX-License-Identifier: Apache-2.0
// Split-KV MLA decode over an fp8 cache for blocks of 64 query rows.
//
// Tokens take wgmma's M side and query rows its N side, as in swapab.cu, but 64 rows of results do not fit the registers
// of one warpgroup, so two share each tile: a warpgroup multiplies half of the columns of K for all scores, gets the other
// half's sums for half of the rows, makes those rows' weights, and multiplies all weights by half of the columns of V.
//
// FUSEDMLA_NATIVE 0: bytes are widened to fp16 on the way to the tensor cores, nothing is rounded but P. 1: query and
// weights are rounded to e4m3 and multiplied in e4m3, at twice the rate. Compiled for each, with FUSEDMLA_ENTRY.

#include "pair_native.cuh"

namespace {

constexpr Format FORMAT = Format::kFp8;
constexpr bool NATIVE = FUSEDMLA_NATIVE;
using Element = fp16;
constexpr int N = 64;
using Layout = PairPlan<NATIVE>;

}  // namespace

#include "swapab_store.cuh"

namespace {

constexpr int kOwn = N / 8;  // query rows that a lane makes weights of: half of those it has scores of

struct State {
    float o[4][N / 2];
    float total[kOwn];  // this lane's share of the sum of weights; the maxima are in shared memory for want of registers
};

__device__ inline float* tops_of(const Shared& shared, int tile) {
    return reinterpret_cast<float*>(shared.base + Layout::kTops) + (tile & 1) * N;
}
__device__ inline float* row_values(const Shared& shared) { return reinterpret_cast<float*>(shared.base + Layout::kRowValues); }
__device__ inline float* column_values(const Shared& shared) { return reinterpret_cast<float*>(shared.base + Layout::kColumnValues); }

// Scores of the warpgroup's half of the rows: index 4i + k of row 8i + ... as in swapab_tile.cuh, counted from the half.
__device__ inline void score_tile(const Shared& shared, int stage, float (&own)[N / 4]) {
    const int thread = threadIdx.x % kWarpgroup, warpgroup = threadIdx.x / kWarpgroup;
    const uint32_t tile = shared.tile(stage), query = shared.address + Layout::kQuery;
    float s[N / 2];
    if constexpr (NATIVE) {
        scores_native(s, tile, tile + Layout::kRopeOffset, query, warpgroup);
    } else {
        scores_8bit<N, 0, 8, false>(s, tile + warpgroup * 2 * kBlock, query + warpgroup * 4 * Layout::kQueryBlock, false);
        scores_8bit<N, 0, 1, true>(s, tile + Layout::kRopeOffset, query + warpgroup * 64, true, warpgroup * 2);
    }
    float4* parcels = reinterpret_cast<float4*>(shared.exchange());  // [warpgroup][4][thread]
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float given[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            own[4 * i + k] = warpgroup ? s[16 + 4 * i + k] : s[4 * i + k];
            given[k] = warpgroup ? s[4 * i + k] : s[16 + 4 * i + k];
        }
        parcels[(warpgroup * 4 + i) * kWarpgroup + thread] = float4{given[0], given[1], given[2], given[3]};
    }
    named_barrier_sync(kAllConsumers, kConsumers);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float4 taken = parcels[((1 - warpgroup) * 4 + i) * kWarpgroup + thread];
        const float2 scale = *reinterpret_cast<const float2*>(shared.row_scale() + warpgroup * 32 + column_of(2 * i));
        own[4 * i] = (own[4 * i] + taken.x) * scale.x, own[4 * i + 1] = (own[4 * i + 1] + taken.y) * scale.y;
        own[4 * i + 2] = (own[4 * i + 2] + taken.z) * scale.x, own[4 * i + 3] = (own[4 * i + 3] + taken.w) * scale.y;
    }
}

__device__ void attend_tile(const Params& p, const Shared& shared, int stage, int tile, const Item& item,
                            State& state) {
    const int thread = threadIdx.x % kWarpgroup, warpgroup = threadIdx.x / kWarpgroup, warp = thread / kWarp;
    const int lane = threadIdx.x % kWarp, tokens = item.seq_len - tile * kTile, first_row = warpgroup * 32;
    if (tokens < kTile && warpgroup == 0) clear_rows_from(shared.base + stage * Layout::kStageBytes, tokens, thread);

    float s[N / 4];
    score_tile(shared, stage, s);
    if (tokens - (p.causal ? p.s_q - 1 : 0) < kTile) {
        const int token = warp * 16 + lane / 4;
#pragma unroll
        for (int i = 0; i < N / 4; ++i) {
            const int row = first_row_of_block() + first_row + column_of(i / 4 * 2 + i % 2);
            const int limit = p.causal ? tokens - p.s_q + 1 + divide(row, p.h_q) : tokens;
            if (token + i / 2 % 2 * 8 >= limit) s[i] = -INFINITY;
        }
    }
    float* maxima = column_values(shared) + first_row;  // [warp][N]
#pragma unroll
    for (int c = 0; c < kOwn; ++c) {
        float most = fmaxf(s[c / 2 * 4 + c % 2], s[c / 2 * 4 + 2 + c % 2]);
#pragma unroll
        for (int step = 4; step < kWarp; step <<= 1) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
        if (lane < 4) maxima[warp * N + column_of(c)] = most;
    }
    named_barrier_sync(kFirstWarpgroup + warpgroup, kWarpgroup);
#pragma unroll
    for (int c = 0; c < kOwn; ++c) {
        const float* column = maxima + column_of(c);
        const float most = fmaxf(fmaxf(column[0], column[N]), fmaxf(column[2 * N], column[3 * N]));
        const int row = first_row + column_of(c);
        const float old = tops_of(shared, tile)[row], top = fmaxf(old, most), shrink = exp2_approx(old - top);
        if (thread < 4) {
            row_values(shared)[row] = shrink;
            tops_of(shared, tile + 1)[row] = top;
        }
        float(&low) = s[c / 2 * 4 + c % 2], (&high) = s[c / 2 * 4 + 2 + c % 2];
        low = exp2_approx(low - top), high = exp2_approx(high - top);
        state.total[c] = state.total[c] * shrink + low + high;
    }
    const uint32_t weights = shared.address + Layout::kWeights;
    if constexpr (NATIVE) {
        put_weights_native(shared.base + Layout::kWeights, s, first_row);
    } else {
        const int unit = warp * 2 + lane / 8 % 2;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = first_row + i * 8 + lane % 8;
            stmatrix_x2_trans(weights + row * 128 + ((unit ^ (row & 7)) << 4), pack_16bit(s[4 * i], s[4 * i + 1], true),
                              pack_16bit(s[4 * i + 2], s[4 * i + 3], true));
        }
    }
    fence_proxy_async();
    named_barrier_sync(kAllConsumers, kConsumers);
    float shrink[kColumns];
    bool changed = false;
#pragma unroll
    for (int c = 0; c < kColumns; c += 2) {
        const float2 two = *reinterpret_cast<const float2*>(row_values(shared) + column_of(c));
        shrink[c] = two.x, shrink[c + 1] = two.y;
        changed |= two.x < 1.f || two.y < 1.f;
    }
    const uint32_t values = shared.tile(stage) + warpgroup * 2 * kBlock;
    if constexpr (NATIVE) {
        accumulate_native(state.o, shrink, values, weights);
    } else {
        if (__any_sync(~0u, changed)) {
#pragma unroll
            for (int block = 0; block < 4; ++block)
#pragma unroll
                for (int i = 0; i < N / 2; ++i) state.o[block][i] *= shrink[i / 4 * 2 + i % 2];
        }
        accumulate_8bit<N, 4, 0>(state.o, values, weights);
    }
}

__device__ void finish_item(const Params& p, const Shared& shared, const Item& item, float scale, State& state) {
    const int thread = threadIdx.x % kWarpgroup, warpgroup = threadIdx.x / kWarpgroup, lane = threadIdx.x % kWarp;
    float* sums = column_values(shared);  // [warp][N]
    const float* tops = tops_of(shared, item.tile_end);
#pragma unroll
    for (int c = 0; c < kOwn; ++c) {
        float total = state.total[c];
#pragma unroll
        for (int step = 4; step < kWarp; step <<= 1) total += __shfl_xor_sync(~0u, total, step);
        const int row = warpgroup * 32 + column_of(c);
        if (lane < 4) sums[thread / kWarp * N + row] = total;
    }
    named_barrier_sync(kAllConsumers, kConsumers);
    if (threadIdx.x < N) {
        const int n = threadIdx.x, rows = p.s_q * p.h_q, row = first_row_of_block() + n;
        const float total = sums[n] + sums[N + n] + sums[2 * N + n] + sums[3 * N + n];
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
    const float k_scale = k_scale_of(p);
    if constexpr (NATIVE)
        load_query_native(p, query, shared.row_scale(), p.scale_log2 * k_scale, item.request, first_row_of_block());
    else
        load_query_8bit<N, false>(p, query, shared.row_scale(), p.scale_log2 * k_scale, item.request, first_row_of_block());
    fence_proxy_async();
    State state;
#pragma unroll
    for (int c = 0; c < kOwn; ++c) state.total[c] = 0.f;
    if (threadIdx.x < N) tops_of(shared, item.tile_begin)[threadIdx.x] = -1e30f;
#pragma unroll
    for (int block = 0; block < 4; ++block)
#pragma unroll
        for (int i = 0; i < N / 2; ++i) state.o[block][i] = 0.f;
    named_barrier_sync(kAllConsumers, kConsumers);
    for (int tile = item.tile_begin; tile < item.tile_end; ++tile) {
        mbarrier_wait(shared.full(ring.stage()), ring.phase());
        attend_tile(p, shared, ring.stage(), tile, item, state);
        mbarrier_arrive(shared.empty(ring.stage()));
        ring.advance();
    }
    finish_item(p, shared, item, NATIVE ? k_scale / kWeightScale : k_scale, state);
}

}  // namespace

#include "swapab_kernel.cuh"
