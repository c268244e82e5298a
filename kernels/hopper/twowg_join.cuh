// SPDX-License-Identifier: Apache-2.0
// The scorer's part in joining the pieces of a request: what each piece's result of a row is multiplied by.
#pragma once

#include "twowg_partial.cuh"

// Returns when the others' partial results are there. All scoring warps call it.
__device__ inline void await_others(const Params& p, const Item& item) {
    if (thread_anew() % kWarpgroup == 0) wait_for_pieces(counter_of(p, item), item.pieces - 1);
    named_barrier_sync(kScorerBarrier, kWarpgroup);
}

struct JoinedRow {
    float weight[kMostJoined], log_sum;  // of the pieces, their sum 1 (0 if there is no key at all); of all

    __device__ JoinedRow(const Params& p, const Item& item, int row, float own_log_sum) {
        weight[0] = own_log_sum;
#pragma unroll
        for (int piece = 1; piece < kMostJoined; ++piece) {
            const bool live = piece < item.pieces && row < p.s_q * p.h_q;
            weight[piece] = live ? __ldcg(p.partial_lse + first_partial_row(p, item, piece) + row) : -INFINITY;
        }
        float top = -1e30f, total = 0.f;  // finite, so that a row without keys makes no NaN
#pragma unroll
        for (int piece = 0; piece < kMostJoined; ++piece) top = fmaxf(top, weight[piece]);
#pragma unroll
        for (int piece = 0; piece < kMostJoined; ++piece) total += weight[piece] = exp2_approx(weight[piece] - top);
        const float norm = total > 0.f ? __fdividef(1.f, total) : 0.f;
#pragma unroll
        for (int piece = 0; piece < kMostJoined; ++piece) weight[piece] *= norm;
        log_sum = total > 0.f ? top + log2_approx(total) : -INFINITY;
    }
};

// Of a row's base-2 log-sum-exp: to the results, or with the partial result.
__device__ inline void store_log_sum(const Params& p, const Item& item, int row, float log_sum) {
    const int rows = p.s_q * p.h_q;
    if (row >= rows) return;
    if (item.slot < 0 || joins(p, item))
        p.lse[int64_t(item.request) * rows + row] = log_sum * 0.6931471805599453f;
    else
        __stcg(p.partial_lse + first_partial_row(p, item, item.piece) + row, log_sum);
}

// The largest score of a row among an item's keys. Floats of one sign order as integers do, those below 0 backwards.
__device__ inline void store_largest(const Params& p, const Item& item, int row, float largest) {
    const int rows = p.s_q * p.h_q;
    if (row >= rows) return;
    float* to = p.max_logits + int64_t(item.request) * rows + row;
    const float natural = fmaf(largest, 0.6931471805599453f, 0.f);  // not -0
    if (natural >= 0.f)
        atomicMax(reinterpret_cast<int*>(to), __float_as_int(natural));
    else
        atomicMin(reinterpret_cast<unsigned*>(to), __float_as_uint(natural));
}
