// SPDX-License-Identifier: Apache-2.0
// The copying warps where the keys of a request are listed: four, each with 16 rows of a tile.
// Included by a kernel after it has defined FORMAT, Element, N and Layout.
#pragma once

#include "listed.cuh"
#include "swapab_listed.cuh"
#include "swapab_store.cuh"

namespace {

class Gatherer {
  public:
    // Asks for the first entries that a CTA has if its request's list is full. That takes few instructions, while the
    // first ones of a kernel take long, and nothing can begin without.
    __device__ Gatherer(const Params& p, const Shared& shared, int request)
        : p_(p), shared_(shared), likely_request_(request), likely_begin_(cluster_cta_rank() * p.schedule.min_share) {
#pragma unroll
        for (int i = 0; i < kLikely; ++i)
            likely_[i] = entries_of(request, likely_begin_ + i, request < p.schedule.b ? p.schedule.length : 0);
    }

    // Entries are read three tiles ahead. A tile's pages are looked up as soon as the one before is on its way.
    __device__ void gather_item(const Item& item) {
        const int begin = item.tile_begin;
        const bool likely = item.request == likely_request_ && begin == likely_begin_ && item.seq_len == p_.schedule.length;
        const ListedRows<Layout::kRowBytes> rows(p_, item.request);
        if (!ready_ && warp() == 0) rows.prefetch_table<kWarp>(lane());
        Entries entries = likely ? likely_[0] : entries_of(item, begin);
        Entries later = likely ? likely_[1] : entries_of(item, begin + 1);
        Entries latest = entries_of(item, begin + 2);
        if (!ready_) named_barrier_sync(kReady, kThreads);  // barriers are
        ready_ = true;
#pragma unroll 1
        for (int tile = begin; tile < item.tile_end; ++tile) {
            copy_rows(source_of(rows, entries));
            entries = later;
            later = latest;
            latest = entries_of(item, tile + 3);
        }
    }

  private:
    static constexpr int kRows = Layout::kSlotRows;

    struct Entries {  // of a tile: a lane's two
        int low, high;
    };
    struct Source {
        const uint8_t* row;  // for each of the first 16 lanes; null if there is no such key
        bool any;            // whether the tile may have any
    };

    __device__ static int lane() { return threadIdx.x % kWarp; }
    __device__ static int warp() { return threadIdx.x / kWarp % 4; }

    // Of the first `length` entries.
    __device__ Entries entries_of(int request, int tile, int length) const {
        const int at = tile * kTile + lane();
        const int* from = p_.indices + request * p_.index_stride + at;
        return {at < length ? from[0] : -1, at + kWarp < length ? from[kWarp] : -1};
    }
    __device__ Entries entries_of(const Item& item, int tile) const {
        return entries_of(item.request, tile, min(item.seq_len, item.tile_end * kTile));
    }

    __device__ Source source_of(const ListedRows<Layout::kRowBytes>& rows, const Entries& entries) const {
        const bool any = __any_sync(~0u, entries.low >= 0 || entries.high >= 0);
        const int from = warp() % 2 * kRows + lane() % kRows;
        const int low = __shfl_sync(~0u, entries.low, from), high = __shfl_sync(~0u, entries.high, from);
        const int entry = warp() < 2 ? low : high;
        return {lane() < kRows ? rows.row(entry) : nullptr, any};
    }

    // A row by each of 16 lanes; an instruction takes some 40 cycles to issue, lane after lane.
    __device__ void copy_rows(const Source& source) {
        const unsigned slot = ring_.slot(warp());
        const uint32_t valid = __ballot_sync(~0u, source.row != nullptr), full = shared_.full(slot);
        mbarrier_wait(shared_.empty(slot), ring_.phase(warp()) ^ 1);
        if (source.any && source.row == nullptr && lane() < kRows) clear_row(slot);
        if (lane() == 0) *shared_.valid(slot) = valid;
        __syncwarp();
        if (lane() == 0) mbarrier_expect_tx(full, __popc(valid) * Layout::kRowBytes);
        __syncwarp();
        if (source.row != nullptr)
            bulk_load(shared_.slot(slot) + lane() * Layout::kPitch, source.row, Layout::kRowBytes, full, policy_);
        ring_.advance();
    }

    // Zeros, for what an older tile has left is not to be multiplied, not even by 0.
    __device__ void clear_row(unsigned slot) const {
        uint8_t* to = shared_.base + slot * Layout::kSlotBytes + lane() * Layout::kPitch;
#pragma unroll 1
        for (int i = 0; i < Layout::kRowBytes; i += 16) *reinterpret_cast<uint4*>(to + i) = {0, 0, 0, 0};
        fence_proxy_async();  // a later tile's copy must not come before them
    }

    const Params& p_;
    const Shared& shared_;
    static constexpr int kLikely = 2;  // tiles
    const int likely_request_, likely_begin_;
    Entries likely_[kLikely];
    TileRing ring_;
    bool ready_ = false;
    // `fixed_tiles` has no other use here: not 0 where no other list names the rows, and L2 may keep what else it
    // holds.
    const uint64_t policy_ = p_.schedule.fixed_tiles ? kEvictFirst : kEvictNormal;
};

}  // namespace
