// SPDX-License-Identifier: Apache-2.0
// A share of the merging of a split request, see splitkv.cuh. Every thread weighs for itself the pieces that it adds
// up, so all that is to be read is on its way at once, and little code is run: it runs once, and what counts is how few
// instructions it is. Pieces are divided among groups of threads where there are more threads than columns.
//
// How partial results lie in memory is the kernel's to say, by an `Order`: how many rows one has, how many units of four
// columns some rows are, whose row a unit is, which unit is a row's first, and where in the output row its columns go.
#pragma once

#include "splitkv.cuh"

struct Weighted {  // results relative to 2^top
    float4 sum = {0.f, 0.f, 0.f, 0.f};
    float top = -1e30f, total = 0.f;  // finite, so that a row without keys makes no NaN

    __device__ void relate(float most) {
        const float shrink = exp2_approx(top - most);
        sum.x *= shrink, sum.y *= shrink, sum.z *= shrink, sum.w *= shrink;
        total *= shrink, top = most;
    }
    __device__ void add(const float4& v, float log_sum) {
        const float weight = exp2_approx(log_sum - top);
        total += weight;
        add_weighted(sum, weight, v);
    }
};

template <int THREADS>
constexpr int kScratchOfMerge = (THREADS + kWarp) * 24;  // bytes: a unit of each thread, padded

// A thread has UNITS of its program's units in work at a time, with PIECES pieces each.
template <typename Order, int THREADS, int UNITS, int PIECES>
class MergeShare {
  public:
    __device__ MergeShare(const Params& p, const Item& item, int row0, int rows_here, int thread)
        : p_(p), thread_(thread), pieces_(item.pieces), rows_here_(rows_here) {
        const int units = Order::units(rows_here), share = divide(units + pieces_ - 1, pieces_);
        begin_ = item.piece * share, end_ = min(begin_ + share, units);
        width_log_ = min(max(32 - __clz(share - 1), 3), 31 - __clz(THREADS));
        const int rows = Order::rows(p);
        first_ = int64_t(item.slot0) * rows + row0;
        out_row_ = int64_t(item.request) * p.s_q * p.h_q + row0;
        gap_ = p.schedule.batch_invariant ? 0 : rows;
        stride_ = rows + gap_;
        point_to(begin_);
    }

    // When all pieces are there. What is made before takes its time while they are waited for.
    __device__ void run(bool to_fp16, int barrier, float* scratch) {
        const int width = 1 << width_log_, groups_log = 31 - __clz(THREADS) - width_log_, group = thread_ >> width_log_;
#pragma unroll 1
        for (int first = begin_; first < end_;) {
            Weighted merged[UNITS];
            int unit = first + (thread_ & (width - 1));
#pragma unroll 1
            for (int piece = group; piece < pieces_; piece += PIECES << groups_log)
                add_pieces(merged, piece, groups_log);
            if (groups_log > 0) {
                join_groups(merged[0], groups_log, barrier, scratch);
                unit = thread_ & ((1 << groups_log) - 1) ? end_ : first + (thread_ >> groups_log);  // one of them stores
            }
#pragma unroll
            for (int u = 0; u < UNITS; ++u) store(merged[u], unit + u * width, to_fp16);
            first += width * UNITS;
            if (first < end_) point_to(first);
        }
        named_barrier_sync(barrier, THREADS);  // scratch is free again
    }

  private:
    // This thread's units from `first` on in the first piece's partial result, and the sums of their rows.
    __device__ void point_to(int first) {
        const int unit = first + (thread_ & ((1 << width_log_) - 1));
        const auto live = [&](int u) { return min(unit + (u << width_log_), end_ - 1); };
        const auto row = [&](int u) { return min(Order::row_of(live(u)), rows_here_ - 1); };
        from_ = reinterpret_cast<const uint8_t*>(p_.partial_out) + (first_ * (kLatent / 4) + live(0)) * 16;
        sums_ = reinterpret_cast<const uint8_t*>(p_.partial_lse) + (first_ + row(0)) * 4;
        asm volatile("" : "+l"(from_), "+l"(sums_));  // not to be worked out anew for every piece
#pragma unroll
        for (int u = 0; u < UNITS; ++u) ahead_[u] = (live(u) - live(0)) * 16, sums_ahead_[u] = (row(u) - row(0)) * 4;
    }

    // The pieces from `piece` on, every 2^groups_log-th. Where none is the last one is read, and weighs nothing.
    __device__ void add_pieces(Weighted (&merged)[UNITS], int piece, int groups_log) const {
        const int last = (pieces_ - 1) * stride_ - gap_, step = stride_ << groups_log;
        int at = piece * stride_ - gap_;  // see rows_from_first; of piece 0, which comes first if at all, 0
        float4 v[UNITS][PIECES];
        float log_sum[UNITS][PIECES];
#pragma unroll
        for (int i = 0; i < PIECES; ++i, at += step) {
            const unsigned row = min(i == 0 ? max(at, 0) : at, last);
#pragma unroll
            for (int u = 0; u < UNITS; ++u) {
                log_sum[u][i] = __ldcg(reinterpret_cast<const float*>(sums_ + uint64_t{row} * 4 + sums_ahead_[u]));
                v[u][i] = __ldcg(reinterpret_cast<const float4*>(from_ + uint64_t{row} * (kLatent * 4) + ahead_[u]));
                if (at > last) log_sum[u][i] = -INFINITY;
            }
        }
#pragma unroll
        for (int u = 0; u < UNITS; ++u) {
            float most = merged[u].top;
#pragma unroll
            for (int i = 0; i < PIECES; ++i) most = fmaxf(most, log_sum[u][i]);
            merged[u].relate(most);
#pragma unroll
            for (int i = 0; i < PIECES; ++i) merged[u].add(v[u][i], log_sum[u][i]);
        }
    }

    // The groups' parts of a unit go to neighbouring lanes, which add them up as a tree.
    __device__ void join_groups(Weighted& merged, int groups_log, int barrier, float* scratch) const {
        const int groups = 1 << groups_log, pitch = (1 << width_log_) + 1;
        float4* sums = reinterpret_cast<float4*>(scratch);
        float2* tops = reinterpret_cast<float2*>(sums + THREADS + kWarp);
        const int to = thread_ + (thread_ >> width_log_), from = (thread_ & (groups - 1)) * pitch + (thread_ >> groups_log);
        sums[to] = merged.sum, tops[to] = {merged.top, merged.total};
        named_barrier_sync(barrier, THREADS);
        const float2 top = tops[from];
        merged = {sums[from], top.x, top.y};
        float most = top.x;
#pragma unroll 1
        for (int step = 1; step < groups; step <<= 1) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
        merged.relate(most);
#pragma unroll 1
        for (int step = 1; step < groups; step <<= 1) {
            merged.sum.x += __shfl_xor_sync(~0u, merged.sum.x, step);
            merged.sum.y += __shfl_xor_sync(~0u, merged.sum.y, step);
            merged.sum.z += __shfl_xor_sync(~0u, merged.sum.z, step);
            merged.sum.w += __shfl_xor_sync(~0u, merged.sum.w, step);
            merged.total += __shfl_xor_sync(~0u, merged.total, step);
        }
    }

    __device__ void store(const Weighted& merged, int unit, bool to_fp16) const {
        const int row = Order::row_of(unit);
        if (unit >= end_ || row >= rows_here_) return;
        const float norm = merged.total > 0.f ? __fdividef(1.f, merged.total) : 0.f;
        const float4& sum = merged.sum;
        Order::store(static_cast<uint16_t*>(p_.out) + (out_row_ + row) * kLatent, unit,
                     {pack_16bit(sum.x * norm, sum.y * norm, to_fp16), pack_16bit(sum.z * norm, sum.w * norm, to_fp16)});
        if (Order::begins_row(unit))
            p_.lse[out_row_ + row] =
                merged.total > 0.f ? (merged.top + log2_approx(merged.total)) * 0.6931471805599453f : -INFINITY;
    }

    const Params& p_;
    const int thread_, pieces_, rows_here_;
    int begin_, end_;                       // of the units
    int width_log_;                         // 2^width_log_ threads lie along the units
    int64_t first_, out_row_;               // the block's first row in the first piece's partial result, in the results
    int stride_, gap_;                      // rows from piece to piece; how many fewer from the first to the second
    const uint8_t *from_, *sums_;           // see point_to()
    int ahead_[UNITS], sums_ahead_[UNITS];  // of further units, in bytes
};

// Merges an item's share. wait() returns when all pieces are there; what can be worked out before is.
template <typename Order, int THREADS, typename Wait>
__device__ inline void merge_share(const Params& p, const Item& item, int row0, int rows_here, int thread, bool to_fp16,
                                   int barrier, float* scratch, const Wait& wait) {
    const auto merge_by = [&](auto share) {
        wait();
        share.run(to_fp16, barrier, scratch);
    };
    if (item.pieces > 4)
        merge_by(MergeShare<Order, THREADS, 1, 8>(p, item, row0, rows_here, thread));
    else if (item.pieces > 2)
        merge_by(MergeShare<Order, THREADS, 2, 4>(p, item, row0, rows_here, thread));
    else
        merge_by(MergeShare<Order, THREADS, 4, 2>(p, item, row0, rows_here, thread));
}
