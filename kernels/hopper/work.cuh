// SPDX-License-Identifier: Apache-2.0
// The tile scheduler inside a kernel: which KV tiles of which requests does program x of a persistent grid own?
//
// The same closed form as schedule.py: requests laid end to end on a line, each as `fixed_tiles` plus its tiles. By
// default the line is cut at equal distances; in batch-invariant mode a request is cut into chunks of its own, dealt out
// by where they begin. Unlike schedule.py, a program may get less than a fixed cost and the fewest tiles together, and
// requests of equal length are cut evenly (even_out). One warp walks the batch, 32 requests a step, and hands its items
// to the others.
#pragma once

#include "params.cuh"

struct Item {
    int request;
    int seq_len;
    int tile_begin, tile_end;
    int piece, pieces;  // this is part `piece` of `pieces` of its request
    int slot, slot0;    // where its partial result goes, and where that of piece 0 does; -1 if the request is whole
};

// Slot of a piece: batch-invariant mode gives each request its own slots. By default a program writes at most two
// partial results, the end of one request and the beginning of another, so two slots a program are enough.
__device__ inline int slot_of(const Schedule& schedule, int request, int first_program, int piece) {
    if (schedule.batch_invariant) return request * schedule.max_splits + piece;
    return 2 * (first_program + piece) - (piece > 0);
}

class Work {
  public:
    __device__ Work(const Schedule& schedule, const int* seq_lens, int program)
        : schedule_(schedule), seq_lens_(seq_lens), program_(program), fixed_(schedule.fixed_tiles), cost_(0) {
        rewind();
        int total = __shfl_sync(~0u, lane_end_, kWarp - 1);
        const int first_len = __shfl_sync(~0u, lane_len_, 0);
        bool same = int(threadIdx.x % kWarp) >= schedule_.b || lane_len_ == first_len;
        for (int base = kWarp; base < schedule_.b; base += 4 * kWarp) {
            int lens[4], sum = 0;  // in flight together
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int request = base + i * kWarp + int(threadIdx.x % kWarp);
                lens[i] = request < schedule_.b ? length_of(request) : -1;
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                sum += lens[i] >= 0 ? shape(lens[i]).cost : 0;
                same &= lens[i] < 0 || lens[i] == first_len;
            }
            total += __reduce_add_sync(~0u, sum);
        }
        share_ = max((total + schedule_.programs - 1) / schedule_.programs, schedule_.min_share);
        if (__all_sync(~0u, same)) even_out(shape(first_len));
    }

    // For a copy of another lane's: what each lane knows for itself.
    __device__ void refresh() {
        const int taken = taken_, pieces_taken = pieces_taken_;
        look_at(base_);
        taken_ = taken;
        pieces_taken_ = pieces_taken;
    }

    // Tiles of the batch, with the fixed costs.
    __device__ int total() const { return share_ * schedule_.programs; }

    __device__ void rewind() {
        line_ = 0;
        look_at(0);
    }

    // The next item of this program, in order; false if there is none. All lanes get the same answer.
    __device__ bool next(Item& item) {
        const int lane = threadIdx.x % kWarp;
        while (base_ < schedule_.b && line_ < (program_ + 1) * share_) {
            const Shape s = shape(lane_len_);
            const int start = line_ + lane_end_ - (cost_ ? cost_ : s.cost);
            const Pieces mine = pieces_of(start, s);
            const bool inside = base_ + lane < schedule_.b;
            const uint32_t found = __ballot_sync(~0u, inside && lane >= taken_ && mine.begin < mine.end);
            if (found == 0) {
                line_ += __shfl_sync(~0u, lane_end_, kWarp - 1);
                look_at(base_ + kWarp);
                continue;
            }
            int tile_begin = max(program_ * share_ - (start + fixed_), 0);
            int tile_end = min((program_ + 1) * share_ - (start + fixed_), s.tiles);
            const int piece = mine.begin + pieces_taken_;
            if (schedule_.batch_invariant) {
                tile_begin = piece * s.chunk;
                tile_end = min(tile_begin + s.chunk, s.tiles);
            }
            const int source = __ffs(found) - 1;
            item.request = base_ + source;
            item.seq_len = __shfl_sync(~0u, lane_len_, source);
            item.tile_begin = __shfl_sync(~0u, tile_begin, source);
            item.tile_end = __shfl_sync(~0u, tile_end, source);
            item.piece = __shfl_sync(~0u, piece, source);
            item.pieces = __shfl_sync(~0u, mine.of, source);
            const bool split = item.pieces > 1;
            item.slot0 = split ? slot_of(schedule_, item.request, program_ - item.piece, 0) : -1;
            item.slot = split ? slot_of(schedule_, item.request, program_ - item.piece, item.piece) : -1;
            const bool more = __shfl_sync(~0u, piece + 1 < mine.end, source);
            taken_ = more ? taken_ : source + 1;
            pieces_taken_ = more ? pieces_taken_ + 1 : 0;
            return true;
        }
        return false;
    }

  private:
    __device__ int length_of(int request) const { return seq_lens_ ? seq_lens_[request] : schedule_.length; }

    struct Shape {
        int tiles, chunk, pieces, cost;
    };
    struct Pieces {  // `begin` to `end` of `of` are this program's
        int begin, end, of;
    };

    __device__ Shape shape(int seq_len) const {
        Shape s;
        s.tiles = (seq_len + kTile - 1) / kTile;
        if (schedule_.batch_invariant) {
            s.chunk = max(divide(s.tiles + schedule_.max_splits - 1, schedule_.max_splits), schedule_.min_tiles);
            s.pieces = max(divide(s.tiles + s.chunk - 1, s.chunk), 1);
            s.cost = s.pieces * (s.chunk + schedule_.fixed_tiles);
        } else {
            s.chunk = s.pieces = 0;
            s.cost = s.tiles + schedule_.fixed_tiles;
        }
        return s;
    }

    __device__ Pieces pieces_of(int start, const Shape& s) const {
        if (schedule_.batch_invariant) {
            const int size = s.chunk + schedule_.fixed_tiles;
            const int from = program_ * share_ - start, to = from + share_;
            return {min(divide(max(from, 0) + size - 1, size), s.pieces),
                    min(divide(max(to, 0) + size - 1, size), s.pieces), s.pieces};
        }
        // From the program of the first tile to that of the last; a cut before the first tile moves to it.
        const int line = start + fixed_;
        const int first = divide(s.tiles ? line : max(line - 1, start), share_);
        const int last = s.tiles ? divide(line + s.tiles - 1, share_) : first;
        const int piece = program_ - first;
        return {piece, piece + (first <= program_ && program_ <= last), last - first + 1};
    }

    // Requests of equal length: cut each into the same number of equal pieces, or not at all, if that costs little
    // balance. A program then has pieces of its own requests only: each start, end and merge of one costs time.
    __device__ void even_out(const Shape& s) {
        int share = (share_ + s.cost - 1) / s.cost * s.cost;
        const int pieces = schedule_.programs / schedule_.b;
        if (pieces > 1 && !schedule_.batch_invariant) share = max((s.tiles + pieces - 1) / pieces, 1);
        if (16 * (share - share_) > share_) return;
        share_ = share;
        if (pieces > 1 && !schedule_.batch_invariant) {  // a request begins where a program does
            fixed_ = 0;
            cost_ = pieces * share;
            look_at(0);
        }
    }

    // The 32 requests from `base` on: each lane's length, and where it ends on the line, counted from line_.
    __device__ void look_at(int base) {
        const int lane = thread_anew() % kWarp;
        base_ = base;
        taken_ = pieces_taken_ = 0;
        const bool inside = base + lane < schedule_.b;
        lane_len_ = inside ? length_of(base + lane) : 0;
        lane_end_ = inside ? shape(lane_len_).cost : 0;
        if (cost_) {
            lane_end_ = min(lane + 1, schedule_.b - base) * cost_;
            return;
        }
        for (int step = 1; step < kWarp; step <<= 1) {
            const int below = __shfl_up_sync(~0u, lane_end_, step);
            if (lane >= step) lane_end_ += below;
        }
    }

    const Schedule& schedule_;
    const int* const seq_lens_;
    const int program_;
    int fixed_, cost_;  // tiles that a request's begin counts for; what a request takes of the line if not tiles + fixed_
    int share_;
    int base_, line_;           // the 32 requests looked at, and where they begin on the line
    int lane_len_, lane_end_;
    int taken_, pieces_taken_;  // of those requests, and of the next one's pieces: already handed out
};
