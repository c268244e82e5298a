// SPDX-License-Identifier: Apache-2.0
// The two matrix products of a tile with the tokens on wgmma's M side and the query rows on its N side.
//
// Scores S^T = K Q^T: 64 tokens x N rows. Results O^T += V^T P^T: eight blocks of 64 latent columns x N rows, or four.
// A warp has 16 tokens of S^T and 16 columns of each block of O^T; its lane 4g + j holds tokens (columns) g and g + 8,
// rows 8i + 2j and 8i + 2j + 1.
#pragma once

#include "descriptor.cuh"
#include "swapab_plan.cuh"
#include "wgmma.cuh"
#include "widen.cuh"

// ---- 16-bit caches: both operands straight from shared memory ----

template <typename T, int N>
__device__ inline void scores_16bit(float (&s)[N / 2], uint32_t tile, uint32_t query) {
    constexpr int kGroupBytes = 9 * kBlock;
    const uint32_t k = in_uniform_register(units_of(tile)), q = in_uniform_register(units_of(query));
    keep_in_order(s);
    wgmma_fence();
#pragma unroll
    for (int block = 0; block < 9; ++block) {
#pragma unroll
        for (int step = 0; step < 4; ++step)  // 16 elements are 32 bytes, 2 units of a descriptor's address
            Wgmma<T, N>::template shared<false>(s, descriptor<kGroupBytes>(k + block * (kBlock / 16) + step * 2),
                                                descriptor<1024>(q + block * N * 8 + step * 2), block + step > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    keep_in_order(s);
}

// Results of BLOCKS blocks of 64 columns, from `first` on.
template <typename T, int N, int BLOCKS>
__device__ inline void accumulate_16bit(float (&o)[BLOCKS][N / 2], uint32_t tile, uint32_t weights, int first = 0) {
    constexpr int kGroupBytes = 9 * kBlock;
    const uint32_t v = in_uniform_register(units_of(tile + first * kBlock)), p = in_uniform_register(units_of(weights));
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block) keep_in_order(o[block]);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block)
            Wgmma<T, N>::template shared<true>(
                o[block], descriptor<kGroupBytes>(v + step * (2 * kGroupBytes / 16) + block * (kBlock / 16)),
                descriptor<1024>(p + step * 2), true);
    }
    wgmma_commit();
    wgmma_wait<0>();
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block) keep_in_order(o[block]);
}

// ---- 8-bit caches: fragments of bytes, widened to fp16 in registers ----

// Where 16 bytes of a token's latent part lie in an 8-bit tile.
__device__ inline uint32_t latent_unit(uint32_t tile, int token, int unit) {
    const int in_group = token % kGroup;
    return tile + token / kGroup * 4 * kBlock + unit / 8 * kBlock + in_group * 128 + ((unit % 8 ^ in_group) << 4);
}

// Fragments are loaded, widened and multiplied in batches; one batch is widened while the last is multiplied.
template <int N>
constexpr int kFragmentBatch = N < 32 ? 2 : 1;  // 32 rows leave fewer registers beside a batch of scores

// Of the warp's 16 tokens, 32 elements of the latent part.
template <typename Tile>
__device__ inline void load_latent(uint32_t (&raw)[4], const Tile& tile, int pair) {
    const int lane = threadIdx.x % kWarp, token = threadIdx.x / kWarp % 4 * 16 + lane % 16;
    ldmatrix_x4(raw, latent_unit(tile, token, pair * 2 + lane / 16));
}
// The same of an 8-bit rope part: rows of 64 bytes in the 64-byte swizzle.
__device__ inline void load_rope(uint32_t (&raw)[4], uint32_t rope, int pair) {
    const int lane = threadIdx.x % kWarp, token = threadIdx.x / kWarp % 4 * 16 + lane % 16;
    ldmatrix_x4(raw, rope + token * 64 + ((pair * 2 + lane / 16 ^ (token >> 1 & 3)) << 4));
}

// Scores over PAIRS x 32 elements, from the query's first one on, that load(raw, pair) brings. They come in groups of
// OF_GROUP pairs, and group_done(group) is called after each. Of one set of scores all groups are added up there, and it
// may be changed before the next one's are. Of two sets a group's are in the one of its number's parity, while the next
// group's are being made.
template <int N, int PAIRS, int OF_GROUP, int BATCH, int SETS, typename Load, typename Done>
__device__ inline void scores_8bit(float (&s)[SETS][N / 2], uint32_t query, const Load& load, const Done& group_done) {
    constexpr int kBatches = PAIRS / BATCH, kOfGroup = OF_GROUP / BATCH, kGroups = kBatches / kOfGroup;
    static_assert(kBatches * BATCH == PAIRS && kOfGroup * BATCH == OF_GROUP && kGroups * OF_GROUP == PAIRS);
    const uint32_t units = in_uniform_register(units_of(query));
    uint32_t raw[2][BATCH][4], wide[2][BATCH][2][4];
    const auto load_batch = [&](int batch) {
#pragma unroll
        for (int i = 0; i < BATCH; ++i) load(raw[batch % 2][i], batch * BATCH + i);
    };
    const auto finish = [&](int group) {
        keep_in_order(s[group % SETS]);
        group_done(group);
    };
    load_batch(0);
    if constexpr (SETS == 1) keep_in_order(s[0]);
#pragma unroll
    for (int batch = 0; batch < kBatches; ++batch) {
        if (batch + 1 < kBatches) load_batch(batch + 1);
#pragma unroll
        for (int i = 0; i < BATCH; ++i) widen_steps(raw[batch % 2][i], wide[batch % 2][i]);
        const int group = batch / kOfGroup, of_group = batch % kOfGroup;
        const bool another = group > 0 && of_group == 0;
        if (SETS == 1 && another) wgmma_wait<0>(), finish(group - 1);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < 2 * BATCH; ++step) {
            const int k = batch * BATCH * 32 + step * 16;
            const uint64_t q = descriptor<1024>(units + k / 64 * N * 8 + k % 64 / 8);
            const bool accumulate = (SETS == 1 ? batch : of_group) + step > 0;
            Wgmma<fp16, N>::registers(s[group % SETS], wide[batch % 2][step / 2][step % 2], q, accumulate);
        }
        wgmma_commit();
        wgmma_wait<1>();
        if (SETS == 2 && another) finish(group - 1);
    }
    wgmma_wait<0>();
    finish(kGroups - 1);
}

// O^T += V^T P^T over BLOCKS x 64 columns from block `first` on. Bytes are loaded as pairs of columns and transposed as
// such: the even columns of a warp's 16 become its rows g, the odd ones its rows g + 8. Weights version
// `block / 2 * VERSION_BYTES` belongs to a scale group, blocks counted from `first`.
template <int N, int BLOCKS, int VERSION_BYTES, typename Tile>
__device__ inline void accumulate_8bit(float (&o)[BLOCKS][N / 2], const Tile& tile, uint32_t weights, int first = 0) {
    constexpr int kBatch = 2, kBatches = 2 * BLOCKS / kBatch;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp % 4;
    uint32_t raw[2][kBatch][4], wide[2][kBatch][2][4];
    const auto load_batch = [&](int batch) {
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const int at = batch * kBatch + i;
            ldmatrix_x4_trans(raw[batch % 2][i],
                              latent_unit(tile, at / BLOCKS * 32 + lane, first * 4 + at % BLOCKS * 4 + warp));
        }
    };
    const uint32_t units = in_uniform_register(units_of(weights));
    load_batch(0);
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block) keep_in_order(o[block]);
#pragma unroll
    for (int batch = 0; batch < kBatches; ++batch) {
        if (batch + 1 < kBatches) load_batch(batch + 1);
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const uint32_t(&codes)[4] = raw[batch % 2][i];
            uint32_t(&a)[2][4] = wide[batch % 2][i];
            widen_columns(codes[0], a[0][0], a[0][1]);
            widen_columns(codes[1], a[0][2], a[0][3]);
            widen_columns(codes[2], a[1][0], a[1][1]);
            widen_columns(codes[3], a[1][2], a[1][3]);
        }
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < 2; ++step) {
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
                const int at = batch * kBatch + i, block = at % BLOCKS;
                const uint64_t p = descriptor<1024>(units + block / 2 * (VERSION_BYTES / 16) + (at / BLOCKS * 2 + step) * 2);
                Wgmma<fp16, N>::registers(o[block], wide[batch % 2][i][step], p, true);
            }
        }
        wgmma_commit();
        wgmma_wait<1>();
    }
    wgmma_wait<0>();
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block) keep_in_order(o[block]);
}
