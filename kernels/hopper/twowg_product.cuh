// SPDX-License-Identifier: Apache-2.0
// S = Q K^T of the 64-row kernel with 16-bit operands.
//
// Most of the query (96 registers a thread) stays in registers for a whole item: at 64 x 64 x 16 wgmma would otherwise
// read as many bytes of Q as of K from shared memory, all that it can deliver, and 48 KiB would be lost to the ring.
// A lane 4g + j of warp w holds rows 16w + g and 16w + g + 8 of everything.
#pragma once

#include "twowg_plan.cuh"
#include "twowg_wgmma.cuh"

template <typename T>
class Product {
  public:
    __device__ explicit Product(const Params& p) : p_(p) {}

    // What the loaders bring: from the ring into registers, as fragments; the rest stays where it is.
    __device__ void load_query(int, Ring<kQuarterSlots>& quarters, const Ring<kRopeSlots>&) {
        const unsigned lane = thread_anew() % kWarp, row = thread_anew() % kWarpgroup / kWarp * 16 + lane % 16;
        const uint32_t at = row * 128 + ((lane / 16 ^ row % 8) << 4);
#pragma unroll
        for (int quarter = 0; quarter < kQueryQuarters; ++quarter) {
            mbarrier_wait(Shared::quarter_full(quarters.at()), quarters.phase());
            const uint32_t from = Shared::quarter(quarters.at()) + at;
#pragma unroll
            for (int step = 0; step < 8; ++step)
                ldmatrix_x4(query_[quarter * 8 + step], (from ^ step % 4 * 32) + step / 4 * kBlockBytes);
            fence_proxy_async();  // a later copy must not come before these reads
            __syncwarp();
            warp_arrive_cluster(Shared::quarter_empty(quarters.at()));
            quarters.advance();
        }
        mbarrier_wait(Shared::query_full(), queries_++ & 1);
    }
    __device__ void release_query() const { warp_arrive(Shared::query_empty()); }

    // Unscaled scores of the next span. Returns when they are there.
    __device__ void score(float (&s)[32], Ring<kQuarterSlots>& quarters, Ring<kRopeSlots>& rope) const {
        using Mma = Wgmma<T, kTile>;
        constexpr uint32_t kBlock = kBlockBytes >> 4, kAtom = kAtomBytes >> 4;
        uint32_t query = units_of(Shared::query());  // of the part in shared memory the next block
        keep_in_order(s);
        bool there = false;  // the next quarter, or the rope part
#pragma unroll
        for (int quarter = 0; quarter < 4; ++quarter) {
            if (!there) mbarrier_wait(Shared::quarter_full(quarters.at()), quarters.phase());
            if (kFencesAfterCopies) fence_proxy_async();
            const uint32_t keys = units_of(Shared::quarter(quarters.at()));
            quarters.advance();
            there = quarter < 3 ? mbarrier_test(Shared::quarter_full(quarters.at()), quarters.phase())
                                : mbarrier_test(Shared::rope_full(rope.at()), rope.phase());
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
        if (!there) mbarrier_wait(Shared::rope_full(rope.at()), rope.phase());
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
    const Params& p_;
    uint32_t query_[kQueryQuarters * 8][4];
    unsigned queries_ = 0;
};
