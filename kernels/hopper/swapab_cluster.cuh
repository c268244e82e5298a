// SPDX-License-Identifier: Apache-2.0
// Results of a list that a cluster's CTAs share: each has some tiles of it, and brings together some columns of all.
//
// Columns go by sets of 16, a warp's of a block of 64. A CTA joins its two warpgroups' results, normalised, and gives
// every other one those of that one's sets, and its log-sum-exps, through distributed shared memory into the other's
// ring, whose tiles are done with. They are added up in the order of the ranks, so the bits do not depend on who
// arrived when. All this runs once and is cold code, so it is short loops rather than fast straight lines.
// Included by a kernel after it has defined FORMAT, Element, N and Layout.
#pragma once

#include "swapab_listed.cuh"
#include "swapab_store.cuh"

namespace {

__device__ inline uint32_t address_in(uint32_t smem, int rank) {
    uint32_t address;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(smem), "r"(rank));
    return address;
}
__device__ inline void put_in_cluster(uint32_t to, const float (&four)[4]) {
    asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(four[0]), "f"(four[1]),
                 "f"(four[2]), "f"(four[3])
                 : "memory");
}
__device__ inline void put_in_cluster(uint32_t to, float one) {
    asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(to), "f"(one) : "memory");
}

__device__ inline void store_log_sum(const Params& p, const Shared&, const Item& item, int n, float log_sum) {
    const int head = first_row_of_block() + n;
    if (head < p.h_q) p.lse[int64_t(item.request) * p.h_q + head] = log_sum * 0.6931471805599453f;
}

__device__ inline void store_results(const Params& p, const Shared& shared, const Item& item,
                                     const float (&kept)[4][N / 2]) {
    store_whole(p, shared, item.request, first_row_of_block(), kept);
}

class ClusterMerge {
  public:
    __device__ ClusterMerge(const Params& p, const Shared& shared, const Item& item)
        : p_(p), shared_(shared), item_(item), ranks_(cluster_size()), rank_(cluster_cta_rank()) {}

    __device__ void run(const float (&o)[8][N / 2], const float (&top)[kColumns], const float (&total)[kColumns],
                        float scale) {
        cluster_arrive();  // this thread reads no tile any more
        put_sums(top, total);
        named_barrier_sync(kAllConsumers, kConsumers);  // nobody of this CTA does
        if (threadIdx.x < N)
            weigh_warpgroups(threadIdx.x, scale);
        else if (threadIdx.x >= kWarpgroup && threadIdx.x < kWarpgroup + kSets)
            find_owner(threadIdx.x - kWarpgroup);
#pragma unroll
        for (int turn = 0; turn < kTurns; ++turn) {
            if (turn > 0) named_barrier_sync(kAllConsumers, kConsumers);
            put_results(o, turn);
            named_barrier_sync(kAllConsumers, kConsumers);
            if (turn == 0) cluster_wait();  // nobody of the cluster does
            give_results(turn);
        }
        const uint32_t lse = shared_.address + Layout::kPartialLse + rank_ * N * 4;
        for (int i = threadIdx.x; i < ranks_ * N; i += kConsumers)
            put_in_cluster(address_in(lse + i % N * 4, i / N), sums()[i % N]);
        cluster_arrive();
        cluster_wait();  // for everybody's
        for (int n = threadIdx.x / kWarp; n < N; n += kConsumers / kWarp) weigh_ranks(n);
        named_barrier_sync(kAllConsumers, kConsumers);
        add_up();
    }

  private:
    static constexpr int kSets = Layout::kColumnSets, kEights = N / 8;
    static constexpr int kTurns = N > 16 ? 2 : 1;  // in which results go through shared memory, for want of room
    static constexpr int kSetsATurn = kSets / kTurns;

    __device__ static int lane() { return threadIdx.x % kWarp; }
    __device__ float* sums() const { return shared_.exchange(); }           // [8 warps][N], later log-sum-exps [N]
    __device__ float* factors() const { return shared_.exchange() + 8 * N; }  // [warpgroup][N], at first maxima
    __device__ float* weights() const { return shared_.scratch(); }  // [rank][N]
    __device__ uint32_t* owners() const {
        return reinterpret_cast<uint32_t*>(shared_.scratch() + Layout::kMostRanks * N);
    }
    __device__ uint8_t* parcel(int warpgroup, int set) const {
        return shared_.base + Layout::kParcels + (warpgroup * kSetsATurn + set) * Layout::kSetBytes;
    }
    __device__ int first_set_of(int rank) const { return divide(kSets * rank + ranks_ - 1, ranks_); }

    __device__ void put_sums(const float (&top)[kColumns], const float (&total)[kColumns]) const {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
            float sum = total[c];
#pragma unroll
            for (int step = 4; step < kWarp; step <<= 1) sum += __shfl_xor_sync(~0u, sum, step);
            if (lane() < 4) sums()[threadIdx.x / kWarp * N + column_of(c)] = sum;
            if (threadIdx.x % kWarpgroup < 4) factors()[threadIdx.x / kWarpgroup * N + column_of(c)] = top[c];
        }
    }

    __device__ void weigh_warpgroups(int n, float scale) const {
        const float tops[2] = {factors()[n], factors()[N + n]}, top = fmaxf(tops[0], tops[1]);
        const float first = exp2_approx(tops[0] - top), second = exp2_approx(tops[1] - top);
        float total = 0.f;
#pragma unroll
        for (int warp = 0; warp < 4; ++warp)
            total += sums()[warp * N + n] * first + sums()[(4 + warp) * N + n] * second;
        const float norm = total > 0.f ? scale / total : 0.f;
        factors()[n] = first * norm, factors()[N + n] = second * norm;
        sums()[n] = total > 0.f ? top + log2_approx(total) : -INFINITY;
    }

    // Where this rank's part of a set goes.
    __device__ void find_owner(int set) const {
        const int owner = set * ranks_ / kSets, place = (set - first_set_of(owner)) * ranks_ + rank_;
        owners()[set] = address_in(shared_.address + place * Layout::kSetBytes, owner);
    }

    __device__ void put_results(const float (&o)[8][N / 2], int turn) const {
        uint8_t* to = parcel(threadIdx.x / kWarpgroup, threadIdx.x / kWarp % 4) + lane() * 16;
#pragma unroll
        for (int b = 0; b < 8 / kTurns; ++b) {
            const float(&from)[N / 2] = o[turn * (8 / kTurns) + b];
#pragma unroll
            for (int i = 0; i < kEights; ++i)
                *reinterpret_cast<float4*>(to + b * 4 * Layout::kSetBytes + i * 512) =
                    float4{from[4 * i], from[4 * i + 1], from[4 * i + 2], from[4 * i + 3]};
        }
    }

    // Four values of a lane at a time: of two heads, in the two columns that a lane has.
    __device__ void give_results(int turn) const {
#pragma unroll 2
        for (int unit = threadIdx.x / kWarp; unit < kSetsATurn * kEights; unit += kConsumers / kWarp) {
            const int set = unit / kEights, eight = unit % kEights, at = eight * 512 + lane() * 16;
            const float* factor = factors() + eight * 8 + lane() % 4 * 2;
            const float4 a = *reinterpret_cast<const float4*>(parcel(0, set) + at);
            const float4 b = *reinterpret_cast<const float4*>(parcel(1, set) + at);
            const float2 f = *reinterpret_cast<const float2*>(factor);
            const float2 g = *reinterpret_cast<const float2*>(factor + N);
            const float sum[4] = {a.x * f.x + b.x * g.x, a.y * f.y + b.y * g.y, a.z * f.x + b.z * g.x,
                                  a.w * f.y + b.w * g.y};
            put_in_cluster(owners()[turn * kSetsATurn + set] + at, sum);
        }
    }

    __device__ void weigh_ranks(int n) const {
        const float* all = reinterpret_cast<const float*>(shared_.base + Layout::kPartialLse);
        const float lse = lane() < ranks_ ? all[lane() * N + n] : -INFINITY;
        float top = fmaxf(lse, -1e30f);  // finite, so that a row without keys makes no NaN
#pragma unroll
        for (int step = 1; step < kWarp; step <<= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
        const float weight = exp2_approx(lse - top);
        float total = weight;
#pragma unroll
        for (int step = 1; step < kWarp; step <<= 1) total += __shfl_xor_sync(~0u, total, step);
        if (lane() < ranks_) weights()[lane() * N + n] = total > 0.f ? __fdividef(weight, total) : 0.f;
        const float log_sum = total > 0.f ? top + log2_approx(total) : -INFINITY;
        if (rank_ == 0 && lane() == 0) store_log_sum(p_, shared_, item_, n, log_sum);
    }

    __device__ void add_up() const {
        const int first = first_set_of(rank_), units = (first_set_of(rank_ + 1) - first) * kEights;
        for (int unit = threadIdx.x / kWarp; unit < units; unit += kConsumers / kWarp) {
            const int set = unit / kEights, eight = unit % kEights, at = eight * 8 + lane() % 4 * 2;
            const uint8_t* from = shared_.base + set * ranks_ * Layout::kSetBytes + eight * 512 + lane() * 16;
            float4 sum = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 4
            for (int i = 0; i < ranks_; ++i) {
                const float2 weight = *reinterpret_cast<const float2*>(weights() + i * N + at);
                const float4 part = *reinterpret_cast<const float4*>(from + i * Layout::kSetBytes);
                sum.x += weight.x * part.x, sum.y += weight.y * part.y;
                sum.z += weight.x * part.z, sum.w += weight.y * part.w;
            }
            const int head = first_row_of_block() + at;
            uint16_t* out = static_cast<uint16_t*>(p_.out) + (int64_t(item_.request) * p_.h_q + head) * kLatent +
                            (first + set) * 16 + lane() / 4 * (Columns::step == 1 ? 2 : 1);
            if (head < p_.h_q) store_two(out, pack_16bit(sum.x, sum.z, out_is_fp16(p_)));
            if (head + 1 < p_.h_q) store_two(out + kLatent, pack_16bit(sum.y, sum.w, out_is_fp16(p_)));
        }
    }

    __device__ static void store_two(uint16_t* out, uint32_t pair) {
        if (Columns::step == 1)
            *reinterpret_cast<uint32_t*>(out) = pair;
        else
            out[0] = pair, out[Columns::step] = pair >> 16;
    }

    const Params& p_;
    const Shared& shared_;
    const Item& item_;
    const int ranks_, rank_;
};

// Merges and stores the results if there is a cluster.
__device__ inline bool merge_in_cluster(const Params& p, const Shared& shared, const Item& item, float scale,
                                        const float (&o)[8][N / 2], const float (&top)[kColumns],
                                        const float (&total)[kColumns]) {
    if (cluster_size() == 1) return false;
    ClusterMerge(p, shared, item).run(o, top, total, scale);
    return true;
}

}  // namespace
