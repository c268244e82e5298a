// SPDX-License-Identifier: Apache-2.0
// The copying warp of the 64-row kernel where the ring has whole rows: fp8_ds_mla caches, dense, or, then by four warps,
// with listed keys.
#pragma once

#include "twowg_copy.cuh"

class RowCopier {
  public:
    __device__ explicit RowCopier(const Params& p) : p_(p) {}

    __device__ void run() {
        Tasks::begin();
        for (Step step; (step = Tasks::wait()) != Step::kEnd; Tasks::done()) {
            if (step != Step::kAttend) continue;
            if (threadIdx.x / kWarp % 4 == 0) prefetch_query(p_, Tasks::item().request);
            if constexpr (kGather)
                gather_item(Tasks::item());
            else
                copy_item(Tasks::item());
        }
    }

  private:
    __device__ static int lane() { return threadIdx.x % kWarp; }

    // Rows of a page follow each other: eight of them a lane, four tiles' pages looked up at once.
    __device__ void copy_item(const Item& item) {
        constexpr int kGroups = kTile / kGroup, kAhead = kWarp / kGroups;
        const int end = min(item.seq_len, item.tile_end * kTile);
        const int* table = p_.block_table + item.request * p_.table_stride;
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

    // Of each tile 16 listed keys for each of four warps, one a lane: a copy takes some 40 cycles to issue. The next
    // tile's entries are on their way meanwhile.
    __device__ void gather_item(const Item& item) {
        constexpr int kRowsOfWarp = kTile / kGatherers;
        const int end = min(item.seq_len, item.tile_end * kTile), warp = threadIdx.x / kWarp % 4;
        const int row = warp * kRowsOfWarp + lane();
        const int* list = p_.indices + item.request * p_.index_stride;
        const int* table = p_.block_table + divide(item.request, p_.sharers) * p_.table_stride;
        const auto entry_of = [&](int tile) {
            return lane() < kRowsOfWarp && tile * kTile + row < end ? list[tile * kTile + row] : -1;
        };
        int entry = entry_of(item.tile_begin);
        for (int tile = item.tile_begin; tile < item.tile_end; ++tile) {
            const uint8_t* from = row_of(table, entry);
            entry = entry_of(tile + 1);
            const uint32_t valid = __ballot_sync(~0u, from != nullptr);
            mbarrier_wait(Shared::quarter_empty(ring_.at()), ring_.phase() ^ 1);
            if (from == nullptr && lane() < kRowsOfWarp) clear_row(row);
            if (lane() == 0) Shared::valid(ring_.at())[warp] = valid;
            __syncwarp();
            open(__popc(valid));
            if (from != nullptr) load(row, from, 1);
            ring_.advance();
        }
    }

    // Null if there is no such key.
    __device__ const uint8_t* row_of(const int* table, int entry) const {
        if (entry < 0) return nullptr;
        if (p_.page_size == 0) return entry < p_.num_pages ? p_.cache + entry * int64_t{kRowBytes} : nullptr;
        int page = unsigned(entry) / unsigned(p_.page_size);  // too large for divide()
        const int row = entry - page * p_.page_size;
        if (p_.max_pages > 0) {
            if (page >= p_.max_pages) return nullptr;
            page = table[page];
        }
        if (unsigned(page) >= unsigned(p_.num_pages)) return nullptr;
        return p_.cache + page * p_.page_stride + row * kRowBytes;
    }

    // Zeros, for what an older tile has left is not to be multiplied, not even by 0.
    __device__ void clear_row(int row) const {
        uint8_t* to = shared_memory + ring_.at() * kQuarterBytes + row * kRowBytes;
#pragma unroll 1
        for (int i = 0; i < kRowBytes; i += 16) *reinterpret_cast<uint4*>(to + i) = {0, 0, 0, 0};
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
    Ring<kQuarterSlots> ring_;
};
