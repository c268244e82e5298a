// SPDX-License-Identifier: Apache-2.0
// The query of a block of rows, on its way to the scorer: by warps that have nothing else to do, or by those that
// gather. What the scorer keeps in registers comes through the ring, as if it were keys, an item ahead; the rest (where
// caches are widened, all) goes where wgmma reads it from, once the scorer has done with the item before.
#pragma once

#include "query.cuh"
#include "twowg_tasks.cuh"

// Waits for the slots of the ring that a query takes, and passes them over. By who fills the others.
__device__ inline void pass_query_slots(Ring<kQuarterSlots>& ring) {
#pragma unroll 1
    for (int quarter = 0; quarter < kQuerySlots; ++quarter, ring.advance())
        mbarrier_wait(Shared::quarter_empty(ring.at()), ring.phase() ^ 1);
}

class QueryLoader {
  public:
    __device__ explicit QueryLoader(const Params& p) : p_(p) {}

    __device__ void run() {
        Ring<kQuarterSlots> ring;
        Tasks::for_items([&](const Item& item) {
            if (kQueryQuarters > 0) mbarrier_wait(Shared::query_may_come(), queries_ & 1);
            look_up(item.request);
            if (kQueryQuarters > 0 || queries_ > 0) copy<true>(ring);  // the first one is not to be prefetched
            commit_async_copies();
            wait_until_scorer_has_done();
            copy<false>(ring);
            commit_async_copies();
            if constexpr (kQueryQuarters > 0) {
                wait_for_async_copies<1>();
                named_barrier_sync(kLoadersBarrier, kLoaders * kWarp);
                if (warp() < kQueryQuarters) warp_arrive(Shared::quarter_full(ring.after(warp()).at()));
            }
            wait_for_async_copies<0>();
            fence_proxy_async();
            __syncwarp();
            warp_arrive(Shared::query_full());
            ring.advance((kQueryQuarters + 4 * (item.tile_end - item.tile_begin)) % (2 * kQuarterSlots));
        });
    }

    // By gathering warps. The ring's next slots, for what goes through it, are empty.
    __device__ void load(int request, const Ring<kQuarterSlots>& ring) {
        look_up(request);
        copy<true>(ring);
#pragma unroll 1
        for (int quarter = 0; quarter < kQueryQuarters; ++quarter)
            arrive_with_copies(Shared::quarter_full(ring.after(quarter).at()));
        wait_until_scorer_has_done();
        copy<false>({});
        arrive_with_copies(Shared::query_full());
    }

  private:
    static constexpr int kTogether = 4;  // rows, by eight lanes each
    static constexpr int kRounds = (kRows / kTogether + kLoaders - 1) / kLoaders;
    static_assert(kTogether * kRounds <= kWarp);

    static __device__ int warp() { return int(thread_anew() / kWarp) - (4 * kWarpgroup / kWarp - kLoaders); }
    static __device__ unsigned lane() { return thread_anew() % kWarp; }
    static __device__ int row_of(int round, int i) { return (round * kLoaders + warp()) * kTogether + i; }

    __device__ void wait_until_scorer_has_done() { mbarrier_wait(Shared::query_empty(), queries_++ & 1 ^ 1); }

    // Where the warp's rows lie, one of them a lane.
    __device__ void look_up(int request) {
        const int row = row_of(lane() / kTogether, lane() % kTogether);
        const QueryRow from = query_row(p_, request, block_x_anew() * kRows + row);
        const bool live = row < kRows && from.nope != nullptr;
        nope_ = live ? reinterpret_cast<uint64_t>(from.nope) : 0;
        rope_ = live ? reinterpret_cast<uint64_t>(from.rope) : 0;
    }

    // Of the warp's rows the quarters that go through the ring, or the others and the rope part.
    template <bool THROUGH_RING>
    __device__ void copy(const Ring<kQuarterSlots>& ring) const {
        constexpr int kBegin = THROUGH_RING ? 0 : kQueryQuarters, kEnd = THROUGH_RING ? kQueryQuarters : 4;
        const unsigned chunk = lane() % 8;
        uint32_t to[4];
#pragma unroll
        for (int i = 0; i < kEnd - kBegin; ++i)
            to[i] = THROUGH_RING ? Shared::quarter(ring.after(i).at()) : Shared::query() + i * kQueryQuarterBytes;
#pragma unroll 1
        for (int round = 0; round < kRounds; ++round) {
            const int source = round * kTogether + lane() / 8, row = row_of(round, lane() / 8);
            const uint64_t nope = __shfl_sync(~0u, nope_, source), rope = __shfl_sync(~0u, rope_, source);
            if (row >= kRows) continue;
            const bool live = nope != 0;
            const uint64_t address = live ? nope : reinterpret_cast<uint64_t>(p_.q_nope);
            const uint4* from = reinterpret_cast<const uint4*>(address) + chunk;
            const uint32_t at = row * 128 + ((chunk ^ row % 8) << 4);
#pragma unroll
            for (int quarter = kBegin; quarter < kEnd; ++quarter)
#pragma unroll
                for (int block = 0; block < 2; ++block)
                    copy_16_async(to[quarter - kBegin] + at + block * kBlockBytes, from + quarter * 16 + block * 8,
                                  live);
            if (!THROUGH_RING) {
                const uint4* rope_from = live ? reinterpret_cast<const uint4*>(rope) + chunk : from;
                copy_16_async(Shared::query() + (4 - kQueryQuarters) * kQueryQuarterBytes + at, rope_from, live);
            } else if (live) {  // the rest into L2
                prefetch_line(from + kQueryQuarters * 16 + chunk * (8 - 2 * kQueryQuarters));
                prefetch_line(reinterpret_cast<const uint4*>(rope) + chunk);
            }
        }
    }

    const Params& p_;
    uint64_t nope_ = 0, rope_ = 0;  // of a row of the warp's; 0 past the last
    unsigned queries_ = 0;
};

// With e4m3: whole rows into the ring, for the scorer to round. 16 rows a quarter, all rope parts in a slot.
class RowLoader {
  public:
    __device__ explicit RowLoader(const Params& p) : p_(p) {}

    __device__ void run() {
        Tasks::for_items([&](const Item& item) {
            mbarrier_wait(Shared::query_may_come(), queries_++ & 1);
            for (int slot = warp(); slot < kQuerySlots; slot += kLoaders) copy_latent(item.request, slot);
            if (warp() == kLoaders - 1) copy_rope(item.request);
            warp_arrive(Shared::query_full());
            const int spans = (item.tile_end - item.tile_begin + 1) / 2;
            quarters_.advance((kQuerySlots + 4 * spans) % (2 * kQuarterSlots));
            rope_.advance((1 + spans) % (kRopeSlots > 0 ? 2 * kRopeSlots : 1));
        });
    }

  private:
    static constexpr int kRowsOfSlot = kRows / 4;

    static __device__ int warp() { return int(thread_anew() / kWarp) - (4 * kWarpgroup / kWarp - kLoaders); }
    static __device__ int lane() { return thread_anew() % kWarp; }
    __device__ int live(int first, int count) const {
        return min(max(p_.s_q * p_.h_q - block_x_anew() * kRows - first, 0), count);
    }

    __device__ void copy_latent(int request, int slot) const {
        const Ring<kQuarterSlots> to = quarters_.after(slot);
        const int first = slot * kRowsOfSlot, rows = live(first, kRowsOfSlot);
        const uint32_t full = Shared::quarter_full(to.at());
        if (lane() == 0) mbarrier_expect_tx(full, rows * kLatent * 2);
        __syncwarp();
        if (lane() < rows)
            bulk_load(Shared::quarter(to.at()) + lane() * kLatent * 2,
                      query_row(p_, request, block_x_anew() * kRows + first + lane()).nope, kLatent * 2, full);
    }
    __device__ void copy_rope(int request) const {
        const uint32_t full = Shared::rope_full(rope_.at());
        const int rows = live(0, kRows);
        if (lane() == 0) mbarrier_expect_tx(full, rows * kRope * 2);
        __syncwarp();
        for (int i = lane(); i < rows; i += kWarp)
            bulk_load(Shared::rope(rope_.at()) + i * kRope * 2, query_row(p_, request, block_x_anew() * kRows + i).rope,
                      kRope * 2, full);
        __syncwarp();
    }

    const Params& p_;
    unsigned queries_ = 0;
    Ring<kQuarterSlots> quarters_;
    Ring<kRopeSlots> rope_;
};
