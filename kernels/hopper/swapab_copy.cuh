// SPDX-License-Identifier: Apache-2.0
// The copying warp: schedules, hands the items to the computing warps, and brings their tiles.
// Included by a kernel after it has defined FORMAT, Element, N and Layout.
#pragma once

#include "swapab_staged.cuh"

namespace {

// The group of tokens that begins at row `row` of a page.
__device__ void copy_group(const Params& p, const Shared& shared, int stage, int group, int page, int row, uint64_t policy) {
    const uint32_t tile = shared.tile(stage), barrier = shared.full(stage);
    tma_load_4d(tile + group * Layout::kGroupBytes, &p.latent, barrier, 0, row, 0, page, policy);
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
    const int* table = p.block_table + item.request * p.table_stride;
    for (int first = item.tile_begin; first < item.tile_end; first += kAhead) {
        const int mine = first + lane / kGroups, token = mine * kTile + group * kGroup;
        const bool live = mine < item.tile_end && token < item.seq_len;
        const int entry = divide(token, p.page_size), row = token - entry * p.page_size;
        const int page = live ? table[entry] : 0;
        for (int tile = first; tile < min(first + kAhead, item.tile_end); ++tile) {
            mbarrier_wait(shared.empty(ring.stage()), ring.phase() ^ 1);
            const int copied = (min(item.seq_len - tile * kTile, kTile) + kGroup - 1) / kGroup * kGroup;
            if (lane == 0) mbarrier_expect_tx(shared.full(ring.stage()), copied * Layout::kRowBytes);
            __syncwarp();
            if (live && mine == tile) copy_group(p, shared, ring.stage(), group, page, row, policy);
            ring.advance();
        }
    }
}

__device__ void produce(const Params& p, const Shared& shared) {
    Work work(p.schedule, p.seq_lens, blockIdx.y);
    // Evict-first spares what else L2 holds, but costs 4 % of the read rate of long reads (docs/performance.md).
    constexpr int kLongRead = (256 << 20) / Layout::kStageBytes;
    const uint64_t policy = work.total() < kLongRead ? kEvictFirst : kEvictNormal;
    Item item;
    Ring<Layout::kItems> items;
    Ring<Layout::kStages> stages;
    bool any_split = false;
    for (int pass = 0; pass < 2; ++pass) {  // attend, then merge what was split
        while (work.next(item)) {
            any_split |= item.slot >= 0;
            if (pass == 0) {
                hand_over(shared, items, item, Step::kAttend);
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
