// SPDX-License-Identifier: Apache-2.0
// Results from registers to memory. A warpgroup holds half of the latent columns of N query rows.
// Included by a kernel after it has defined FORMAT, Element, N and Layout.
#pragma once

#include "swapab_shared.cuh"

namespace {

// Result columns of a warpgroup's lane: of block b, columns 64 b + first and, `step` further, its other one.
struct Columns {
    static constexpr int step = FORMAT == Format::kSixteenBit ? 8 : 1;  // see swapab_tile.cuh
    int first;
    __device__ Columns() {
        const int lane = threadIdx.x % kWarp;
        first = threadIdx.x / kWarp % 4 * 16 + lane / 4 * (step == 1 ? 2 : 1);
    }
    // Both columns of a row.
    static __device__ void store(uint16_t* to, uint32_t pair) {
        if (step == 1)
            *reinterpret_cast<uint32_t*>(to) = pair;
        else
            to[0] = pair, to[step] = pair >> 16;
    }
};

// A warpgroup's half of the columns of a whole request, through shared memory so that 16 bytes are stored at a time.
__device__ inline void store_whole(const Params& p, const SharedOperands& shared, int request, int row0,
                                   const float (&o)[4][N / 2]) {
    const int thread = threadIdx.x % kWarpgroup, warpgroup = threadIdx.x / kWarpgroup;
    uint8_t* result = shared.base + Layout::kQuery + warpgroup * N * Layout::kResultPitch;
    const Columns columns;
#pragma unroll
    for (int b = 0; b < 4; ++b) {
#pragma unroll
        for (int i = 0; i < N / 2; i += 4) {
#pragma unroll
            for (int odd = 0; odd < 2; ++odd) {
                uint8_t* to = result + (i * 2 + threadIdx.x % 4 * 2 + odd) * Layout::kResultPitch +
                              (b * 64 + columns.first) * 2;
                Columns::store(reinterpret_cast<uint16_t*>(to), pack_16bit(o[b][i + odd], o[b][i + 2 + odd], out_is_fp16(p)));
            }
        }
    }
    named_barrier_sync(kFirstWarpgroup + warpgroup, kWarpgroup);
    constexpr int kUnits = kLatent / 2 / 8;  // of 16 bytes
    const int rows = p.s_q * p.h_q;
    for (int i = thread; i < N * kUnits; i += kWarpgroup) {
        const int n = i / kUnits, unit = i % kUnits;
        if (row0 + n >= rows) break;
        uint4* out = static_cast<uint4*>(p.out) + (int64_t(request) * rows + row0 + n) * (kLatent / 8);
        out[warpgroup * kUnits + unit] = *reinterpret_cast<const uint4*>(result + n * Layout::kResultPitch + unit * 16);
    }
}

// How the partial result of a piece lies in memory: as lanes hold it, so that a warp writes 128 contiguous bytes of each
// of four rows at a time. A unit is what a lane has of two blocks; a row has those of 2 warpgroups, 4 warps, 2 pairs of
// blocks and 8 lanes.
struct AsHeld {
    static constexpr unsigned kUnits = kLatent / 4;
    static __device__ int rows(const Params& p) { return p.s_q * p.h_q; }
    static __device__ int units(int rows_here) { return rows_here * kUnits; }
    static __device__ int row_of(unsigned unit) { return unit / kUnits; }
    static __device__ bool begins_row(unsigned unit) { return unit % kUnits == 0; }
    static __device__ void store(uint16_t* row, unsigned unit, uint2 four) {
        const unsigned block = unit % kUnits / 64 * 4 + unit / 8 % 2 * 2, lane = unit % 8;
        uint16_t* to = row + block * 64 + unit / 16 % 4 * 16 + lane * (Columns::step == 1 ? 2 : 1);
        Columns::store(to, four.x);
        Columns::store(to + 64, four.y);
    }
};

// A warpgroup's half of the columns of a piece of a request.
__device__ inline void store_partial(const Params& p, int slot, int row0, const float (&o)[4][N / 2]) {
    const int rows = p.s_q * p.h_q, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    float4* out = reinterpret_cast<float4*>(p.partial_out) + (int64_t(slot) * rows + row0) * AsHeld::kUnits + warp * 16 +
                  lane / 4;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
        if (row0 + column_of(c) >= rows) continue;
        const int i = c / 2 * 4 + c % 2;
#pragma unroll
        for (int b = 0; b < 4; b += 2)
            __stcg(out + column_of(c) * AsHeld::kUnits + b * 4, float4{o[b][i], o[b][i + 2], o[b + 1][i], o[b + 1][i + 2]});
    }
}

}  // namespace
