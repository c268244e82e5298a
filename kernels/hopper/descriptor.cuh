// SPDX-License-Identifier: Apache-2.0
// How wgmma is told where an operand lies in shared memory.
#pragma once

#include <cstdint>

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
