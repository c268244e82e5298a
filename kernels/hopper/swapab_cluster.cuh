// SPDX-License-Identifier: Apache-2.0
// Results of a list that a cluster's CTAs share: each has some tiles of it, and brings together some columns of all.
//
// Columns go by sets of 16, a warp's of a block of 64. Results go from registers straight into the shared memory of the
// CTA that has their set, where a barrier counts the bytes: into slots of the ring that the last tiles leave alone. The
// gathering warps, who have nothing else to do by then, exchange the rows' maxima and sums and turn them into weights
// while the others multiply. Everything is added up in the order of the ranks, so the bits do not depend on who arrived
// when. All this runs once and is cold code, so it is short loops rather than fast straight lines.
// Included by a kernel after it has defined FORMAT, Element, N and Layout.
#pragma once

#include "swapab_attend.cuh"
#include "swapab_join_listed.cuh"

namespace {

// A CTA's share of a list.
struct Share : Item {
    int most_tiles;  // of any CTA of the cluster
};

class ClusterMerge {
  public:
    __device__ ClusterMerge(const Params& p, const Shared& shared)
        : p_(p), shared_(shared), ranks_(cluster_size()), rank_(cluster_cta_rank()) {}

    // By one thread, before any other CTA may send.
    __device__ void expect() const {
        mbarrier_init(landed(), 1);
        mbarrier_init(told(), 1);
        fence_mbarrier_init();
        mbarrier_expect_tx(landed(), (first_set_of(rank_ + 1) - first_set_of(rank_)) * ranks_ * Layout::kSetBytes);
        mbarrier_expect_tx(told(), ranks_ * N * 8);
    }

    // The computing warps' part.
    __device__ void attend(TileRing& ring, const Share& share) const {
        const int tiles = share.tile_end - share.tile_begin;
        // A CTA with fewer tiles than others has them at other places of the ring, but is done earlier.
        const auto soon = [&] {
            return tiles > kMostInPairs && tiles == share.most_tiles && landing_of(share).room == Room::kFreed;
        };
        float o[4][N / 2];
        if (tiles > kMostInPairs) {
            float norm[kColumns];
            const auto last = [&] {  // what lies before the last two tiles is done with
                if (soon()) cluster_wait(), cluster_arrive_relaxed();
            };
            State state;
            attend_in_turns<true>(p_, shared_, ring, share, state, last, [] { named_barrier_arrive(kSummed, kThreads); });
            join_in_ring(shared_, ring, tiles, state, o, norm);
        } else {
            attend_in_pairs(p_, shared_, ring, share, o, [] { named_barrier_sync(kSummed, kThreads); });
        }
        if (!soon()) cluster_wait();  // all CTAs are there
        const Landing landing = landing_of(share);
        if (landing.room != Room::kUnused) {
            if (!soon()) cluster_arrive();
            cluster_wait();
        }
#pragma unroll
        for (int block = 0; block < 4; ++block) {
            const uint2 owner = owners()[(threadIdx.x / kWarpgroup * 4 + block) * 4 + threadIdx.x / kWarp % 4];
#pragma unroll
            for (int i = 0; i < N / 2; i += 4)
                send(owner.x + i * 128 + lane() * 16, owner.y, o[block][i], o[block][i + 1], o[block][i + 2],
                     o[block][i + 3]);
        }
        named_barrier_sync(kWeighed, kThreads);
        mbarrier_wait(landed(), 0);
        add_up(share, landing.place);
    }

    // By a warp, before attend(): where this rank's part of each set goes, and the barrier there.
    __device__ void find_owners(const Share& share) const {
        const int set = lane(), owner = set * ranks_ / kSets, place = (set - first_set_of(owner)) * ranks_ + rank_;
        const uint32_t to = shared_.address() + landing_of(share).place + place * Layout::kSetBytes;
        owners()[set] = {address_in(to, owner), address_in(landed(), owner)};
    }

    // The gathering warps' part, when their copies are on their way.
    __device__ void weigh(const Share& share) const {
        const bool room = landing_of(share).room != Room::kUnused;
        cluster_wait();
        if (room) cluster_arrive_relaxed();
        named_barrier_sync(kSummed, kThreads);
        for (int i = threadIdx.x % kWarpgroup; i < ranks_ * N; i += kWarpgroup) {
            const int n = i % N, to = i / N;
            const uint32_t place = shared_.address() + Layout::kRowSums + (rank_ * N + n) * 8;
            const RowSum<2> row = sum_of_row<2>(shared_, n);
            send(address_in(place, to), address_in(told(), to), row.top, row.total);
        }
        mbarrier_wait(told(), 0);
        for (int n = warp(); n < N; n += 4) weigh_ranks(share, n);
        named_barrier_arrive(kWeighed, kThreads);
        if (room) cluster_wait();
    }

  private:
    static constexpr int kSets = Layout::kColumnSets, kEights = N / 8;

    __device__ static int lane() { return threadIdx.x % kWarp; }
    __device__ static int warp() { return threadIdx.x / kWarp % 4; }
    __device__ uint32_t landed() const { return shared_.address() + Layout::kClusterBarriers; }
    __device__ uint32_t told() const { return landed() + 8; }
    __device__ float* weights() const { return shared_.scratch(); }  // [rank][N]
    __device__ uint2* owners() const { return reinterpret_cast<uint2*>(shared_.base + Layout::kOwners); }
    __device__ int first_set_of(int rank) const { return divide(kSets * rank + ranks_ - 1, ranks_); }

    // Where results land: where no tile comes, or none does after the last two, or tiles until the end.
    enum class Room { kUnused, kFreed, kTaken };
    struct Landing {
        Room room;
        int place;
    };
    __device__ Landing landing_of(const Share& share) const {
        constexpr int kNeeded = (Layout::kLandingBytes + Layout::kSlotBytes - 1) / Layout::kSlotBytes;
        constexpr int kLast = 2 * kSlotsOfTile;
        int slots = share.most_tiles * kSlotsOfTile;
        asm volatile("" : "+r"(slots));  // computed anew where it is needed: registers are scarce
        if (slots * Layout::kSlotBytes <= Layout::kLanding) return {Room::kUnused, Layout::kLanding};
        const int after = slots % Layout::kSlots;  // where another tile would come
        if (after + kNeeded <= min(after - kLast, 0) + Layout::kSlots)
            return {Room::kFreed, after * Layout::kSlotBytes};
        if (kNeeded <= after - kLast) return {Room::kFreed, 0};
        return {Room::kTaken, Layout::kLanding};
    }

    __device__ void weigh_ranks(const Share& share, int n) const {
        const float2* all = reinterpret_cast<const float2*>(shared_.base + Layout::kRowSums);
        const float2 own = lane() < ranks_ ? all[lane() * N + n] : float2{-1e30f, 0.f};
        float top = own.x;
#pragma unroll
        for (int step = 1; step < kWarp; step <<= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
        const float weight = exp2_approx(own.x - top);
        float total = weight * own.y;
#pragma unroll
        for (int step = 1; step < kWarp; step <<= 1) total += __shfl_xor_sync(~0u, total, step);
        if (lane() < ranks_) weights()[lane() * N + n] = total > 0.f ? __fdividef(weight, total) : 0.f;
        if (rank_ == 0 && lane() == 0)
            store_log_sum(p_, shared_, share, n, total > 0.f ? top + log2_approx(total) : -INFINITY);
    }

    // Four values of a lane at a time: of two heads, in the two columns that a lane has.
    __device__ void add_up(const Share& share, int place) const {
        const int first = first_set_of(rank_), units = (first_set_of(rank_ + 1) - first) * kEights;
        for (int unit = threadIdx.x / kWarp; unit < units; unit += kConsumers / kWarp) {
            const int set = unit / kEights, eight = unit % kEights, at = eight * 8 + lane() % 4 * 2;
            const uint8_t* from =
                shared_.base + place + set * ranks_ * Layout::kSetBytes + eight * 512 + lane() * 16;
            float4 sum = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 4
            for (int i = 0; i < ranks_; ++i) {
                const float2 weight = *reinterpret_cast<const float2*>(weights() + i * N + at);
                const float4 part = *reinterpret_cast<const float4*>(from + i * Layout::kSetBytes);
                sum.x += weight.x * part.x, sum.y += weight.y * part.y;
                sum.z += weight.x * part.z, sum.w += weight.y * part.w;
            }
            const int head = first_row_of_block() + at;
            uint16_t* out = static_cast<uint16_t*>(p_.out) + (int64_t(share.request) * p_.h_q + head) * kLatent +
                            (first + set) * 16 + lane() / 4 * (Columns::step == 1 ? 2 : 1);
            if (head < p_.h_q) Columns::store(out, pack_16bit(sum.x, sum.z, out_is_fp16(p_)));
            if (head + 1 < p_.h_q) Columns::store(out + kLatent, pack_16bit(sum.y, sum.w, out_is_fp16(p_)));
        }
    }

    const Params& p_;
    const Shared& shared_;
    const int ranks_, rank_;
};

}  // namespace
