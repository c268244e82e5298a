// SPDX-License-Identifier: Apache-2.0
// Merging the partial results of split requests inside the decode kernel.
//
// A program publishes its partial result and counts itself in at the request's counter. When all its items are done it
// comes back to its split ones, waits until every piece is in, and merges its share of the columns: n pieces are merged
// by n programs, each an n-th, in an order that only n and the rows decide, so the bits do not depend on who arrived
// when. No program waits before its own work is published, so waiting needs only that the grid's programs all get to run.
#pragma once

#include "work.cuh"

// A counter counts its request's published pieces, then its mergers, and is back at 0 for the next launch.
__device__ inline void publish(unsigned* counter, int pieces) { count_release(counter, 2 * pieces - 1); }
__device__ inline void leave(unsigned* counter, int pieces) { count_relaxed(counter, 2 * pieces - 1); }

// The same where the program of the first piece, which is not published, alone brings the others together.
__device__ inline void publish_to_first(unsigned* counter, int pieces) { count_release(counter, pieces - 1); }
__device__ inline void leave_joined(unsigned* counter, int pieces) { count_relaxed(counter, pieces - 1); }

// Returns when so many pieces are published. One thread calls it; a barrier passes what it saw on to the others.
__device__ inline void wait_for_pieces(const unsigned* counter, int pieces) {
    while (load_acquire(counter) < pieces) __nanosleep(20);
}

// Distance of a piece's partial result from that of piece 0, in rows: see slot_of.
__device__ inline int rows_from_first(const Params& p, int rows, int piece) {
    return p.schedule.batch_invariant ? piece * rows : (2 * piece - (piece > 0)) * rows;
}

__device__ inline void add_weighted(float4& sum, float weight, const float4& v) {
    sum.x += weight * v.x, sum.y += weight * v.y, sum.z += weight * v.z, sum.w += weight * v.w;
}
