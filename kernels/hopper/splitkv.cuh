// SPDX-License-Identifier: Apache-2.0
// Merging the partial results of split requests inside the decode kernel.
//
// A program publishes its partial result and counts itself in at the request's counter. When all its items are done it
// comes back to its split ones, waits until every piece is in, and merges its share of the columns: n pieces are merged
// by n programs, each an n-th, in the order of the pieces, so the bits do not depend on who arrived when. No program
// waits before its own work is published, so waiting needs only that the grid's programs all get to run.
#pragma once

#include "work.cuh"

// A counter counts its request's published pieces, then its mergers, and is back at 0 for the next launch.
__device__ inline void publish(unsigned* counter, int pieces) { count_release(counter, 2 * pieces - 1); }
__device__ inline void leave(unsigned* counter, int pieces) { count_relaxed(counter, 2 * pieces - 1); }

// Returns when all pieces are published. One thread calls it; a barrier passes what it saw on to the others.
__device__ inline void wait_for_pieces(const unsigned* counter, int pieces) {
    while (load_acquire(counter) < pieces) __nanosleep(20);
}

// Distance of a piece's partial result from that of piece 0, in rows: see slot_of.
__device__ inline int rows_from_first(const Params& p, int rows, int piece) {
    return p.schedule.batch_invariant ? piece * rows : (2 * piece - (piece > 0)) * rows;
}

// Most pieces of a request: 5 for each lane of the warp that weighs them.
constexpr int kMaxPieces = 5 * kWarp;

// A row's weights of its pieces, normalised, and its log-sum-exp. A warp's work.
__device__ inline void merge_weights(const Params& p, const Item& item, int rows, int row, bool store_lse, float* weights) {
    constexpr int kBatch = kMaxPieces / kWarp;
    const int lane = threadIdx.x % kWarp;
    const float* first = p.partial_lse + int64_t(item.slot0) * rows + row;
    float lse[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
        const int piece = lane + i * kWarp;
        lse[i] = piece < item.pieces ? __ldcg(first + rows_from_first(p, rows, piece)) : -INFINITY;
    }
    float top = -1e30f, total = 0.f;  // finite, so that a row without keys makes no NaN
#pragma unroll
    for (int i = 0; i < kBatch; ++i) top = fmaxf(top, lse[i]);
#pragma unroll
    for (int step = 16; step; step >>= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
#pragma unroll
    for (int i = 0; i < kBatch; ++i) total += lse[i] = exp2_approx(lse[i] - top);
#pragma unroll
    for (int step = 16; step; step >>= 1) total += __shfl_xor_sync(~0u, total, step);
    const float norm = total > 0.f ? __fdividef(1.f, total) : 0.f;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) weights[lane + i * kWarp] = lse[i] * norm;
    if (lane == 0 && store_lse)
        p.lse[int64_t(item.request) * rows + row] =
            total > 0.f ? (top + log2_approx(total)) * 0.6931471805599453f : -INFINITY;
}

__device__ inline void add_weighted(float4& sum, float weight, const float4& v) {
    sum.x += weight * v.x, sum.y += weight * v.y, sum.z += weight * v.z, sum.w += weight * v.w;
}

// Floats of scratch memory for merge_share: at most this many rows begin or lie in a share.
constexpr int merge_scratch(int threads, int block_rows) { return threads * 4 + (block_rows / 2 + 1) * kMaxPieces; }

// This piece's share of rows row0 to row0 + rows_here of the request's result, by THREADS threads of a named barrier.
template <int THREADS>
__device__ void merge_share(const Params& p, const Item& item, int row0, int rows_here, bool to_fp16, int thread,
                            int barrier, float* scratch) {
    constexpr int kUnits = kLatent / 4;  // of four columns
    constexpr int kBatch = 8;            // loads in flight
    const int rows = p.s_q * p.h_q, pieces = item.pieces, lane = thread % kWarp;
    const int share = divide(rows_here * kUnits + pieces - 1, pieces);
    const int begin = item.piece * share, end = min(begin + share, rows_here * kUnits);
    if (begin >= end) return;
    // 2^width_log threads lie along the units, in groups that divide the pieces among them. Where there are more units
    // than threads the loads in flight are of several units, else of several pieces.
    const int width_log = min(max(32 - __clz(share - 1), 3), 31 - __clz(THREADS)), width = 1 << width_log;
    const int groups = THREADS >> width_log, group = thread >> width_log;
    const int at_once_log = groups > 1 || pieces > 4 ? 3 : pieces > 2 ? 2 : 1;  // pieces of a unit in flight together
    const int at_once = 1 << at_once_log;
    const auto unit_of = [&](int unit0, int i) { return unit0 + (i >> at_once_log) * width + (thread & (width - 1)); };
    const float4* partials = reinterpret_cast<const float4*>(p.partial_out) + (int64_t(item.slot0) * rows + row0) * kUnits;
    float4 values[kBatch];
    const auto load = [&](int unit0, int piece0) {
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const int piece = min(piece0 + (i & (at_once - 1)) * groups, pieces - 1), unit = min(unit_of(unit0, i), end - 1);
            values[i] = __ldcg(partials + (rows_from_first(p, rows, piece) * kUnits + unit));
        }
    };
    const auto store = [&](int unit, const float4& sum) {
        uint2* out = reinterpret_cast<uint2*>(p.out) + (int64_t(item.request) * rows + row0) * kUnits + unit;
        if (unit < end) *out = {pack_16bit(sum.x, sum.y, to_fp16), pack_16bit(sum.z, sum.w, to_fp16)};
    };
    load(begin, group);  // on their way while the weights are computed
    float* weights = scratch + THREADS * 4;
    const int first_row = begin / kUnits, last_row = (end - 1) / kUnits;
    for (int row = first_row + thread / kWarp; row <= last_row; row += THREADS / kWarp)
        merge_weights(p, item, rows, row0 + row, row * kUnits >= begin, weights + (row - first_row) * kMaxPieces);
    named_barrier_sync(barrier, THREADS);
    for (int unit0 = begin; unit0 < end; unit0 += width * (kBatch >> at_once_log)) {
        float4 sum = {0.f, 0.f, 0.f, 0.f};
        for (int piece0 = group; piece0 < pieces; piece0 += groups * at_once) {
            if (unit0 > begin || piece0 > group) load(unit0, piece0);
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
                const int piece = piece0 + (i & (at_once - 1)) * groups, unit = unit_of(unit0, i);
                const float* weight = weights + (min(unit, end - 1) / kUnits - first_row) * kMaxPieces;
                add_weighted(sum, piece < pieces ? weight[piece] : 0.f, values[i]);
                if (at_once < kBatch && (i & (at_once - 1)) == at_once - 1) {
                    store(unit, sum);
                    sum = {0.f, 0.f, 0.f, 0.f};
                }
            }
        }
        if (at_once < kBatch) continue;
        bool mine = true;
        if (groups > 1) {  // then one round is all; add up within the warp, then among warps
            for (int step = width; step < kWarp; step <<= 1) {
                sum.x += __shfl_xor_sync(~0u, sum.x, step), sum.y += __shfl_xor_sync(~0u, sum.y, step);
                sum.z += __shfl_xor_sync(~0u, sum.z, step), sum.w += __shfl_xor_sync(~0u, sum.w, step);
            }
            float4* sums = reinterpret_cast<float4*>(scratch);
            const int others = min(groups, THREADS / kWarp), slice = width < kWarp ? thread / kWarp : group;
            if (lane < width) sums[slice * width + (thread & (width - 1))] = sum;
            named_barrier_sync(barrier, THREADS);
            mine = slice == 0 && lane < width;
            if (mine) {
#pragma unroll
                for (int other = 1; other < THREADS / kWarp; ++other)
                    if (other < others) add_weighted(sum, 1.f, sums[other * width + (thread & (width - 1))]);
            }
        }
        if (mine) store(unit_of(unit0, 0), sum);
    }
    named_barrier_sync(barrier, THREADS);  // scratch is free again
}
