// SPDX-License-Identifier: Apache-2.0
// The query where 8-bit caches are widened: loaders bring it to where wgmma will read it (twowg_query.cuh), the scoring
// warps turn it into fp16 there. Sixteen elements of a row stay in their place, so each lane turns its own.
#pragma once

#include "query_8bit.cuh"
#include "twowg_plan.cuh"

template <bool IS_FP16>
class QueryWidener {
  public:
    __device__ explicit QueryWidener(const Params& p, int slot) : slot_(slot), scale_log2_(p.scale_log2 * k_scale_of(p)) {}

    // The 16 rows of a warp. The rope part of an fp8_ds_mla cache is bfloat16: so is the query's, which stays.
    __device__ void run() const {
        const int warp = thread_anew() % kWarpgroup / kWarp;
#pragma unroll 1
        for (int first = warp * kWarpRows; first < (warp + 1) * kWarpRows; first += kTogether) widen(first);
        fence_proxy_async();
    }

  private:
    static constexpr int kWarpRows = kRows * kWarp / kWarpgroup, kTogether = 8;

    struct Pair {  // 16 elements: two units of a row
        uint4 bits[2];
        __device__ uint32_t most() const { return max(largest_16bit(bits[0]), largest_16bit(bits[1])); }
        __device__ void widen(float scale) {
            float a[8], b[8];
            unpack(bits[0], IS_FP16, a);
            unpack(bits[1], IS_FP16, b);
            to_widened_order(a, b, scale, bits);
        }
        __device__ void swap_if(bool yes) {
            const uint4 first = bits[0];
            bits[0] = yes ? bits[1] : first, bits[1] = yes ? first : bits[1];
        }
    };

    // Of the magnitude's bits, and not 0.
    static __device__ float number(uint32_t bits) {
        return fmaxf(IS_FP16 ? __half2float(__ushort_as_half(bits)) : __uint_as_float(bits << 16), 1e-30f);
    }

    static __device__ uint4& unit(int row, int index) {
        return *reinterpret_cast<uint4*>(shared_memory + kQueryAt + offset_of_unit<kRows>(row, index));
    }

    // The latent elements of a row at a time, of the rope part those of eight rows together, a pair a lane. Of eight
    // lanes half begin with their second unit, against bank conflicts.
    __device__ void widen(int first) const {
        const int lane = thread_anew() % kWarp, rope_row = first + lane / 4, rope_unit = 64 + lane % 4 * 2;
        const bool swapped = lane & 4;
        Pair rope;
        uint32_t most_rope = 0;
        if constexpr (!kScaled) {
            rope = {unit(rope_row, rope_unit), unit(rope_row, rope_unit + 1)};
            most_rope = rope.most();
            most_rope = max(most_rope, __shfl_xor_sync(~0u, most_rope, 1));
            most_rope = max(most_rope, __shfl_xor_sync(~0u, most_rope, 2));
        }
        int rope_exponent = 0;
#pragma unroll 2  // code that is fetched for the first time takes longer than it runs
        for (int i = 0; i < kTogether; ++i) {
            Pair pair = {unit(first + i, 2 * lane + swapped), unit(first + i, 2 * lane + !swapped)};
            const uint32_t most = max(__reduce_max_sync(~0u, pair.most()), __shfl_sync(~0u, most_rope, i * 4));
            const int exponent = exponent_over(number(most));
            if (lane / 4 == i) rope_exponent = exponent;
            pair.swap_if(swapped);
            pair.widen(exp2f(float(-exponent)));
            pair.swap_if(swapped);
            unit(first + i, 2 * lane + swapped) = pair.bits[0], unit(first + i, 2 * lane + !swapped) = pair.bits[1];
        }
        if (lane % 4 == 0) Shared::row_scales(slot_)[rope_row] = exp2f(float(rope_exponent)) * scale_log2_;
        if constexpr (!kScaled) {
            rope.widen(exp2f(float(-rope_exponent)));
            unit(rope_row, rope_unit) = rope.bits[0], unit(rope_row, rope_unit + 1) = rope.bits[1];
        }
    }

    const int slot_;  // of the scales
    const float scale_log2_;
};

__device__ inline void widen_query(const Params& p, int slot = 0) {
    if (!kScaled && p.q_is_fp16)
        QueryWidener<true>(p, slot).run();
    else
        QueryWidener<false>(p, slot).run();
}
