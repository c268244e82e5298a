// SPDX-License-Identifier: Apache-2.0
// Names for what lies in shared memory, and whose part of a tile a lane has.
// Included by a kernel after it has defined FORMAT, Element, N and Layout.
#pragma once

#include "swapab_plan.cuh"

namespace {

template <typename T>
constexpr bool is_fp16 = false;
template <>
constexpr bool is_fp16<fp16> = true;
constexpr bool kElementIsFp16 = is_fp16<Element>;
constexpr int kColumns = N / 4;  // query rows that a lane holds scores of
constexpr int kConsumers = Layout::kConsumers, kThreads = Layout::kThreads;
constexpr int kTwo = 2 * kWarpgroup;  // threads of the first two warpgroups
// Named barriers, the last for each warpgroup one.
constexpr int kAllConsumers = 1, kFirstTwo = 2, kReady = 3, kSummed = 4, kWeighed = 5, kFirstWarpgroup = 6;

extern __shared__ __align__(1024) uint8_t shared_memory[];

struct SharedOperands {  // names for the places of Layout; holds nothing
    uint8_t* const base = shared_memory;
    // Made anew where it is needed: registers are scarce.
    __device__ uint32_t address() const {
        uint32_t address = smem_address(shared_memory);
        asm volatile("" : "+r"(address));
        return address;
    }
    __device__ float* exchange() const { return reinterpret_cast<float*>(base + Layout::kExchange); }
    __device__ float* row_scale() const { return reinterpret_cast<float*>(base + Layout::kRowScale); }
    __device__ float* sums() const { return exchange() + Layout::kWarps * N; }
    __device__ float* tops() const { return row_scale() + N; }
    __device__ float* scratch() const { return reinterpret_cast<float*>(base + Layout::kQuery); }
    __device__ float4* parcels() const { return reinterpret_cast<float4*>(scratch()); }
};

template <int SIZE>
struct Ring {
    unsigned count = 0;
    __device__ int stage() const { return count % SIZE; }
    __device__ uint32_t phase() const { return count / SIZE & 1; }
    __device__ void advance() { ++count; }
};

// Of a 16-bit cache the output has its type, of an 8-bit one the query's.
__device__ inline bool out_is_fp16(const Params& p) {
    return FORMAT == Format::kSixteenBit ? kElementIsFp16 : p.q_is_fp16;
}

__device__ inline float k_scale_of(const Params& p) {
    if constexpr (FORMAT != Format::kFp8) return 1.f;
    return p.k_scale ? *p.k_scale : p.k_scale_value;
}

// Read anew where it is needed: registers are scarce.
__device__ inline int first_row_of_block() {
    return (kGather ? block_y_anew() : block_x_anew()) * N;  // of listed keys, clusters go along x
}

// The query row (within the block) of a lane's i-th score of a token.
__device__ inline int column_of(int i) { return i / 2 * 8 + threadIdx.x % 4 * 2 + i % 2; }

}  // namespace
