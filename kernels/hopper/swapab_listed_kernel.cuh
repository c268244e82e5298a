// SPDX-License-Identifier: Apache-2.0
// The kernel for listed keys. A cluster serves one request, its CTAs equal parts of the list; without clusters a CTA
// serves one request after the other. So there is no schedule to be computed, nor any merging through global memory.
// The grid is as high as there are blocks of heads.
// Included by a kernel after it has defined FORMAT, Element, N and Layout.
#pragma once

#include "swapab_gather.cuh"
#include "swapab_join_listed.cuh"

#include "swapab_attend.cuh"
#include "swapab_cluster.cuh"

namespace {

// With fewer rows what a launch gives suffices, and a start takes less long.
constexpr bool kMovesRegisters = N > (FORMAT == Format::kSixteenBit ? 16 : 8);

__device__ inline Share share_of(const Params& p, int request) {
    const int ranks = cluster_size(), rank = cluster_cta_rank();
    Share share;
    share.request = request;
    share.seq_len = p.seq_lens ? min(max(p.seq_lens[request], 0), p.schedule.length) : p.schedule.length;
    const int tiles = (share.seq_len + kTile - 1) / kTile;
    // `min_share` has no other use here: what it is where a list is full.
    share.most_tiles = share.seq_len == p.schedule.length ? p.schedule.min_share : divide(tiles + ranks - 1, ranks);
    share.tile_begin = min(rank * share.most_tiles, tiles);
    share.tile_end = min(share.tile_begin + share.most_tiles, tiles);
    share.slot = -1;
    return share;
}

// The computing warps initialise the barriers: it takes the others longer to get to work.
__device__ inline void init_barriers(const Params& p, const Shared& shared) {
    constexpr int kWarps = kConsumers / kWarp;
    const unsigned thread = thread_anew();
    if (thread % kWarp == 0) {  // lanes would do so one after the other
        for (int slot = thread / kWarp; slot < Layout::kSlots; slot += kWarps) {
            mbarrier_init(shared.full(slot), 1);
            mbarrier_init(shared.empty(slot), kWarpgroup / kWarp);
        }
        if (thread == 0 && cluster_size() > 1) ClusterMerge(p, shared).expect();
        fence_mbarrier_init();
    }
    __syncwarp();
    named_barrier_arrive(kReady, kThreads);
}

__device__ inline void consume(const Params& p, const Shared& shared) {
    init_barriers(p, shared);
    if (cluster_size() > 1) cluster_arrive_relaxed();
    launch_dependents();
    wait_for_predecessor();
    if constexpr (kMovesRegisters) raise_registers<Layout::kConsumerRegisters>();
    TileRing ring;
#pragma unroll 1
    for (int request = cluster_id(); request < p.schedule.b; request += gridDim.x) {  // a cluster's CTA has but one
        load_query(p, shared, request);
        const Share share = share_of(p, request);
        named_barrier_sync(kAllConsumers, kConsumers);
        if (cluster_size() > 1 && threadIdx.x / kWarp == kConsumers / kWarp - 1)  // whose tile is not the first to come
            ClusterMerge(p, shared).find_owners(share);
        if (cluster_size() > 1)
            ClusterMerge(p, shared).attend(ring, share);
        else
            attend(p, shared, ring, share);
    }
}

__device__ inline void gather(const Params& p, const Shared& shared) {
    if (cluster_size() > 1) cluster_arrive_relaxed();
    launch_dependents();
    wait_for_predecessor();
    Gatherer gatherer(p, shared, cluster_id());
    if constexpr (kMovesRegisters) lower_registers<Layout::kProducerRegisters>();
#pragma unroll 1
    for (int request = cluster_id(); request < p.schedule.b; request += gridDim.x) {
        const Share share = share_of(p, request);
        gatherer.gather_item(share);
        if (request + int(gridDim.x) < p.schedule.b)  // the others are some tiles behind
            prefetch_query<N, kWarpgroup>(p, request + gridDim.x, first_row_of_block(), threadIdx.x % kWarpgroup);
        if (cluster_size() > 1) ClusterMerge(p, shared).weigh(share);
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, 1) FUSEDMLA_ENTRY(const __grid_constant__ Params p) {
    const Shared shared;
    if (threadIdx.x < kConsumers)
        consume(p, shared);
    else
        gather(p, shared);
}
