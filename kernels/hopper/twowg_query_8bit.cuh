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

    // Half of a row a lane: lane l has row l % 16 of the warp's, so that eight lanes, which access memory together, have
    // eight rows, whose swizzle differs. No more code than that: what is fetched for the first time takes longer than it
    // runs. The rope part of an fp8_ds_mla cache is bfloat16: so is the query's, which stays.
    __device__ void run() const {
        const int lane = thread_anew() % kWarp, row = thread_anew() % kWarpgroup / kWarp * kWarpRows + lane % kWarpRows;
        const int first = lane / kWarpRows * kPairsOfLane;
        Two most = two(0);
#pragma unroll 2
        for (int i = 0; i < kPairsOfLane; ++i) {
            const Pair pair = load(row, first + i);
#pragma unroll
            for (int j = 0; j < 8; ++j) most = __hmax2(most, __habs2(two(pair.words[j])));
        }
        const uint32_t bits = reinterpret_cast<const uint32_t&>(most), larger = max(bits & 0xFFFF, bits >> 16);
        const int exponent = exponent_of(max(larger, __shfl_xor_sync(~0u, larger, kWarpRows)));
        if (lane < kWarpRows) Shared::row_scales(slot_)[row] = power_of_two(exponent) * scale_log2_;
        const uint32_t scale = pack_16bit(power_of_two(-exponent), power_of_two(-exponent), IS_FP16);
#pragma unroll 2
        for (int i = 0; i < kPairsOfLane; ++i) {
            Pair pair = load(row, first + i);
            pair.widen(two(scale));
            store(row, first + i, pair);
        }
        fence_proxy_async();
    }

  private:
    static constexpr int kWarpRows = kRows * kWarp / kWarpgroup;
    static constexpr int kPairsOfLane = (kLatent + (kScaled ? 0 : kRope)) / 16 / (kWarp / kWarpRows);

    using Two = std::conditional_t<IS_FP16, __half2, __nv_bfloat162>;
    static __device__ Two two(uint32_t bits) { return reinterpret_cast<const Two&>(bits); }

    struct Pair {  // 16 elements: two units of a row
        uint32_t words[8];
        // As fp16, in the order of to_widened_order.
        __device__ void widen(Two scale) {
            uint32_t wide[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const Two scaled = __hmul2(two(words[i]), scale);
                const uint32_t bits = reinterpret_cast<const uint32_t&>(scaled);
                wide[i % 2 * 4 + i / 2] =
                    IS_FP16 ? bits : pack_16bit(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000), true);
            }
#pragma unroll
            for (int i = 0; i < 8; ++i) words[i] = wide[i];
        }
    };

    static __device__ uint4& unit(int row, int index) {
        return *reinterpret_cast<uint4*>(shared_memory + kQueryAt + offset_of_unit<kRows>(row, index));
    }
    static __device__ Pair load(int row, int index) {
        const uint4 a = unit(row, 2 * index), b = unit(row, 2 * index + 1);
        return {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
    }
    static __device__ void store(int row, int index, const Pair& pair) {
        const uint32_t(&w)[8] = pair.words;
        unit(row, 2 * index) = {w[0], w[1], w[2], w[3]};
        unit(row, 2 * index + 1) = {w[4], w[5], w[6], w[7]};
    }

    // Of the largest magnitude's bits. Its power of two and the inverse are numbers of the query's format.
    static __device__ int exponent_of(uint32_t bits) {
        const int exponent = exponent_over(IS_FP16 ? __half2float(__ushort_as_half(bits)) : __uint_as_float(bits << 16));
        return min(max(exponent, IS_FP16 ? -14 : -100), IS_FP16 ? 16 : 126);
    }
    static __device__ float power_of_two(int exponent) { return __int_as_float(127 + exponent << 23); }

    const int slot_;  // of the scales
    const float scale_log2_;
};

__device__ inline void widen_query(const Params& p, int slot = 0) {
    if (!kScaled && p.q_is_fp16)
        QueryWidener<true>(p, slot).run();
    else
        QueryWidener<false>(p, slot).run();
}
