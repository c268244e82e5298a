// SPDX-License-Identifier: Apache-2.0
// The products of a tile with e4m3 operands: the cache's bytes as they are, the query and the weights rounded to e4m3.
//
// Tensor cores keep fewer than float32's bits when they add up 8-bit products, so a tile's results are multiplied into
// fresh accumulators and added to the running ones by ordinary instructions (two-level accumulation, as in DeepSeek-V3,
// arXiv 2412.19437, section 3.3).
#pragma once

#include "pair_plan.cuh"
#include "swapab_query.cuh"
#include "swapab_tile.cuh"

// 64-byte swizzle: rows of 64 bytes, eight of them 512 bytes apart.
__device__ inline uint64_t descriptor_64b(uint32_t address) {
    constexpr uint64_t kSwizzle64 = 2;
    return (uint64_t{1} << 16) | (uint64_t{512 >> 4} << 32) | (kSwizzle64 << 62) | ((address & 0x3FFFF) >> 4);
}

#define FUSEDMLA_WGMMA_E4M3 "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 {" FUSEDMLA_REGS32 "}, "
__device__ inline void wgmma_e4m3(float (&d)[32], uint64_t a, uint64_t b, bool accumulate) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n" FUSEDMLA_WGMMA_E4M3 "%32, %33, p, 1, 1;\n}\n"
                 : FUSEDMLA_ACC_32
                 : "l"(a), "l"(b), "r"(int(accumulate)));
}
__device__ inline void wgmma_e4m3(float (&d)[32], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n" FUSEDMLA_WGMMA_E4M3 "{%32, %33, %34, %35}, %36, p, 1, 1;\n}\n"
                 : FUSEDMLA_ACC_32
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)));
}

__device__ inline uint32_t pack_e4m3(float low, float high) {
    uint16_t bits;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(bits) : "f"(high), "f"(low));
    return bits;
}

// The query with each row's largest element at e4m3's largest value.
constexpr float kLargestE4m3 = 448.f;
__device__ inline void load_query_native(const Params& p, uint8_t* query, float* row_scale, float scale_log2,
                                         int request, int row0) {
    constexpr int N = 64;
    const int lane = threadIdx.x % kWarp;
    const auto put = [&](int n, const EightBitRow& row) {
        const float scale = kLargestE4m3 / row.most;
        const auto four = [&](const float (&x)[8], int i) {
            return pack_e4m3(x[i] * scale, x[i + 1] * scale) | pack_e4m3(x[i + 2] * scale, x[i + 3] * scale) << 16;
        };
        const auto sixteen = [&](const float (&x)[2][8]) {
            return uint4{four(x[0], 0), four(x[0], 4), four(x[1], 0), four(x[1], 4)};
        };
        *reinterpret_cast<uint4*>(query + lane / 8 * N * 128 + n * 128 + ((lane % 8 ^ (n & 7)) << 4)) = sixteen(row.nope);
        if (lane < 4)
            *reinterpret_cast<uint4*>(query + 4 * N * 128 + n * 64 + ((lane ^ (n >> 1 & 3)) << 4)) = sixteen(row.rope);
        if (lane == 0) row_scale[n] = row.most * (1.f / kLargestE4m3) * scale_log2;
    };
    for_query_rows<N>(p, request, row0, put);
}

// Scores of a tile.
__device__ inline void scores_native(float (&s)[32], uint32_t tile, uint32_t rope, uint32_t query) {
    constexpr int N = 64, kGroupBytes = 4 * kBlock;
    keep_in_order(s);
    wgmma_fence();
#pragma unroll
    for (int block = 0; block < 4; ++block) {
        const uint64_t k = descriptor_128b(tile + block * kBlock, kGroupBytes);
        const uint64_t q = descriptor_128b(query + block * N * 128);
#pragma unroll
        for (int step = 0; step < 4; ++step) wgmma_e4m3(s, k + step * 2, q + step * 2, block + step > 0);
    }
    const uint64_t k = descriptor_64b(rope), q = descriptor_64b(query + 4 * N * 128);
#pragma unroll
    for (int step = 0; step < 2; ++step) wgmma_e4m3(s, k + step * 2, q + step * 2, true);
    wgmma_commit();
    wgmma_wait<0>();
    keep_in_order(s);
}

// Weights as e4m3, times a power of two that uses its range. Token order within 16: see accumulate_native.
constexpr float kWeightScale = 256.f;
__device__ inline void put_weights_native(uint8_t* to, const float (&w)[32]) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp % 4, odd = lane / 4 % 2;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const uint32_t even_row = pack_e4m3(w[4 * i] * kWeightScale, w[4 * i + 2] * kWeightScale);
        const uint32_t odd_row = pack_e4m3(w[4 * i + 1] * kWeightScale, w[4 * i + 3] * kWeightScale);
        const uint32_t theirs = __shfl_xor_sync(~0u, odd ? even_row : odd_row, 4);
        const uint32_t mine = odd ? odd_row : even_row;
        // Tokens g, g + 1, g + 8, g + 9 for even g; the odd lane has the odd row of its pair.
        const uint32_t word = odd ? __byte_perm(theirs, mine, 0x5140) : __byte_perm(mine, theirs, 0x5140);
        const int row = i * 8 + lane % 4 * 2 + odd;
        *reinterpret_cast<uint32_t*>(to + row * 64 + ((warp ^ (row >> 1 & 3)) << 4) + lane / 8 * 4) = word;
    }
}

// O^T += V^T P^T over four blocks of 64 columns. Transposed bytes come as two columns of two tokens; those of
// tokens 2j, 2j + 1, 2j + 8, 2j + 9 of a column make a lane's four elements of k.
__device__ inline void accumulate_native(float (&o)[4][32], uint32_t tile, uint32_t weights) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp % 4;
#pragma unroll
    for (int block = 0; block < 4; ++block) {
        uint32_t raw[2][4], a[2][4];
        float sum[32];
#pragma unroll
        for (int step = 0; step < 2; ++step) {
            ldmatrix_x4_trans(raw[step], latent_unit(tile, step * 32 + lane, block * 4 + warp));
            a[step][0] = __byte_perm(raw[step][0], raw[step][1], 0x6420);
            a[step][1] = __byte_perm(raw[step][0], raw[step][1], 0x7531);
            a[step][2] = __byte_perm(raw[step][2], raw[step][3], 0x6420);
            a[step][3] = __byte_perm(raw[step][2], raw[step][3], 0x7531);
        }
        keep_in_order(sum);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < 2; ++step) wgmma_e4m3(sum, a[step], descriptor_64b(weights) + step * 2, step > 0);
        wgmma_commit();
        wgmma_wait<0>();  // the other warpgroup's products run meanwhile
        keep_in_order(sum);
#pragma unroll
        for (int i = 0; i < 32; ++i) o[block][i] += sum[i];
    }
}
