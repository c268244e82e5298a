// SPDX-License-Identifier: Apache-2.0
// Scores of a tile in base 2, and weights as the operand of the second product.
// Included by a kernel after it has defined FORMAT, Element, N and Layout.
#pragma once

#include "swapab_shared.cuh"
#include "swapab_tile.cuh"

namespace {

struct Scales {  // of the lane's two tokens, fp8_ds_mla, and the largest one's base-2 logarithm
    float scale[2][4];
    float log2_most[2];
};

// Scores of the lane's two tokens in base 2, from the tile and the query.
__device__ inline void score_tile(const Params& p, const Shared& shared, Place place, Scales& scales,
                                  float (&s)[N / 2]) {
    const auto tile = shared.tile(place);
    const uint32_t query = shared.address() + Layout::kQuery;
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
        stmatrix_x2_trans(to + row * 128 + ((unit ^ (row & 7)) << 4),
                          pack_16bit(w[4 * i], w[4 * i + 1], kElementIsFp16),
                          pack_16bit(w[4 * i + 2], w[4 * i + 3], kElementIsFp16));
    }
}

// Where this warpgroup's weights go.
__device__ inline uint32_t own_weights(const Shared& shared) {
    return shared.address() + Layout::kWeights +
           threadIdx.x / kWarpgroup * Layout::kWeightVersions * Layout::kWeightBytes;
}

// P^T relative to the running maximum, one version for each scale group.
__device__ inline void put_all_weights(uint32_t to, const float (&s)[N / 2], const Scales& scales) {
    if constexpr (FORMAT == Format::kFp8DsMla) {  // a scale of a token that is not there may be anything
        float w[N / 2];
#pragma unroll
        for (int group = 0; group < 4; ++group) {
#pragma unroll
            for (int i = 0; i < N / 2; ++i) w[i] = s[i] == 0.f ? 0.f : s[i] * scales.scale[i / 2 % 2][group];
            put_weights(to + group * Layout::kWeightBytes, w);
        }
    } else {
        put_weights(to, s);
    }
}

__device__ inline float max_over_tokens(float x) {  // of a warp: lanes with the same columns
#pragma unroll
    for (int step = 4; step < kWarp; step <<= 1) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
    return x;
}

// Sums of the weights, [row][warp], and the rows' maxima, [warpgroup][row].
__device__ inline void put_sums(const Shared& shared, const float (&top)[kColumns], const float (&total)[kColumns]) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
        float sum = total[c];
#pragma unroll
        for (int step = 4; step < kWarp; step <<= 1) sum += __shfl_xor_sync(~0u, sum, step);
        if (threadIdx.x % kWarp < 4) shared.sums()[column_of(c) * 8 + threadIdx.x / kWarp] = sum;
        if (threadIdx.x % kWarpgroup < 4) shared.tops()[threadIdx.x / kWarpgroup * N + column_of(c)] = top[c];
    }
}

struct RowSum {  // of both warpgroups: their sums are multiplied by `factor` to be relative to 2^top
    float top, total, factor[2];
};
__device__ inline RowSum sum_of_row(const Shared& shared, int n) {
    const float tops[2] = {shared.tops()[n], shared.tops()[N + n]};
    const float4* sums = reinterpret_cast<const float4*>(shared.sums() + n * 8);
    const float4 first = sums[0], second = sums[1];
    RowSum row;
    row.top = fmaxf(tops[0], tops[1]);
    row.factor[0] = exp2_approx(tops[0] - row.top), row.factor[1] = exp2_approx(tops[1] - row.top);
    row.total = row.factor[0] * ((first.x + first.y) + (first.z + first.w)) +
                row.factor[1] * ((second.x + second.y) + (second.z + second.w));
    return row;
}

__device__ inline float norm_of(const RowSum& row) { return row.total > 0.f ? __fdividef(1.f, row.total) : 0.f; }
__device__ inline float log_sum_of(const RowSum& row) {
    return row.total > 0.f ? row.top + log2_approx(row.total) : -INFINITY;
}

__device__ inline float value_scale(const Params& p) { return FORMAT == Format::kSixteenBit ? 1.f : k_scale_of(p); }

__device__ inline void multiply_rows(float (&o)[4][N / 2], const float (&by)[kColumns]) {
#pragma unroll
    for (int block = 0; block < 4; ++block)
#pragma unroll
        for (int i = 0; i < N / 2; ++i) o[block][i] *= by[i / 4 * 2 + i % 2];
}

}  // namespace
