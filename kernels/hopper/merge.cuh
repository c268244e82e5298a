// SPDX-License-Identifier: Apache-2.0
// A share of the merging of a split request, see splitkv.cuh. Every thread weighs for itself the pieces that it adds
// up, so all that is to be read is on its way at once, and little code is run. Pieces are divided among groups of
// threads where there are more threads than columns.
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

// Partial results row by row.
struct RowByRow {
    static constexpr int kUnits = kLatent / 4;
    static __device__ int rows(const Params& p) { return p.s_q * p.h_q; }  // of a partial result
    static __device__ int units(int rows_here) { return rows_here * kUnits; }
    static __device__ int row_of(int unit) { return unit / kUnits; }
    static __device__ int column_of(int unit) { return unit % kUnits * 4; }
};

// Four columns of a row are a unit. A thread has UNITS of them in work at a time, with PIECES pieces each.
template <typename Order, int THREADS, int UNITS, int PIECES>
class MergeShare {
  public:
    __device__ MergeShare(const Params& p, const Item& item, int row0, int rows_here, int thread)
        : p_(p), item_(item), row0_(row0), rows_here_(rows_here), thread_(thread) {
        const int units = Order::units(rows_here), share = divide(units + item.pieces - 1, item.pieces);
        begin_ = item.piece * share, end_ = min(begin_ + share, units);
        width_log_ = min(max(32 - __clz(share - 1), 3), 31 - __clz(THREADS));
    }

    __device__ void run(bool to_fp16, int barrier, float* scratch) const {
        const int width = 1 << width_log_, groups = THREADS >> width_log_, group = thread_ >> width_log_;
#pragma unroll 1
        for (int first = begin_; first < end_; first += width * UNITS) {
            Weighted merged[UNITS];
            const int unit = first + (thread_ & (width - 1));
#pragma unroll 1
            for (int piece = group; piece < item_.pieces; piece += groups * PIECES)
                add_pieces(merged, unit, piece, groups);
            if (groups > 1) {  // then one round is all
                gather_groups(merged[0], groups, group, barrier, scratch);
                if (group > 0) break;
            }
#pragma unroll
            for (int u = 0; u < UNITS; ++u) store(merged[u], unit + u * width, to_fp16);
        }
        named_barrier_sync(barrier, THREADS);  // scratch is free again
    }

  private:
    __device__ void add_pieces(Weighted (&merged)[UNITS], int unit, int piece, int groups) const {
        float4 v[UNITS][PIECES];
        float log_sum[UNITS][PIECES];
#pragma unroll
        for (int i = 0; i < PIECES; ++i) {
            const int rows = Order::rows(p_);
            const int64_t row = int64_t(item_.slot0) * rows + rows_from_first(p_, rows, piece + i * groups) + row0_;
            const float4* from = reinterpret_cast<const float4*>(p_.partial_out) + row * (kLatent / 4) + unit;
#pragma unroll
            for (int u = 0; u < UNITS; ++u) {
                const int step = u << width_log_;
                const bool live = piece + i * groups < item_.pieces && is_live(unit + step);
                log_sum[u][i] = live ? __ldcg(p_.partial_lse + row + Order::row_of(unit + step)) : -INFINITY;
                v[u][i] = live ? __ldcg(from + step) : float4{0.f, 0.f, 0.f, 0.f};
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

    // Group 0 gets all groups' parts, in their order.
    __device__ void gather_groups(Weighted& merged, int groups, int group, int barrier, float* scratch) const {
        float4* sums = reinterpret_cast<float4*>(scratch);
        float2* tops = reinterpret_cast<float2*>(scratch + THREADS * 4);
        sums[thread_] = merged.sum, tops[thread_] = {merged.top, merged.total};
        named_barrier_sync(barrier, THREADS);
        if (group > 0) return;
#pragma unroll 1
        for (int other = 1; other < groups; ++other) {
            const float2 top = tops[thread_ + (other << width_log_)];
            merged.relate(fmaxf(merged.top, top.x));
            const float weight = exp2_approx(top.x - merged.top);
            merged.total += weight * top.y;
            add_weighted(merged.sum, weight, sums[thread_ + (other << width_log_)]);
        }
    }

    __device__ bool is_live(int unit) const { return unit < end_ && Order::row_of(unit) < rows_here_; }

    __device__ void store(const Weighted& merged, int unit, bool to_fp16) const {
        if (!is_live(unit)) return;
        const float norm = merged.total > 0.f ? __fdividef(1.f, merged.total) : 0.f;
        const float4& sum = merged.sum;
        const int64_t row = int64_t(item_.request) * p_.s_q * p_.h_q + row0_ + Order::row_of(unit);
        uint16_t* to = static_cast<uint16_t*>(p_.out) + row * kLatent + Order::column_of(unit);
        *reinterpret_cast<uint2*>(to) = {pack_16bit(sum.x * norm, sum.y * norm, to_fp16),
                                         pack_16bit(sum.z * norm, sum.w * norm, to_fp16)};
        if (Order::column_of(unit) == 0)
            p_.lse[row] = merged.total > 0.f ? (merged.top + log2_approx(merged.total)) * 0.6931471805599453f : -INFINITY;
    }

    const Params& p_;
    const Item& item_;
    const int row0_, rows_here_, thread_;
    int begin_, end_;  // of the units
    int width_log_;    // 2^width_log_ threads lie along the units
};
