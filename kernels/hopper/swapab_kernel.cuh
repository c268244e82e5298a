// SPDX-License-Identifier: Apache-2.0
// The kernel around a kernel's `attend`: roles of the warps, and merging split requests.
// Included by a kernel after it has defined `attend`.
#pragma once

#include "swapab_copy.cuh"

namespace {

__device__ inline unsigned* counter_of(const Params& p, const Item& item) {
    return p.arrivals + item.request * gridDim.x + blockIdx.x;
}

__device__ void consume(const Params& p, const Shared& shared) {
    Ring<Layout::kItems> items;
    Ring<Layout::kStages> stages;
    while (true) {
        mbarrier_wait(shared.item_full(items.stage()), items.phase());
        const Task& task = *shared.item(items.stage());  // stays there: registers are scarce
        if (task.step == Step::kEnd) break;
        const Item& item = task.item;
        if (task.step == Step::kAttend) {
            attend(p, shared, stages, item);
            if (item.slot >= 0 && threadIdx.x == 0) publish(counter_of(p, item), item.pieces);
        } else {
            if (threadIdx.x == 0) wait_for_pieces(counter_of(p, item), item.pieces);
            named_barrier_sync(kAllConsumers, kConsumers);
            merge_share<kConsumers>(p, item, first_row_of_block(), min(p.s_q * p.h_q - first_row_of_block(), N),
                                    out_is_fp16(p), threadIdx.x, kAllConsumers, shared.scratch());
            if (threadIdx.x == 0) leave(counter_of(p, item), item.pieces);
        }
        items.count = task.number;  // not kept in a register meanwhile
        mbarrier_arrive(shared.item_empty(items.stage()));
        items.advance();
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, 1) FUSEDMLA_ENTRY(const __grid_constant__ Params p) {
    const Shared shared;
    if (threadIdx.x == kConsumers) {
        for (int stage = 0; stage < Layout::kStages; ++stage) {
            mbarrier_init(shared.full(stage), 1);
            mbarrier_init(shared.empty(stage), Layout::kReleases);
        }
        for (int i = 0; i < Layout::kItems; ++i) {
            mbarrier_init(shared.item_full(i), 1);
            mbarrier_init(shared.item_empty(i), kConsumers);
        }
        fence_mbarrier_init();
        tma_prefetch(&p.latent);
        if (FORMAT != Format::kSixteenBit) tma_prefetch(&p.rope);
    }
    __syncthreads();
    launch_dependents();
    wait_for_predecessor();
    if (threadIdx.x < kConsumers) {
        raise_registers<kConsumerRegisters>();
        consume(p, shared);
    } else {
        lower_registers<kProducerRegisters>();
        if (threadIdx.x < kConsumers + kWarp) produce(p, shared);
    }
}
