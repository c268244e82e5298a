// SPDX-License-Identifier: Apache-2.0
// The copying warp of the 64-row kernel: keeps the ring of tiles full.
#pragma once

#include "query.cuh"
#include "twowg_copy_partial.cuh"
#include "twowg_query.cuh"

// Where queries do not come through the ring: the first is needed before any tile, and would come after all that fit the
// ring. There cannot be another one before its item's tiles.
__device__ inline void wait_for_first_query() { mbarrier_wait(Shared::query_full(), 0); }

class Copier {
  public:
    __device__ explicit Copier(const Params& p) : p_(p) {}

    __device__ void run() {
        Tasks::for_items([&](const Item& item) { copy_item(item); });
    }

  private:
    // The spans of an item, one box a lane. Two CTAs of a cluster take turns at the quarters of a tile, and at the rope
    // blocks, and copy to both. They follow the same schedule, so each knows how many bytes arrive from either.
    __device__ void copy_item(const Item& item) {
        const int lane = threadIdx.x % kWarp;
        if (kQuerySlots > 0) let_query_come();
        const int boxes = kSpan / box_tokens();  // of a span
        const int ahead = kWarp / boxes;         // spans whose pages the warp looks up at once
        const int begin = item.tile_begin * kTile, end = min(item.seq_len, item.tile_end * kTile);
        if (kQuerySlots == 0 && items_++ == 0 && begin < end) wait_for_first_query();
        for (int first = begin; first < end; first += ahead * kSpan) {
            const int mine = first + lane / boxes * kSpan, token = mine + lane % boxes * box_tokens();
            const int entry = divide(token, p_.page_size), group = (token - entry * p_.page_size) / 8;
            const bool live = token < end;
            const int page = live ? p_.block_table[item.request * p_.table_stride + entry] : 0;
            for (int span = first; span < min(first + ahead * kSpan, end); span += kSpan)
                copy_span(end - span, live && mine == span, page, group);
        }
        copy_others(p_, item, quarters_);
    }

    // Hands the loaders the ring's next slots, once they have done with the last query.
    __device__ void let_query_come() {
        mbarrier_wait(Shared::query_full(), items_++ & 1 ^ 1);
        pass_query_slots(quarters_);
        if constexpr (kE4m3) {
            mbarrier_wait(Shared::rope_empty(rope_.at()), rope_.phase() ^ 1);
            rope_.advance();
        }
        warp_arrive(Shared::query_may_come());
    }

    // `mine`: this lane copies its box, which begins with a group of 8 tokens of a page.
    __device__ void copy_span(int tokens, bool mine, int page, int group) {
        const int box = threadIdx.x % kWarp % (kSpan / box_tokens()) * box_tokens();
        const int copied = (min(tokens, kSpan) + box_tokens() - 1) & -box_tokens();
        if (FUSEDMLA_PREFETCH && mine) {  // into L2 what has to wait longest for a slot
            if (is_mine(3)) tma_prefetch_5d(&p_.latent, 0, 0, 3 * kCacheBytes, group, page, policy());
            if (is_mine(rope_.at() + rope_.phase())) tma_prefetch_5d(&p_.rope, 0, 0, kRopeBlock, group, page, policy());
        }
#pragma unroll 1
        for (int quarter = 0; quarter < 4; ++quarter) {
            const uint32_t full = Shared::quarter_full(quarters_.at());
            open(Shared::quarter_empty(quarters_.at()), full, quarters_.phase(), copied * (kQuarterBytes / kSpan));
            if (mine && is_mine(quarter))
                load(Shared::quarter(quarters_.at()) + box * (kQuarterBytes / kSpan), &p_.latent, full, quarter * kCacheBytes, group, page);
            quarters_.advance();
        }
        const uint32_t full = Shared::rope_full(rope_.at());
        open(Shared::rope_empty(rope_.at()), full, rope_.phase(), copied * (kRopeBytes / kSpan));
        if (mine && is_mine(rope_.at() + rope_.phase())) load(Shared::rope(rope_.at()) + box * (kRopeBytes / kSpan), &p_.rope, full, kRopeBlock, group, page);
        rope_.advance();
    }

    // Of a copy: the largest power of two up to 64 that divides page_size. The tensor maps must agree.
    __device__ int box_tokens() const { return min(p_.page_size & -p_.page_size, kTile); }

    // Waits until a slot is empty and says how many bytes will fill it.
    __device__ void open(uint32_t empty, uint32_t full, uint32_t phase, int bytes) const {
        mbarrier_wait(empty, phase ^ 1);
        if (threadIdx.x % kWarp == 0) mbarrier_expect_tx(full, bytes);
        __syncwarp();
    }

    __device__ bool is_mine(uint32_t turn) const { return kCluster == 1 || cluster_cta_rank() == turn % 2; }

    __device__ void load(uint32_t to, const TensorMap* map, uint32_t full, int block, int group, int page) const {
        if constexpr (kCluster == 1)
            tma_load_5d(to, map, full, 0, 0, block, group, page, policy());
        else
            tma_load_5d_multicast(to, map, full, (1 << kCluster) - 1, 0, 0, block, group, page, policy());
    }

    // The cache is read once if all rows are here.
    __device__ static constexpr uint64_t policy() { return kEvictNormal; }  // evict-first costs read rate

    const Params& p_;
    unsigned items_ = 0;
    Ring<kQuarterSlots> quarters_;
    static constexpr int kRopeBlock = kTurned ? 0 : 8;  // of 128 bytes, where its map begins
    Ring<kRopeSlots> rope_;
};
