// SPDX-License-Identifier: Apache-2.0
// How partial results of the 64-row kernel lie in memory: in the order in which multipliers hold them, so that a warp
// writes, and reads, 256 contiguous bytes at a time.
//
// Eight query rows are a group, of which each multiplier has 8 KiB: tiles of 8 rows x 8 columns, row by row. With the
// sides turned, tiles of 8 rows x 16 columns, even rows before odd ones.
//
// A request of few pieces is joined by the program of its first piece, whose last item that is: the others' partial
// results come through its ring like tiles, while the sum stays in registers. Others are merged: see merge.cuh.
#pragma once

#include "twowg_plan.cuh"

#ifndef FUSEDMLA_MOST_JOINED  // pieces
#define FUSEDMLA_MOST_JOINED 2
#endif
constexpr int kMostJoined = kGather || kScaled ? 1 : FUSEDMLA_MOST_JOINED;  // they have no registers for it

constexpr int kGroupRows = 8, kGroups = kRows / kGroupRows;
constexpr int kUnitsOfHalf = kGroupRows * kLatent / 2 / 4, kHalfBytes = kUnitsOfHalf * 16;
constexpr int kGroupsOfSlot = kQuarterBytes / kHalfBytes;  // of the ring; two of a span's four are a multiplier's
constexpr int kSlotsOfPartial = 2 * kGroups / kGroupsOfSlot;
static_assert(kMostJoined == 1 || (kParts == 4 && (kTurned || kGroupsOfSlot == 2)));

// Rows of a partial result, of all blocks.
__device__ inline int partial_rows(const Params& p) { return (p.s_q * p.h_q + kGroupRows - 1) & -kGroupRows; }

__device__ inline bool is_joined(const Params& p, const Item& item) {
    return !p.schedule.batch_invariant && item.pieces > 1 && item.pieces <= kMostJoined;
}
// Of which this program has to bring together the others' partial results.
__device__ inline bool joins(const Params& p, const Item& item) { return is_joined(p, item) && item.piece == 0; }
__device__ inline bool is_merged(const Params& p, const Item& item) { return item.slot >= 0 && !is_joined(p, item); }

__device__ inline unsigned* counter_of(const Params& p, const Item& item) {
    return p.arrivals + item.request * grid_x_anew() + block_x_anew();
}

// Row 0 of the request in the partial result of a piece, counted in rows of all partial results.
__device__ inline int64_t first_partial_row(const Params& p, const Item& item, int piece) {
    const int rows = partial_rows(p);
    return int64_t(item.slot0) * rows + rows_from_first(p, rows, piece);
}

// Of this block's part of a piece's partial result.
__device__ inline float4* partial_of(const Params& p, const Item& item, int piece) {
    return reinterpret_cast<float4*>(p.partial_out) + (first_partial_row(p, item, piece) + block_x_anew() * kRows) * (kLatent / 4);
}

// What MergeShare has to know.
struct Tiles {
    static constexpr int kColumns = kTurned ? 16 : 8, kUnitsOfRow = kColumns / 4, kUnits = kGroupRows * kUnitsOfRow;
    static __device__ int rows(const Params& p) { return partial_rows(p); }
    static __device__ int units(int rows_here) { return (rows_here + kGroupRows - 1) / kGroupRows * 2 * kUnitsOfHalf; }
    static __device__ int row_of(unsigned unit) {
        const unsigned place = unit % kUnits / kUnitsOfRow;
        return unit / (2 * kUnitsOfHalf) * kGroupRows + (kTurned ? place % 4 * 2 + place / 4 : place);
    }
    static __device__ bool begins_row(unsigned unit) { return column_of(unit) == 0; }
    static __device__ void store(uint16_t* row, unsigned unit, uint2 four) {
        *reinterpret_cast<uint2*>(row + column_of(unit)) = four;
    }

  private:
    static __device__ int column_of(unsigned unit) {
        return unit % (2 * kUnitsOfHalf) / kUnits * kColumns + unit % kUnitsOfRow * 4;
    }
};
