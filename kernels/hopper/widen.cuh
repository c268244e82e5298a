// SPDX-License-Identifier: Apache-2.0
// Fragments of an 8-bit cache as fp16 operands of wgmma, in registers.
#pragma once

#include "ptx.cuh"

// Fragments of 16 tokens x 32 bytes: two steps of 16 elements. A lane has four neighbouring elements of a step where
// wgmma expects two pairs 8 apart; the query is laid out to match (query_8bit.cuh).
__device__ inline void widen_steps(const uint32_t (&raw)[4], uint32_t (&a)[2][4]) {
    widen(raw[0], a[0][0], a[0][2]);
    widen(raw[1], a[0][1], a[0][3]);
    widen(raw[2], a[1][0], a[1][2]);
    widen(raw[3], a[1][1], a[1][3]);
}

// The same of a transposed fragment, two columns of two tokens: the tokens of each column belong together.
__device__ inline void widen_columns(uint32_t codes, uint32_t& even, uint32_t& odd) {
    widen(__byte_perm(codes, 0, 0x3120), even, odd);
}
