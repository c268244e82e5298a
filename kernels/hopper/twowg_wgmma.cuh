// SPDX-License-Identifier: Apache-2.0
// wgmma of 64 x 128 x 16 with V as it lies in the cache, and the register shuffling around wgmma's fragments.
#pragma once

#include "wgmma.cuh"

template <typename T>
constexpr bool kIsFp16 = false;
template <>
constexpr bool kIsFp16<fp16> = true;

#define FUSEDMLA_ACC16(i) FUSEDMLA_ACC4(i), FUSEDMLA_ACC4((i) + 4), FUSEDMLA_ACC4((i) + 8), FUSEDMLA_ACC4((i) + 12)
#define FUSEDMLA_ACC64 FUSEDMLA_ACC16(0), FUSEDMLA_ACC16(16), FUSEDMLA_ACC16(32), FUSEDMLA_ACC16(48)

#define FUSEDMLA_REGS64                                                                               \
    FUSEDMLA_REGS32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
                    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// D[64, 128] += A[64, 16] B[16, 128]; A in registers, B with its columns contiguous, in two blocks of 64.
#define FUSEDMLA_WGMMA_128(T, PTX_TYPE)                                                                             \
    __device__ inline void wgmma_128(float (&d)[64], const uint32_t (&a)[4], uint64_t b, T) {                          \
        asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." PTX_TYPE "." PTX_TYPE                            \
                     " {" FUSEDMLA_REGS64 "}, "                                                                    \
                     "{%64, %65, %66, %67}, %68, 1, 1, 1, 1;"                                                        \
                     : FUSEDMLA_ACC64                                                                                \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                          \
    }

FUSEDMLA_WGMMA_128(bf16, "bf16")
FUSEDMLA_WGMMA_128(fp16, "f16")

// An address as descriptors count. Above these bits the address of a cluster's other CTAs has their rank.
__device__ inline uint32_t units_of(uint32_t address) { return address >> 4 & 0x3FFF; }

// Descriptor of an operand in the 128-byte swizzle whose groups of eight rows are STRIDE bytes apart and, if it is
// N-major, whose blocks of 64 columns are LEADING bytes apart. `units`: of the address, plus what the caller skips; in 32
// bits, as 64-bit sums would take twice the registers.
template <uint32_t STRIDE, uint32_t LEADING = 16>
__device__ inline uint64_t descriptor(uint32_t units) {
    constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
    return (kSwizzle128 | uint64_t{STRIDE >> 4} << 32) | (LEADING >> 4 << 16 | units);
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
