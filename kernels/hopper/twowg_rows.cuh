// SPDX-License-Identifier: Apache-2.0
// The copying warp of the 64-row kernel for fp8_ds_mla caches, of which the ring has whole rows.
#pragma once

#include "twowg_copy.cuh"

class RowCopier {
  public:
    __device__ explicit RowCopier(const Params& p) : p_(p) {}

    __device__ void run() {
        Tasks::for_items([&](const Item& item) { copy_item(item); });
    }

  private:
    __device__ static int lane() { return threadIdx.x % kWarp; }

    // Rows of a page follow each other: eight of them a lane, four tiles' pages looked up at once.
    __device__ void copy_item(const Item& item) {
        constexpr int kGroups = kTile / kGroup, kAhead = kWarp / kGroups;
        const int end = min(item.seq_len, item.tile_end * kTile);
        const int* table = p_.block_table + item.request * p_.table_stride;
        if (items_++ == 0 && item.tile_begin * kTile < end) wait_for_first_query();
        for (int first = item.tile_begin; first < item.tile_end; first += kAhead) {
            const int mine = first + lane() / kGroups, token = mine * kTile + lane() % kGroups * kGroup;
            const int entry = divide(token, p_.page_size), rows = min(end - token, kGroup);
            const uint8_t* from = p_.cache;
            if (rows > 0) from += table[entry] * p_.page_stride + (token - entry * p_.page_size) * kRowBytes;
            for (int tile = first; tile < min(first + kAhead, item.tile_end); ++tile) {
                open(min(end - tile * kTile, kTile));
                if (mine == tile && rows > 0) load(lane() % kGroups * kGroup, from, rows);
                ring_.advance();
            }
        }
    }

    // Waits until the next slot is empty and says how many rows will fill it.
    __device__ void open(int rows) const {
        mbarrier_wait(Shared::quarter_empty(ring_.at()), ring_.phase() ^ 1);
        if (lane() == 0) mbarrier_expect_tx(Shared::quarter_full(ring_.at()), rows * kRowBytes);
        __syncwarp();
    }

    __device__ void load(int row, const uint8_t* from, int rows) const {
        bulk_load(Shared::quarter(ring_.at()) + row * kRowBytes, from, rows * kRowBytes, Shared::quarter_full(ring_.at()));
    }

    const Params& p_;
    unsigned items_ = 0;
    Ring<kQuarterSlots> ring_;
};
