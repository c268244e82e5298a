// SPDX-License-Identifier: Apache-2.0
// The query of a block of rows into shared memory, as wgmma's K-major operand: nine blocks of N rows x 64 elements.
#pragma once

#include "query_8bit.cuh"
#include "swapab_plan.cuh"

template <int N>
__device__ inline void load_query_16bit(const Params& p, uint8_t* query, int request, int row0) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    uint4 bits[N / 8][3];
#pragma unroll
    for (int i = 0; i < N / 8; ++i) {
        const QueryRow row = query_row(p, request, row0 + warp + i * 8);
        const bool live = row.nope != nullptr;
        const uint4 zero = {0, 0, 0, 0};
        bits[i][0] = live ? row.nope[lane] : zero;
        bits[i][1] = live ? row.nope[lane + kWarp] : zero;
        bits[i][2] = live && lane < 8 ? row.rope[lane] : zero;
    }
#pragma unroll
    for (int i = 0; i < N / 8; ++i) {
        put_unit<N>(query, warp + i * 8, lane, bits[i][0]);
        put_unit<N>(query, warp + i * 8, lane + kWarp, bits[i][1]);
        if (lane < 8) put_unit<N>(query, warp + i * 8, 64 + lane, bits[i][2]);
    }
}
