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
                const uint32_t pair = pack_16bit(o[b][i + odd], o[b][i + 2 + odd], out_is_fp16(p));
                if (Columns::step == 1) {
                    *reinterpret_cast<uint32_t*>(to) = pair;
                } else {
                    *reinterpret_cast<uint16_t*>(to) = pair;
                    *reinterpret_cast<uint16_t*>(to + Columns::step * 2) = pair >> 16;
                }
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

// The same of a piece of a request: float32, 32 bytes of a row by 8 lanes are whole sectors.
template <int BLOCKS>
__device__ inline void store_partial(const Params& p, int slot, int row0, const float (&o)[BLOCKS][N / 2]) {
    const int rows = p.s_q * p.h_q;
    const Columns columns;
    float* out = p.partial_out + (int64_t(slot) * rows + row0) * kLatent + threadIdx.x / kWarpgroup * (kLatent / 2) +
                 columns.first;  // with all eight blocks it is the first warpgroup
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
        if (row0 + column_of(c) >= rows) continue;
        float* to = out + column_of(c) * kLatent;
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b) {
            const float low = o[b][c / 2 * 4 + c % 2], high = o[b][c / 2 * 4 + 2 + c % 2];
            if (Columns::step == 1) {
                __stcg(reinterpret_cast<float2*>(to + b * 64), float2{low, high});
            } else {
                __stcg(to + b * 64, low);
                __stcg(to + b * 64 + Columns::step, high);
            }
        }
    }
}

}  // namespace
