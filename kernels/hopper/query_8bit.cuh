// SPDX-License-Identifier: Apache-2.0
// The query of a block of rows into shared memory as fp16, for the products with widened 8-bit caches: wgmma's K-major
// operand, nine blocks of N rows x 64 elements. The work of eight warps.
#pragma once

#include "query.cuh"
#include "splitkv.cuh"

// `unit` counts 16 bytes along a row.
template <int N>
__device__ inline int offset_of_unit(int row, int unit) {
    return unit / 8 * N * 128 + row * 128 + ((unit % 8 ^ (row & 7)) << 4);
}
template <int N>
__device__ inline void put_unit(uint8_t* query, int row, int unit, uint4 bits) {
    *reinterpret_cast<uint4*>(query + offset_of_unit<N>(row, unit)) = bits;
}

// Sixteen elements as fp16: first the first two of every four, then the other two; see widen_steps.
__device__ inline void to_widened_order(const float (&a)[8], const float (&b)[8], float scale, uint4 (&units)[2]) {
    const auto two = [&](const float (&x)[8], int i) { return pack_16bit(x[i] * scale, x[i + 1] * scale, true); };
    units[0] = {two(a, 0), two(a, 4), two(b, 0), two(b, 4)};
    units[1] = {two(a, 2), two(a, 6), two(b, 2), two(b, 6)};
}
template <int N>
__device__ inline void put_widened_order(uint8_t* query, int row, int pair, const float (&a)[8], const float (&b)[8],
                                         float scale) {
    uint4 units[2];
    to_widened_order(a, b, scale, units);
    put_unit<N>(query, row, 2 * pair, units[0]);
    put_unit<N>(query, row, 2 * pair + 1, units[1]);
}

// A row's elements times 2^-exponent fit fp16, whose range bfloat16 exceeds, and keep their bits: most <= 2^exponent.
__device__ inline int exponent_over(float most) { return (__float_as_int(most) >> 23) - 126; }

// Sixteen latent elements of a row a lane; of the rope part, sixteen by each of the first four lanes.
struct EightBitRow {
    uint4 rope_bits[2];
    float nope[2][8], rope[2][8];
    float most_nope, most;  // largest magnitude of the latent part, of all
};

// Calls put(n, row) for the rows n of the block that are the warp's (of eight); the loads of two rows are in flight
// together. Of more there would be more code than their latency is worth.
template <int N, typename Put>
__device__ inline void for_query_rows(const Params& p, int request, int row0, int warp, const Put& put) {
    constexpr int kTogether = N / 8 < 2 ? N / 8 : 2;
    const int lane = threadIdx.x % kWarp;
#pragma unroll 1
    for (int first = warp; first < N; first += 8 * kTogether) {
        uint4 nope[kTogether][2], rope[kTogether][2];
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
            const QueryRow row = query_row(p, request, row0 + first + i * 8);
            const uint4 zero = {0, 0, 0, 0};
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                nope[i][half] = row.nope != nullptr ? row.nope[2 * lane + half] : zero;
                rope[i][half] = row.rope != nullptr && lane < 4 ? row.rope[2 * lane + half] : zero;
            }
        }
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
            EightBitRow row;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                row.rope_bits[half] = rope[i][half];
                unpack(nope[i][half], p.q_is_fp16, row.nope[half]);
                unpack(rope[i][half], p.q_is_fp16, row.rope[half]);
            }
            // Positive floats order as integers do.
            const float most = largest(row.nope[0], largest(row.nope[1], 1e-30f));
            row.most_nope = __int_as_float(__reduce_max_sync(~0u, __float_as_int(most)));
            const float all = largest(row.rope[0], largest(row.rope[1], most));
            row.most = __int_as_float(__reduce_max_sync(~0u, __float_as_int(all)));
            if (first + i * 8 < N) put(first + i * 8, row);
        }
    }
}

// Into fp16 by a power of two a row. `row_scale` receives what undoes it, times scale_log2 and k_scale: what scores are to
// be multiplied by. The two are not multiplied before the query is there, for k_scale may be on its way, too. The rope
// part of an fp8_ds_mla cache is bfloat16: so is the query's.
template <int N, bool ROPE_IS_BF16>
__device__ inline void load_query_8bit(const Params& p, uint8_t* query, float* row_scale, float scale_log2, float k_scale,
                                       int request, int row0, int warp) {
    const int lane = threadIdx.x % kWarp;
    const auto put = [&](int n, const EightBitRow& row) {
        const int exponent = exponent_over(ROPE_IS_BF16 ? row.most_nope : row.most);
        const float scale = exp2f(float(-exponent));
        put_widened_order<N>(query, n, lane, row.nope[0], row.nope[1], scale);
        if (lane < 4) {
            if (ROPE_IS_BF16) {
                put_unit<N>(query, n, 64 + 2 * lane, row.rope_bits[0]);
                put_unit<N>(query, n, 65 + 2 * lane, row.rope_bits[1]);
            } else {
                put_widened_order<N>(query, n, 32 + lane, row.rope[0], row.rope[1], scale);
            }
        }
        if (lane == 0) row_scale[n] = exp2f(float(exponent)) * scale_log2 * k_scale;
    };
    for_query_rows<N>(p, request, row0, warp, put);
}
