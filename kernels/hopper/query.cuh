// SPDX-License-Identifier: Apache-2.0
// Where the query's rows lie, and its 16-bit elements as numbers.
#pragma once

#include "params.cuh"

struct QueryRow {
    const uint4* nope;  // null past the last row
    const uint4* rope;
};

__device__ inline QueryRow query_row(const Params& p, int request, int row) {
    if (row >= p.s_q * p.h_q) return {nullptr, nullptr};
    const int token = divide(row, p.h_q), head = row - token * p.h_q;
    const Strides &n = p.q_nope_stride, &r = p.q_rope_stride;
    const auto* nope = static_cast<const uint16_t*>(p.q_nope) + request * n.b + token * n.s + head * n.h;
    const auto* rope = static_cast<const uint16_t*>(p.q_rope) + request * r.b + token * r.s + head * r.h;
    return {reinterpret_cast<const uint4*>(nope), reinterpret_cast<const uint4*>(rope)};
}

// A block's query into L2, 128 bytes by each of some threads at a time.
template <int ROWS, int THREADS>
__device__ inline void prefetch_query(const Params& p, int request, int row0, int thread) {
    constexpr int kLines = (kLatent + kRope) * 2 / 128;
#pragma unroll 1
    for (int i = thread; i < ROWS * kLines; i += THREADS) {
        const QueryRow row = query_row(p, request, row0 + i / kLines);
        const int line = i % kLines;
        if (row.nope != nullptr) prefetch_line(line < kLines - 1 ? row.nope + line * 8 : row.rope);
    }
}

__device__ inline void unpack(uint4 bits, bool is_fp16, float (&values)[8]) {
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (is_fp16) {
            const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&words[i]));
            values[2 * i] = pair.x, values[2 * i + 1] = pair.y;
        } else {  // bfloat16 is the upper half of a float
            values[2 * i] = __uint_as_float(words[i] << 16), values[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000);
        }
    }
}

__device__ inline float largest(const float (&a)[8], float so_far) {
#pragma unroll
    for (int i = 0; i < 8; ++i) so_far = fmaxf(so_far, fabsf(a[i]));
    return so_far;
}

// Of eight 16-bit floats, bfloat16 or float16: magnitudes order as integers do.
__device__ inline uint32_t largest_16bit(uint4 bits) {
    constexpr uint32_t kMagnitudes = 0x7FFF7FFF;
    const uint32_t most = __vmaxu2(__vmaxu2(bits.x & kMagnitudes, bits.y & kMagnitudes),
                                   __vmaxu2(bits.z & kMagnitudes, bits.w & kMagnitudes));
    return max(most & 0xFFFF, most >> 16);
}
