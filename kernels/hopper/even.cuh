// SPDX-License-Identifier: Apache-2.0
// The schedule of a small batch: every request gets as many programs, each an equal part. What takes Work many steps is
// one step then, and which request a program has is known before the lengths are.
#pragma once

#include "work.cuh"

constexpr int kFewTiles = 2;  // that a program may have where fewer would do with a better balance

// How many programs a request gets; 0 where it is not this way.
__device__ inline int programs_each(const Schedule& schedule) {
    return schedule.batch_invariant || schedule.b > kWarp ? 0 : divide(schedule.programs, schedule.b);
}

// What a warp knows of the batch.
class EvenBatch {
  public:
    // Of lane i, the length of request i; there need not be any.
    static __device__ int length_of_lane(const Schedule& schedule, const int* seq_lens) {
        const int lane = threadIdx.x % kWarp;
        return lane >= schedule.b ? 0 : seq_lens ? seq_lens[lane] : schedule.length;
    }

    __device__ EvenBatch(const Schedule& schedule, int each, int length)
        : schedule_(schedule), each_(each), length_(length) {
        const int tiles = tiles_in(length);
        const int most = __reduce_max_sync(~0u, tiles);
        total_ = __reduce_add_sync(~0u, tiles);
        part_ = max(divide(most + each - 1, each), 1);
        balanced_ = true;
        if (part_ > kFewTiles) {
            const int ideal =
                divide(total_ + schedule.b * schedule.fixed_tiles + schedule.programs - 1, schedule.programs);
            balanced_ = 16 * (part_ - max(ideal, schedule.min_share)) <= ideal;
        }
    }

    __device__ int tiles() const { return total_; }  // of all requests
    __device__ int part() const { return part_; }    // most tiles of a program
    __device__ bool balanced() const { return balanced_; }

    // The tiles of a part, if it is there and has any. What else there is to know takes longer: see complete().
    __device__ Item tiles_of(int request, int piece) const {
        Item item;
        item.request = request;
        item.piece = piece;
        const int length = __shfl_sync(~0u, length_, request % kWarp);
        item.seq_len = request < schedule_.b ? length : 0;
        item.tile_begin = piece * part_;
        item.tile_end = min(item.tile_begin + part_, tiles_in(item.seq_len));
        return item;
    }

    // The rest of an item; false if there is none.
    __device__ bool complete(Item& item) const {
        item.pieces = max(divide(tiles_in(item.seq_len) + part_ - 1, part_), 1);
        const bool split = item.pieces > 1;
        item.slot0 = split ? slot_of(schedule_, item.request, item.request * each_, 0) : -1;
        item.slot = split ? slot_of(schedule_, item.request, item.request * each_, item.piece) : -1;
        return item.request < schedule_.b && item.piece < item.pieces;
    }

  private:
    static __device__ int tiles_in(unsigned length) { return (length + kTile - 1) / kTile; }

    const Schedule& schedule_;
    int each_, length_, total_, part_;
    bool balanced_;
};
