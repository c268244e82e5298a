// SPDX-License-Identifier: Apache-2.0
// The copying warp: schedules, hands the items to the computing warps, and brings their tiles.
// Included by a kernel after it has defined FORMAT, Element, N and Layout.
#pragma once

#include "even.cuh"
#include "query.cuh"
#include "swapab_staged.cuh"

namespace {

// Groups of a tile that a copy brings: as many as surely lie in one page. decode.py's maps are made for it.
__device__ inline int groups_of_copy(const Params& p) { return min(kTile, p.page_size & -p.page_size) / kGroup; }

// Groups of tokens that begin at row `row` of a page.
__device__ void copy_groups(const Params& p, const Shared& shared, int stage, int group, int page, int row,
                            uint64_t policy) {
    const uint32_t tile = shared.tile(stage), barrier = shared.full(stage);
    tma_load_5d(tile + group * Layout::kGroupBytes, &p.latent, barrier, 0, 0, 0, row / kGroup, page, policy);
    if constexpr (FORMAT != Format::kSixteenBit) {
        constexpr int kRopeRow = FORMAT == Format::kFp8 ? 64 : 128;
        tma_load_3d(tile + Layout::kRopeOffset + group * kGroup * kRopeRow, &p.rope, barrier, 0, row, page, policy);
    }
    if constexpr (FORMAT == Format::kFp8DsMla)
        tma_load_3d(tile + Layout::kScalesOffset + group * kGroup * 16, &p.scales, barrier, 0, row, page, policy);
}

__device__ void hand_over(const Shared& shared, Ring<Layout::kItems>& ring, const Item& item, Step step) {
    mbarrier_wait(shared.item_empty(ring.stage()), ring.phase() ^ 1);
    if (threadIdx.x % kWarp == 0) {
        *shared.item(ring.stage()) = {item, step, ring.count};
        mbarrier_arrive(shared.item_full(ring.stage()));
    }
    ring.advance();
}

// The tiles of an item into the next stages of the ring, a group of tokens by each lane.
__device__ void copy_tiles(const Params& p, const Shared& shared, Ring<Layout::kStages>& ring, const Item& item,
                           uint64_t policy) {
    constexpr int kGroups = kTile / kGroup, kAhead = kWarp / kGroups;  // tiles whose pages are looked up at once
    const int lane = threadIdx.x % kWarp, group = lane % kGroups;
    const int together = groups_of_copy(p), rows = together * kGroup;
    const int* table = p.block_table + item.request * p.table_stride;
    for (int first = item.tile_begin; first < item.tile_end; first += kAhead) {
        const int mine = first + lane / kGroups, token = mine * kTile + group * kGroup;
        const bool live = mine < item.tile_end && token < item.seq_len && group % together == 0;
        const int entry = divide(token, p.page_size), row = token - entry * p.page_size;
        const int page = live ? table[entry] : 0;
        for (int tile = first; tile < min(first + kAhead, item.tile_end); ++tile) {
            mbarrier_wait(shared.empty(ring.stage()), ring.phase() ^ 1);
            const int copied = (min(item.seq_len - tile * kTile, kTile) + rows - 1) & -rows;
            if (lane == 0) mbarrier_expect_tx(shared.full(ring.stage()), copied * Layout::kRowBytes);
            __syncwarp();
            if (live && mine == tile) copy_groups(p, shared, ring.stage(), group, page, row, policy);
            ring.advance();
        }
    }
}

// Evict-first spares what else L2 holds, but costs 4 % of the read rate of long reads (docs/performance.md).
__device__ inline uint64_t policy_of(int tiles) {
    constexpr int kLongRead = (256 << 20) / Layout::kStageBytes;
    return tiles < kLongRead ? kEvictFirst : kEvictNormal;
}

// Lines of the block table that may be needed, before the lengths tell which of them are: for parts of one to 32 tiles.
__device__ inline void prefetch_pages(const Params& p, int each) {
    if (threadIdx.x % kWarp == 0) {
        tma_prefetch(&p.latent);
        if (FORMAT != Format::kSixteenBit) tma_prefetch(&p.rope);
        if (FORMAT == Format::kFp8DsMla) tma_prefetch(&p.scales);
    }
    const int request = divide(blockIdx.y, each), piece = blockIdx.y - request * each;
    const int64_t entry = divide(piece * (threadIdx.x % kWarp + 1) * kTile, p.page_size);
    if (request < p.schedule.b && entry < p.table_stride)
        prefetch_line(p.block_table + request * p.table_stride + entry);
}

// A part of a small batch; false if that would be out of balance.
__device__ bool produce_even(const Params& p, const Shared& shared, Ring<Layout::kItems>& items,
                             Ring<Layout::kStages>& stages) {
    const int each = programs_each(p.schedule);
    if (each == 0) return false;
    prefetch_pages(p, each);
    Item item;
    int tiles;
    const Even even = even_item(p.schedule, p.seq_lens, each, blockIdx.y, item, tiles);
    if (even == Even::kNo) return false;
    named_barrier_sync(kReady, kConsumers + kWarp);
    if (even == Even::kItem) {
        hand_over(shared, items, item, Step::kAttend);
        copy_tiles(p, shared, stages, item, policy_of(tiles));
        if (item.slot >= 0) hand_over(shared, items, item, Step::kMerge);
    }
    hand_over(shared, items, item, Step::kEnd);
    return true;
}

__device__ void produce(const Params& p, const Shared& shared) {
    Ring<Layout::kItems> items;
    Ring<Layout::kStages> stages;
    if (produce_even(p, shared, items, stages)) return;
    Work work(p.schedule, p.seq_lens, blockIdx.y);
    named_barrier_sync(kReady, kConsumers + kWarp);
    const uint64_t policy = policy_of(work.total());
    Item item;
    bool any_split = false, is_first = true;
    for (int pass = 0; pass < 2; ++pass) {  // attend, then merge what was split
        while (work.next(item)) {
            any_split |= item.slot >= 0;
            if (pass == 0) {
                hand_over(shared, items, item, Step::kAttend);
                if (!is_first) prefetch_query<N, kWarp>(p, item.request, first_row_of_block(), threadIdx.x % kWarp);
                is_first = false;
                copy_tiles(p, shared, stages, item, policy);
            } else if (item.slot >= 0) {
                hand_over(shared, items, item, Step::kMerge);
            }
        }
        if (!any_split) break;
        work.rewind();
    }
    hand_over(shared, items, item, Step::kEnd);
}

}  // namespace
