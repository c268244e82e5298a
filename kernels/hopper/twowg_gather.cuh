// SPDX-License-Identifier: Apache-2.0
// The copying warps of the 64-row kernel where the keys of a request are listed: four, each with 16 rows of a tile.
#pragma once

#include "listed.cuh"
#include "twowg_copy.cuh"
#include "twowg_query.cuh"

class Gatherer {
  public:
    __device__ explicit Gatherer(const Params& p) : p_(p), loader_(p) {}

    __device__ void run() {
        Tasks::for_items([&](const Item& item) { gather_item(item); });
    }

  private:
    static constexpr int kRowsOfWarp = kTile / kCopiers;

    __device__ static int lane() { return thread_anew() % kWarp; }
    __device__ static int warp() { return thread_anew() / kWarp % 4; }

    // A row for each of the first 16 lanes. The next tile's entries are on their way meanwhile.
    __device__ void gather_item(const Item& item) {
        if constexpr (kMultipliersLoad) {
            if (warp() == 0) prefetch_query<kRows, kWarp>(p_, item.request, block_x_anew() * kRows, lane());
        } else {
            const Ring<kQuarterSlots> slots = quarters_;
            pass_query_slots(quarters_);
            loader_.load(item.request, slots);
        }
        int entry = entry_of(item, item.tile_begin);
#pragma unroll 1
        for (int tile = item.tile_begin; tile < item.tile_end; ++tile) {
            const uint8_t* from = ListedRows<kRowBytes>(p_, item.request).row(entry);
            entry = entry_of(item, tile + 1);
            if constexpr (kScaled)
                copy_rows(from);
            else
                copy_pieces(from);
        }
    }

    __device__ int entry_of(const Item& item, int tile) const {
        const int at = tile * kTile + warp() * kRowsOfWarp + lane();
        if (lane() >= kRowsOfWarp || at >= min(item.seq_len, item.tile_end * kTile)) return -1;
        return p_.indices[item.request * p_.index_stride + at];
    }

    // ---- fp8_ds_mla: whole rows, each by one instruction, some 40 cycles to issue ----

    __device__ void copy_rows(const uint8_t* from) {
        const uint32_t valid = __ballot_sync(~0u, from != nullptr), full = Shared::quarter_full(quarters_.at());
        const int row = warp() * kRowsOfWarp + lane();
        mbarrier_wait(Shared::quarter_empty(quarters_.at()), quarters_.phase() ^ 1);
        if (from == nullptr && lane() < kRowsOfWarp) clear_row(row);
        if (lane() == 0) Shared::valid(quarters_.turn())[warp()] = valid;
        __syncwarp();
        if (lane() == 0) mbarrier_expect_tx(full, __popc(valid) * kRowBytes);
        __syncwarp();
        if (from != nullptr) bulk_load(Shared::quarter(quarters_.at()) + row * kRowBytes, from, kRowBytes, full);
        quarters_.advance();
    }

    // Zeros, for what an older tile has left is not to be multiplied, not even by 0.
    __device__ void clear_row(int row) const {
        uint8_t* to = shared_memory + quarters_.at() * kQuarterBytes + row * kRowBytes;
#pragma unroll 1
        for (int i = 0; i < kRowBytes; i += 16) *reinterpret_cast<uint4*>(to + i) = {0, 0, 0, 0};
        fence_proxy_async();  // a later tile's copy must not come before them
    }

    // ---- 16-bit rows: by 16 bytes, into wgmma's swizzle; zeros for what is not there ----

    static constexpr int kRowsTogether = kWarp / 8, kRounds = kRowsOfWarp / kRowsTogether;  // eight lanes copy 128 bytes

    // What this lane copies of each of its rows, and whether they are there.
    struct Pieces {
        const uint8_t* from[kRounds];
        bool live[kRounds];
    };

    __device__ void copy_pieces(const uint8_t* from) {
        const uint32_t valid = __ballot_sync(~0u, from != nullptr);
        const uint64_t address = reinterpret_cast<uint64_t>(from != nullptr ? from : p_.cache);
        Pieces pieces;
#pragma unroll
        for (int i = 0; i < kRounds; ++i) {
            const int row = i * kRowsTogether + lane() / 8;
            pieces.from[i] = reinterpret_cast<const uint8_t*>(__shfl_sync(~0u, address, row)) + lane() % 8 * 16;
            pieces.live[i] = valid >> row & 1;
        }
#pragma unroll
        for (int quarter = 0; quarter < 4; ++quarter) {
            mbarrier_wait(Shared::quarter_empty(quarters_.at()), quarters_.phase() ^ 1);
            copy_blocks<2>(pieces, quarter * 256, Shared::quarter(quarters_.at()));
            arrive_with_copies(Shared::quarter_full(quarters_.at()));
            quarters_.advance();
        }
        mbarrier_wait(Shared::rope_empty(rope_.at()), rope_.phase() ^ 1);
        copy_blocks<1>(pieces, kLatent * 2, Shared::rope(rope_.at()));
        arrive_with_copies(Shared::rope_full(rope_.at()));
        if (lane() == 0) {
            Shared::valid(rope_.turn())[warp()] = valid;
            mbarrier_arrive(Shared::rope_full(rope_.at()));
        }
        rope_.advance();
    }

    // Of this warp's rows BLOCKS x 128 bytes from `skipped` on.
    template <int BLOCKS>
    __device__ static void copy_blocks(const Pieces& pieces, int skipped, uint32_t to) {
        constexpr int kBytes = BLOCKS * kAtomBytes;  // of eight rows
        to += warp() * kRowsOfWarp / 8 * kBytes;
#pragma unroll
        for (int i = 0; i < kRounds; ++i) {
            const unsigned row = i * kRowsTogether % 8 + lane() / 8, chunk = lane() % 8 ^ row;
#pragma unroll
            for (int block = 0; block < BLOCKS; ++block)
                copy_16_async(to + row * 128 + chunk * 16 + i * kRowsTogether / 8 * kBytes + block * kAtomBytes,
                              pieces.from[i] + skipped + block * 128, pieces.live[i]);
        }
    }

    const Params& p_;
    QueryLoader loader_;
    Ring<kQuarterSlots> quarters_;
    Ring<kRopeSlots> rope_;
};
