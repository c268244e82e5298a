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

__device__ void hand_over(const Shared& shared, Ring<Layout::kItems>& ring, const Item& item, Step step) {
    mbarrier_wait(shared.item_empty(ring.stage()), ring.phase() ^ 1);
    if (threadIdx.x % kWarp == 0) {
        *shared.item(ring.stage()) = {item, step, ring.count};
        mbarrier_arrive(shared.item_full(ring.stage()));
    }
    ring.advance();
}

// Where a lane's group of tokens lies.
struct Group {
    int page, row;
};
__device__ inline Group look_up(const Params& p, const int* table, int token, bool live) {
    const int entry = divide(token, p.page_size);
    return {live ? table[entry] : 0, token - entry * p.page_size};
}

// A copy: groups of a page from one on.
__device__ void copy_groups(const Params& p, const Shared& shared, int stage, int group, const Group& at,
                            uint64_t policy) {
    const uint32_t tile = shared.tile(stage), barrier = shared.full(stage);
    tma_load_5d(tile + group * Layout::kGroupBytes, &p.latent, barrier, 0, 0, 0, at.row / kGroup, at.page, policy);
    if constexpr (FORMAT != Format::kSixteenBit) {
        constexpr int kRopeRow = FORMAT == Format::kFp8 ? 64 : 128;
        tma_load_3d(tile + Layout::kRopeOffset + group * kGroup * kRopeRow, &p.rope, barrier, 0, at.row, at.page, policy);
    }
    if constexpr (FORMAT == Format::kFp8DsMla)
        tma_load_3d(tile + Layout::kScalesOffset + group * kGroup * 16, &p.scales, barrier, 0, at.row, at.page, policy);
}

// The groups of an item's first tiles. They are looked up together with the lengths, which have yet to tell how many tiles
// a program gets: for each number that is likely.
class FirstGroups {
  public:
    FirstGroups() = default;
    __device__ FirstGroups(const Params& p, int request, int piece) {
        const int most = request < p.schedule.b ? p.max_pages * p.page_size : 0;
#pragma unroll
        for (int i = 0; i < kLikely; ++i) {
            const int token = piece * (i + 1) * kTile + int(threadIdx.x % kWarp) * kGroup;
            groups_[i] = look_up(p, p.block_table + request * p.table_stride, token, token < most);
        }
    }
    // Of a program that gets so many tiles.
    __device__ void choose(int tiles) {
        known_ = tiles <= kLikely;
#pragma unroll
        for (int i = 1; i < kLikely; ++i)
            if (tiles == i + 1) groups_[0] = groups_[i];
    }
    __device__ bool known() const { return known_; }
    __device__ const Group& group() const { return groups_[0]; }

  private:
    static constexpr int kLikely = 4;
    bool known_ = false;
    Group groups_[kLikely];
};

// The tiles of an item into the next stages of the ring, a group of tokens by each lane; begun() is called when a tile's
// copies have been asked for.
template <typename Begun>
__device__ void copy_tiles(const Params& p, const Shared& shared, Ring<Layout::kStages>& ring, const Item& item,
                           uint64_t policy, const FirstGroups& known, const Begun& begun) {
    constexpr int kGroups = kTile / kGroup, kAhead = kWarp / kGroups;  // tiles whose pages are looked up at once
    const int lane = threadIdx.x % kWarp, group = lane % kGroups;
    const int together = groups_of_copy(p), rows = together * kGroup;
    const int* table = p.block_table + item.request * p.table_stride;
    for (int first = item.tile_begin; first < item.tile_end; first += kAhead) {
        const int mine = first + lane / kGroups, token = mine * kTile + group * kGroup;
        const bool live = mine < item.tile_end && token < item.seq_len && group % together == 0;
        const Group at = first == item.tile_begin && known.known() ? known.group() : look_up(p, table, token, live);
        for (int tile = first; tile < min(first + kAhead, item.tile_end); ++tile) {
            mbarrier_wait(shared.empty(ring.stage()), ring.phase() ^ 1);
            const int copied = (min(item.seq_len - tile * kTile, kTile) + rows - 1) & -rows;
            if (lane == 0) mbarrier_expect_tx(shared.full(ring.stage()), copied * Layout::kRowBytes);
            __syncwarp();
            if (live && mine == tile) copy_groups(p, shared, ring.stage(), group, at, policy);
            ring.advance();
            begun();
        }
    }
}

// Evict-first spares what else L2 holds, but costs 4 % of the read rate of long reads (docs/performance.md).
__device__ inline uint64_t policy_of(int tiles) {
    constexpr int kLongRead = (256 << 20) / Layout::kStageBytes;
    return tiles < kLongRead ? kEvictFirst : kEvictNormal;
}

// What may be needed before the lengths tell what is: descriptors, and lines of the block table for parts of up to 32
// tiles.
__device__ inline void prefetch_maps_and_pages(const Params& p, int request, int piece) {
    if (threadIdx.x % kWarp == 0) {
        tma_prefetch(&p.latent);
        if (FORMAT != Format::kSixteenBit) tma_prefetch(&p.rope);
        if (FORMAT == Format::kFp8DsMla) tma_prefetch(&p.scales);
    }
    const int entry = divide(piece * (threadIdx.x % kWarp + 1) * kTile, p.page_size);
    if (request < p.schedule.b && entry < p.max_pages) prefetch_line(p.block_table + request * p.table_stride + entry);
}

// Returns when the barriers are there.
__device__ inline void wait_for_barriers() { named_barrier_sync(kReady, kConsumers + kWarp); }

// A part of a small batch of `each` programs a request, with each lane's request's length; false if that would be out of
// balance.
__device__ bool produce_even(const Params& p, const Shared& shared, int length, int each, Ring<Layout::kItems>& items,
                             Ring<Layout::kStages>& stages) {
    const int request = divide(blockIdx.y, each), piece = blockIdx.y - request * each;
    FirstGroups groups(p, request, piece);
    prefetch_maps_and_pages(p, request, piece);
    wait_for_barriers();
    const EvenBatch batch(p.schedule, each, length);
    if (!batch.balanced()) return false;
    groups.choose(batch.part());
    Item item = batch.tiles_of(request, piece);
    bool told = false, is_item = false;
    const auto tell = [&] {  // when the first tile is on its way: it takes longest
        if (told) return;
        told = true;
        asm volatile("" : "+r"(item.seq_len));  // not before
        is_item = batch.complete(item);
        if (is_item) hand_over(shared, items, item, Step::kAttend);
    };
    copy_tiles(p, shared, stages, item, policy_of(batch.tiles()), groups, tell);
    tell();
    if (is_item && item.slot >= 0) hand_over(shared, items, item, Step::kMerge);
    hand_over(shared, items, item, Step::kEnd);
    return true;
}

__device__ void produce(const Params& p, const Shared& shared) {
    Ring<Layout::kItems> items;
    Ring<Layout::kStages> stages;
    const int length = EvenBatch::length_of_lane(p.schedule, p.seq_lens), each = programs_each(p.schedule);
    if (each == 0)
        wait_for_barriers();
    else if (produce_even(p, shared, length, each, items, stages))
        return;
    Work work(p.schedule, p.seq_lens, blockIdx.y);
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
                copy_tiles(p, shared, stages, item, policy, {}, [] {});
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
