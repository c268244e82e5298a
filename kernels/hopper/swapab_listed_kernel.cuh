// SPDX-License-Identifier: Apache-2.0
// The kernel around swapab.cu's `attend` for listed keys. A cluster serves one request, its CTAs equal parts of the
// list; without clusters a CTA serves one request after the other. So there is no schedule to be computed, nor any
// merging through global memory. The grid is as high as there are blocks of heads.
// Included by a kernel after it has defined `attend`.
#pragma once

#include "swapab_gather.cuh"

namespace {

// With fewer rows what a launch gives suffices, and a start takes less long.
constexpr bool kMovesRegisters = N > (FORMAT == Format::kSixteenBit ? 16 : 8);

__device__ inline int cluster_id() {
    int id;
    asm volatile("mov.u32 %0, %%clusterid.x;" : "=r"(id));
    return id;
}

// Calls act(item) for this CTA's part of each of its requests.
template <typename Act>
__device__ inline void for_items(const Params& p, const Act& act) {
    const int ranks = cluster_size(), rank = cluster_cta_rank();
    const int step = ranks > 1 ? p.schedule.b : gridDim.x;
#pragma unroll 1
    for (int request = ranks > 1 ? cluster_id() : blockIdx.x; request < p.schedule.b; request += step) {
        Item item;
        item.request = request;
        item.seq_len = p.seq_lens ? min(max(p.seq_lens[request], 0), p.schedule.length) : p.schedule.length;
        const int tiles = (item.seq_len + kTile - 1) / kTile, part = divide(tiles + ranks - 1, ranks);
        item.tile_begin = min(rank * part, tiles);
        item.tile_end = min(item.tile_begin + part, tiles);
        item.slot = -1;
        act(item);
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, 1) FUSEDMLA_ENTRY(const __grid_constant__ Params p) {
    const Shared shared;
    if (threadIdx.x < Layout::kSlots) {
        mbarrier_init(shared.full(threadIdx.x), 1);
        mbarrier_init(shared.empty(threadIdx.x), kWarpgroup / kWarp);
        fence_mbarrier_init();
    }
    __syncthreads();
    launch_dependents();
    wait_for_predecessor();
    if (threadIdx.x < kConsumers) {
        if constexpr (kMovesRegisters) raise_registers<kConsumerRegisters>();
        TileRing ring;
        for_items(p, [&](const Item& item) { attend(p, shared, ring, item); });
    } else {
        if constexpr (kMovesRegisters) lower_registers<kProducerRegisters>();
        Gatherer gatherer(p, shared);
        for_items(p, [&](const Item& item) { gatherer.gather_item(item); });
    }
}
