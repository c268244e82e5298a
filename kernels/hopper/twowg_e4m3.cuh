// SPDX-License-Identifier: Apache-2.0
// e4m3 operands in the 64-row kernel: S = Q K^T with the cache's bytes as they are and the query rounded to e4m3.
//
// Tensor cores keep fewer than float32's bits when they add up 8-bit products, so a span's O is added up in fresh
// accumulators and then added to the running ones by ordinary instructions (two-level accumulation, as in DeepSeek-V3,
// arXiv 2412.19437, section 3.3).
#pragma once

#include "query.cuh"
#include "twowg_plan.cuh"
#include "twowg_wgmma.cuh"

// Weights are at most 2^FUSEDMLA_LAZY; times 2^kWeightExponent they use e4m3's range.
constexpr int kWeightExponent = kE4m3 ? 8 - FUSEDMLA_LAZY : 0;

// 64-byte swizzle: rows of 64 bytes, eight of them 512 bytes apart.
__device__ inline uint64_t descriptor_64b(uint32_t units) {
    constexpr uint64_t kSwizzle64 = uint64_t{2} << 62;
    return kSwizzle64 | uint64_t{512 >> 4} << 32 | (1u << 16 | units);
}

// Rounding the query, whose rows came through the ring, with each row's largest element at e4m3's largest value: by the
// scoring warps, each the 16 rows of a slot.
template <bool IS_FP16>
__device__ inline void round_query(const Params& p, int latent_slot, int rope_slot) {
    constexpr float kLargestE4m3 = 448.f;
    constexpr int kWarpRows = 16;
    const unsigned thread = thread_anew(), lane = thread % kWarp, row0 = thread / kWarp % 4 * kWarpRows;
    const uint4* latent = reinterpret_cast<const uint4*>(shared_memory + latent_slot * kQuarterBytes) + lane;
    // Of four rows at a time.
    const uint4* rope = reinterpret_cast<const uint4*>(shared_memory + kRopeAt + rope_slot * kRopeBytes) + row0 * 8 + lane;
    const int live = p.s_q * p.h_q - int(blockIdx.x * kRows + row0);
    uint32_t most_bits = 0;  // of row `lane`
#pragma unroll 1
    for (int i = 0; i < kWarpRows; ++i) {
        const uint32_t of_rope = lane / 8 == i % 4 ? largest_16bit(rope[i / 4 * kWarp]) : 0;
        const uint32_t all = __reduce_max_sync(
            ~0u, max(max(largest_16bit(latent[i * 64]), largest_16bit(latent[i * 64 + kWarp])), of_rope));
        if (i == int(lane) && i < live) most_bits = all;
    }
    const float most =
        fmaxf(IS_FP16 ? __half2float(__ushort_as_half(most_bits)) : __uint_as_float(most_bits << 16), 1e-30f);
    if (lane < kWarpRows)
        Shared::row_scales()[row0 + lane] = most * p.scale_log2 * k_scale_of(p) * (1.f / kLargestE4m3);
    const float scale = __fdividef(kLargestE4m3, most);
    const auto put = [&](uint8_t* to, uint4 bits, int i) {
        float x[8];
        unpack(bits, IS_FP16, x);
        const float factor = __shfl_sync(~0u, scale, i);
        const auto four = [&](int j) {
            const uint32_t codes = pack_e4m3(x[j] * factor, x[j + 1] * factor) | pack_e4m3(x[j + 2] * factor, x[j + 3] * factor) << 16;
            return i < live ? codes : 0;
        };
        *reinterpret_cast<uint2*>(to) = {four(0), four(4)};
    };
    uint8_t* const query = shared_memory + kQueryAt;
#pragma unroll 1
    for (int i = 0; i < kWarpRows; ++i) {  // 16 units of eight elements are a block of 128 columns
        uint8_t* to = query + lane / 16 * kQueryQuarterBytes + (row0 + i) * 128 + ((lane % 16 / 2 ^ (i & 7)) << 4) + lane % 2 * 8;
        put(to, latent[i * 64], i);
        put(to + 2 * kQueryQuarterBytes, latent[i * 64 + kWarp], i);
    }
#pragma unroll 1
    for (int group = 0; group < kWarpRows / 4; ++group) {
        const int i = group * 4 + lane / 8;
        put(query + 4 * kQueryQuarterBytes + (row0 + i) * 64 + ((lane % 8 / 2 ^ (i >> 1 & 3)) << 4) + lane % 2 * 8,
            rope[group * kWarp], i);
    }
}

template <typename T>
class Product;

template <>
class Product<e4m3> {
  public:
    __device__ explicit Product(const Params& p) : p_(p) {}

    // Its slots are four quarters and one for the rope part.
    __device__ void load_query(int, Ring<kQuarterSlots>& quarters, Ring<kRopeSlots>& rope) {
        named_barrier_sync(kScorerBarrier, kWarpgroup);  // all have done with the one before
        const Ring<kQuarterSlots> mine = quarters.after(thread_anew() / kWarp % 4);
        mbarrier_wait(Shared::quarter_full(mine.at()), mine.phase());
        mbarrier_wait(Shared::rope_full(rope.at()), rope.phase());
        if (p_.q_is_fp16)
            round_query<true>(p_, mine.at(), rope.at());
        else
            round_query<false>(p_, mine.at(), rope.at());
        fence_proxy_async();
        named_barrier_sync(kScorerBarrier, kWarpgroup);
#pragma unroll 1
        for (int quarter = 0; quarter < kQuerySlots; ++quarter, quarters.advance())
            warp_arrive_cluster(Shared::quarter_empty(quarters.at()));
        warp_arrive_cluster(Shared::rope_empty(rope.at()));
        rope.advance();
#pragma unroll
        for (int half = 0; half < 2; ++half) scale_[half] = Shared::row_scales()[first_row() - blockIdx.x * kRows + 8 * half];
    }

    __device__ void release_query() const {}  // who rounds the next one is the scorer itself

    // Unscaled scores of the next span. Returns when they are there.
    __device__ void score(float (&s)[64], Ring<kQuarterSlots>& quarters, Ring<kRopeSlots>& rope) const {
        const uint32_t query = units_of(Shared::query());
        keep_in_order(s);
#pragma unroll
        for (int quarter = 0; quarter < 4; ++quarter) {
            mbarrier_wait(Shared::quarter_full(quarters.at()), quarters.phase());
            const uint32_t keys = units_of(Shared::quarter(quarters.at()));
            quarters.advance();
            wgmma_fence();
#pragma unroll
            for (int step = 0; step < 4; ++step)
                wgmma_e4m3_128(s, descriptor<kAtomBytes>(query + quarter * (kQueryQuarterBytes >> 4) + step * 2),
                               descriptor<kAtomBytes>(keys + step * 2), quarter + step > 0);
        }
        mbarrier_wait(Shared::rope_full(rope.at()), rope.phase());
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < 2; ++step)
            wgmma_e4m3_128(s, descriptor_64b(query + (4 * kQueryQuarterBytes >> 4) + step * 2),
                           descriptor_64b(units_of(Shared::rope(rope.at())) + step * 2), true);
        wgmma_commit();
        wgmma_wait<0>();
        keep_in_order(s);
        warp_arrive_cluster(Shared::rope_empty(rope.at()));
        rope.advance();
    }

    // What scores of one of this lane's rows are multiplied by, for base 2.
    __device__ float scale(int half) const { return scale_[half]; }

  private:
    const Params& p_;
    float scale_[2];
};
