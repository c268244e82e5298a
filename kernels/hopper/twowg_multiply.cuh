// SPDX-License-Identifier: Apache-2.0
// A multiplying warpgroup of the 64-row kernel: 256 columns of O += P V, and the result.
#pragma once

#include "twowg_tasks.cuh"
#include "twowg_wgmma.cuh"

__device__ inline unsigned* counter_of(const Params& p, const Item& item) {
    return p.arrivals + item.request * gridDim.x + blockIdx.x;
}

// Of both multipliers' threads.
__device__ inline int multiplier_thread() { return threadIdx.x - kWarpgroup; }

// Waits for the next task. The first warp has one more worked out on the way.
__device__ inline Step next_task(const Ring<kTaskSlots>& tasks) {
    if (multiplier_thread() < kWarp) {
        Feeder feeder = Feeder::load();
        feeder.feed();
        feeder.save();
    }
    mbarrier_wait(Shared::task_full(tasks.at()), tasks.phase());
    return Shared::task(tasks.at()).step;
}

__device__ inline void task_done(Ring<kTaskSlots>& tasks) {
    __syncwarp();
    warp_arrive(Shared::task_empty(tasks.at()));
    tasks.advance();
}

// What comes after all of the program's own work, by both multipliers.
template <typename Element>
__device__ inline void merge_split(const Params& p, Ring<kTaskSlots>& tasks) {
    for (; next_task(tasks) == Step::kMerge; task_done(tasks)) {
        const Item& item = Shared::task(tasks.at()).item;
        const int row0 = blockIdx.x * kRows, thread = multiplier_thread();
        if (thread == 0) wait_for_pieces(counter_of(p, item), item.pieces);
        named_barrier_sync(kMultipliersBarrier, kMultipliers);
        const int rows_here = max(min(p.s_q * p.h_q - row0, kRows), 0);  // none if a cluster was filled up
        merge_share<kMultipliers>(p, item, row0, rows_here, kIsFp16<Element>, thread, kMultipliersBarrier,
                                  Shared::scratch());
        if (thread == 0) leave(counter_of(p, item), item.pieces);
    }
}

template <typename Element, int HALF>
class Multiplier {
  public:
    __device__ explicit Multiplier(const Params& p) : p_(p) {
        if (HALF == 1) quarters_.advance(2);
    }

    __device__ void run(Ring<kTaskSlots>& tasks) {
        for (; next_task(tasks) == Step::kAttend; task_done(tasks)) attend(tasks);
    }

  private:
    __device__ void attend(const Ring<kTaskSlots>& tasks) {
#pragma unroll
        for (int i = 0; i < 128; ++i) o_[i / 64][i % 64] = 0.f;
        for (int tiles = tiles_of(Shared::task(tasks.at()).item); tiles > 0; --tiles) multiply();
        const float2 norm = receive();
        release_message();
        message_.advance();
        const Item& item = Shared::task(tasks.at()).item;
        if (item.slot < 0) {
            store(static_cast<Element*>(p_.out) + item.request * rows() * kLatent, norm);
        } else {
            store(p_.partial_out + item.slot * rows() * kLatent, norm);
            named_barrier_sync(kMultipliersBarrier, kMultipliers);
            if (HALF == 0 && threadIdx.x % kWarpgroup == 0) publish(counter_of(p_, item), item.pieces);
        }
    }

    __device__ static int tiles_of(const Item& item) { return item.tile_end - item.tile_begin; }

    static constexpr int kEarly = HALF == 0 ? FUSEDMLA_EARLY_A : FUSEDMLA_EARLY_B;

    __device__ int64_t rows() const { return p_.s_q * p_.h_q; }
    __device__ static int row0() { return blockIdx.x * kRows; }
    __device__ static int local_row() { return threadIdx.x % kWarpgroup / kWarp * 16 + threadIdx.x % kWarp / 4; }

    // The next message's factors of this lane's two rows.
    __device__ float2 receive() const {
        mbarrier_wait(Shared::message_full(message_.at()), message_.phase());
        const float* from = Shared::factors(message_.at());
        return {from[0], from[8]};
    }

    __device__ void release_message() {
        __syncwarp();
        warp_arrive(Shared::message_empty(message_.at()));
    }

    __device__ void multiply() {
        const float2 factor = receive();
        if (__any_sync(~0u, factor.x != 1.f || factor.y != 1.f)) {
#pragma unroll
            for (int i = 0; i < 128; ++i) o_[i / 64][i % 64] *= i / 2 % 2 ? factor.y : factor.x;
        }
        const Ring<kQuarterSlots> right = quarters_.after(1);
        mbarrier_wait(Shared::quarter_full(quarters_.at()), quarters_.phase());  // long complete
        mbarrier_wait(Shared::quarter_full(right.at()), right.phase());
        const uint32_t v[2] = {units_of(Shared::quarter(quarters_.at())), units_of(Shared::quarter(right.at()))};
#pragma unroll
        for (int step = 0; step < 4; ++step) {
            const uint4 next = Shared::weights(message_.at(), step);
            const uint32_t weights[4] = {next.x, next.y, next.z, next.w};
            if (step == kEarly) mbarrier_wait(Shared::go(message_.at()), message_.phase() ^ message_.at());
            keep_in_order(o_[0]);
            keep_in_order(o_[1]);
            wgmma_fence();
#pragma unroll
            for (int part = 0; part < 2; ++part)
                wgmma_128(o_[part], weights,
                          descriptor<kGroupBytes, kAtomBytes>(v[part] + step * (2 * kGroupBytes >> 4)), Element{});
            wgmma_commit();
            if (step == 3) release_message();
            wgmma_wait<0>();  // there are registers for the weights of only one step
            keep_in_order(o_[0]);
            keep_in_order(o_[1]);
        }
        message_.advance();
        warp_arrive_cluster(Shared::quarter_empty(quarters_.at()));
        warp_arrive_cluster(Shared::quarter_empty(right.at()));
        quarters_.advance(4);
    }

    // Rows of 512 columns from `to` on. A quad writes 16 or 32 contiguous bytes of a row at a time, of which L2 makes
    // whole sectors: a detour through shared memory would cost more, and the next item's tiles already fill it.
    template <typename Out>
    __device__ void store(Out* to, float2 norm) const {
        const int row = row0() + local_row();
        to += row * kLatent + HALF * 256 + threadIdx.x % 4 * 2;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (row + 8 * half >= rows()) break;
            const float scale = half ? norm.y : norm.x;
#pragma unroll
            for (int i = 0; i < 32; ++i) {
                const float* pair = o_[i / 16] + i % 16 * 4 + 2 * half;
                const float x = pair[0] * scale, y = pair[1] * scale;
                Out* at = to + 8 * half * kLatent + 8 * i;
                if constexpr (sizeof(Out) == 2)
                    *reinterpret_cast<uint32_t*>(at) = pack_16bit(x, y, kIsFp16<Element>);
                else
                    __stcg(reinterpret_cast<float2*>(at), make_float2(x, y));
            }
        }
    }

    const Params& p_;
    float o_[2][64];
    Ring<kQuarterSlots> quarters_;
    Ring<kMessageSlots> message_;
};
