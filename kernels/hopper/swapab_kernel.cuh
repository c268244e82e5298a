// SPDX-License-Identifier: Apache-2.0
// The kernel for paged requests: roles of the warps, and merging split requests.
// Included by a kernel after it has defined FORMAT, Element, N and Layout.
#pragma once

#include "swapab_copy.cuh"

#include "swapab_attend.cuh"

namespace {

__device__ inline unsigned* counter_of(const Params& p, const Item& item) {
    return p.arrivals + item.request * gridDim.x + blockIdx.x;
}

// The request whose query a program is likely to need first, -1 if that cannot be told without the lengths.
__device__ inline int likely_request(const Params& p) {
    if (p.schedule.batch_invariant || p.schedule.b > p.schedule.programs) return -1;
    const int request = divide(blockIdx.y, divide(p.schedule.programs, p.schedule.b));
    return request < p.schedule.b ? request : -1;
}

__device__ void merge(const Params& p, const Shared& shared, const Item& item) {
    static_assert(kScratchOfMerge<kTwo> <= Layout::kQueryBytes);
    if (thread_anew() >= kTwo) return;
    const int row0 = first_row_of_block();
    merge_share<AsHeld, kTwo>(p, item, row0, min(p.s_q * p.h_q - row0, N), threadIdx.x, out_is_fp16(p), kFirstTwo,
                              shared.scratch(), [&] {
                                  if (threadIdx.x == 0) wait_for_pieces(counter_of(p, item), item.pieces);
                                  named_barrier_sync(kFirstTwo, kTwo);
                              });
}

__device__ void consume(const Params& p, const Shared& shared) {
    Ring<Layout::kItems> items;
    Ring<Layout::kStages> stages;
    int wanted = likely_request(p), loaded = -1;  // whose query
    while (true) {
        if (wanted != loaded) {
            load_query(p, shared, wanted);
            loaded = wanted;
        }
        mbarrier_wait(shared.item_full(items.stage()), items.phase());
        const Task& task = *shared.item(items.stage());  // stays there: registers are scarce
        if (task.step == Step::kEnd) break;
        const Item& item = task.item;
        if (task.step == Step::kAttend) {
            wanted = item.request;
            if (wanted != loaded) continue;
            named_barrier_sync(kAllConsumers, kConsumers);  // all of it is there
            attend(p, shared, stages, item);
            wanted = loaded = -1;
            if (item.slot >= 0 && threadIdx.x == 0) publish(counter_of(p, item), item.pieces);
        } else {
            merge(p, shared, item);
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
    if (threadIdx.x == 0) {  // the copying warp has more to do before it needs them
        for (int stage = 0; stage < Layout::kStages; ++stage) {
            mbarrier_init(shared.full(stage), 1);
            mbarrier_init(shared.empty(stage), Layout::kReleases);
        }
        for (int i = 0; i < Layout::kItems; ++i) {
            mbarrier_init(shared.item_full(i), 1);
            mbarrier_init(shared.item_empty(i), kConsumers);
        }
        fence_mbarrier_init();
    }
    launch_dependents();
    wait_for_predecessor();
    if (threadIdx.x < kConsumers) {
        __syncwarp();
        named_barrier_arrive(kReady, kConsumers + kWarp);
        raise_registers<Layout::kConsumerRegisters>();
        named_barrier_sync(kAllConsumers, kConsumers);  // barriers are there
        consume(p, shared);
    } else {
        lower_registers<Layout::kProducerRegisters>();
        if (threadIdx.x < kConsumers + kWarp) produce(p, shared);
    }
}
