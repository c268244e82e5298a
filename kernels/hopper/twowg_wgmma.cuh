// SPDX-License-Identifier: Apache-2.0
// wgmma of 64 x 128 x 16 with V as it lies in the cache, and the register shuffling around wgmma's fragments.
#pragma once

#include "descriptor.cuh"
#include "wgmma.cuh"

template <typename T>
constexpr bool kIsFp16 = false;
template <>
constexpr bool kIsFp16<fp16> = true;

// Among the four lanes of a quad, word i of lane j and word j of lane i change places.
//
// This is what lies between a fragment of wgmma, in which a quad's lanes alternate every two 16-bit elements, and
// memory accesses of 16 bytes a lane.
__device__ inline void transpose_quad(uint32_t& w0, uint32_t& w1, uint32_t& w2, uint32_t& w3) {
    const auto exchange = [](uint32_t& a, uint32_t& b, int distance) {
        const bool upper = threadIdx.x & distance;
        const uint32_t got = __shfl_xor_sync(~0u, upper ? a : b, distance);
        a = upper ? got : a;
        b = upper ? b : got;
    };
    exchange(w0, w1, 1), exchange(w2, w3, 1);
    exchange(w0, w2, 2), exchange(w1, w3, 2);
}
