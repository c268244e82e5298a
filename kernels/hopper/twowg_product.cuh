// SPDX-License-Identifier: Apache-2.0
// S = Q K^T of the 64-row kernel with 16-bit operands.
//
// Most of the query (96 registers a thread) stays in registers for a whole item: at 64 x 64 x 16 wgmma would otherwise
// read as many bytes of Q as of K from shared memory, all that it can deliver, and 48 KiB would be lost to the ring.
// A lane 4g + j of warp w holds rows 16w + g and 16w + g + 8 of everything.
#pragma once

#include "twowg_plan.cuh"
#include "twowg_wgmma.cuh"

// 16 bytes from global to shared memory, past the registers; zeros if not `live`.
__device__ inline void copy_16_async(uint32_t to, const void* from, bool live) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(live ? 16 : 0) : "memory");
}
__device__ inline void wait_for_async_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

template <typename T>
class Product {
  public:
    __device__ explicit Product(const Params& p) : p_(p) {}

    __device__ void load_query(int request, const Ring<kQuarterSlots>&, const Ring<kRopeSlots>&) {
        constexpr int kInRegisters = kQueryQuarters * 4, kInShared = 16 - kInRegisters;  // units of 64 bytes of a row
        named_barrier_sync(kScorerBarrier, kWarpgroup);  // all have done with the query of the item before
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = first_row() - blockIdx.x * kRows + 8 * half;
            const uint4* nope = query_row(p_.q_nope, p_.q_nope_stride, request, half);
            const uint4* rope = query_row(p_.q_rope, p_.q_rope_stride, request, half);
#pragma unroll
            for (int i = 0; i < kInShared + 2; ++i) {
                const int unit = i % 2 * 4 + thread_anew() % 4;  // of 16 bytes, of the 128 of a row of a block
                const uint4* from = i < kInShared ? nope + (kInRegisters + i) * 4 : rope + (i - kInShared) * 4;
                copy_16_async(Shared::query() + i / 2 * kBlockBytes + row * 128 + ((unit ^ (row & 7)) << 4),
                              nope ? from : p_.q_nope, nope != nullptr);
            }
#pragma unroll
            for (int i = 0; i < kInRegisters; ++i) {
                const uint4 bits = nope ? __ldg(nope + i * 4) : uint4{0, 0, 0, 0};
                query_[2 * i][half] = bits.x, query_[2 * i][half + 2] = bits.y;
                query_[2 * i + 1][half] = bits.z, query_[2 * i + 1][half + 2] = bits.w;
            }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int i = 0; i < kInRegisters; ++i)  // from 16 bytes a lane to fragments
                transpose_quad(query_[2 * i][half], query_[2 * i][half + 2], query_[2 * i + 1][half],
                               query_[2 * i + 1][half + 2]);
        wait_for_async_copies();
        fence_proxy_async();
        named_barrier_sync(kScorerBarrier, kWarpgroup);
    }

    // Unscaled scores of the next span. Returns when they are there.
    __device__ void score(float (&s)[32], Ring<kQuarterSlots>& quarters, Ring<kRopeSlots>& rope) const {
        using Mma = Wgmma<T, kTile>;
        constexpr uint32_t kBlock = kBlockBytes >> 4, kAtom = kAtomBytes >> 4;
        uint32_t query = units_of(Shared::query());  // of the part in shared memory the next block
        keep_in_order(s);
#pragma unroll
        for (int quarter = 0; quarter < 4; ++quarter) {
            mbarrier_wait(Shared::quarter_full(quarters.at()), quarters.phase());
            if (kFencesAfterCopies) fence_proxy_async();
            const uint32_t keys = units_of(Shared::quarter(quarters.at()));
            quarters.advance();
            wgmma_fence();
#pragma unroll
            for (int step = 0; step < 8; ++step) {  // 16 columns are 32 bytes, 2 units
                const uint64_t k = descriptor<kGroupBytes>(keys + step / 4 * kAtom + step % 4 * 2);
                const uint64_t q = descriptor<kAtomBytes>(query + step / 4 * kBlock + step % 4 * 2);
                if (quarter < kQueryQuarters)
                    Mma::registers(s, query_[quarter * 8 + step], k, quarter + step > 0);
                else
                    Mma::template shared<false>(s, q, k, quarter + step > 0);
            }
            if (quarter >= kQueryQuarters) query += 2 * kBlock;
        }
        mbarrier_wait(Shared::rope_full(rope.at()), rope.phase());
        if (kFencesAfterCopies) fence_proxy_async();
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < 4; ++step)
            Mma::template shared<false>(s, descriptor<kAtomBytes>(query + step * 2),
                                        descriptor<kAtomBytes>(units_of(Shared::rope(rope.at())) + step * 2), true);
        wgmma_commit();
        wgmma_wait<0>();
        keep_in_order(s);
        warp_arrive_cluster(Shared::rope_empty(rope.at()));
        rope.advance();
    }

    // What scores of one of this lane's rows are multiplied by, for base 2.
    __device__ float scale(int) const { return p_.scale_log2; }

  private:
    // This lane's part of one of its rows of the query, 16 of each 64 bytes; null past the last row.
    __device__ const uint4* query_row(const void* q, const Strides& stride, int request, int half) const {
        const int row = first_row() + 8 * half, token = divide(row, p_.h_q), head = row - token * p_.h_q;
        if (row >= p_.s_q * p_.h_q) return nullptr;
        const auto* at = static_cast<const uint16_t*>(q) + request * stride.b + token * stride.s + head * stride.h;
        return reinterpret_cast<const uint4*>(at) + threadIdx.x % 4;
    }

    const Params& p_;
    uint32_t query_[kQueryQuarters * 8][4];
};
