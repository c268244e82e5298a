// SPDX-License-Identifier: Apache-2.0
// wgmma of 64 x 128 x 16 with V as it lies in the cache, and the register shuffling around wgmma's fragments.
#pragma once

#include "wgmma.cuh"

template <typename T>
constexpr bool kIsFp16 = false;
template <>
constexpr bool kIsFp16<fp16> = true;

// An address as descriptors count. Above these bits the address of a cluster's other CTAs has their rank.
__device__ inline uint32_t units_of(uint32_t address) { return address >> 4 & 0x3FFF; }

// The same in all lanes, which ptxas does not know: as it is, every descriptor made of it takes two moves.
__device__ inline uint32_t in_uniform_register(uint32_t value) { return __reduce_max_sync(~0u, value); }

// Descriptor of an operand in the 128-byte swizzle whose groups of eight rows are STRIDE bytes apart and, if it is
// N-major, whose blocks of 64 columns are LEADING bytes apart. `units`: of the address, plus what the caller skips; in 32
// bits, as 64-bit sums would take twice the registers.
template <uint32_t STRIDE, uint32_t LEADING = 16>
__device__ inline uint64_t descriptor(uint32_t units) {
    constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
    return (kSwizzle128 | uint64_t{STRIDE >> 4} << 32) | ((LEADING >> 4 << 16) + units);  // one sum with what the caller adds
}

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
