// SPDX-License-Identifier: Apache-2.0
// A multiplying warpgroup of the 64-row kernel: its query, its 256 columns of O from item to item, and the result.
#pragma once

#include "merge.cuh"
#include "twowg_tasks.cuh"
#include "twowg_values.cuh"

__device__ inline unsigned* counter_of(const Params& p, const Item& item) {
    return p.arrivals + item.request * gridDim.x + blockIdx.x;
}

// Of both multipliers' threads.
__device__ inline int multiplier_thread() { return threadIdx.x - kWarpgroup; }

// The first warp hands over further tasks.
__device__ inline void feed_tasks() {
    if (multiplier_thread() >= kWarp || Feeder::has_ended()) return;
    Feeder feeder = Feeder::load();
    feeder.feed();
    feeder.save();
}

__device__ inline void merge(const Params& p, const Item& item) {
    const int row0 = blockIdx.x * kRows, thread = multiplier_thread();
    const int rows_here = max(min(p.s_q * p.h_q - row0, kRows), 0);  // none if a cluster was filled up
    const bool to_fp16 = out_is_fp16(p);
    float* scratch = Shared::scratch();
    if (item.pieces > 4)
        MergeShare<kMultipliers, 1, 8>(p, item, row0, rows_here, thread).run(to_fp16, kMultipliersBarrier, scratch);
    else
        MergeShare<kMultipliers, 4, 2>(p, item, row0, rows_here, thread).run(to_fp16, kMultipliersBarrier, scratch);
}

// What comes after all of the program's own work, by both multipliers.
__device__ inline void merge_split(const Params& p) {
    for (; Tasks::wait() == Step::kMerge; Tasks::done(), feed_tasks()) {
        const Item& item = Tasks::item();
        if (multiplier_thread() == 0) wait_for_pieces(counter_of(p, item), item.pieces);
        named_barrier_sync(kMultipliersBarrier, kMultipliers);
        merge(p, item);
        if (multiplier_thread() == 0) leave(counter_of(p, item), item.pieces);
    }
}

// Both warpgroups run the same instructions, so that those are fetched but once: which half of the columns is a
// thread's is not known to the compiler.
template <typename T>
class Multiplier : Values<T> {
    using Values<T>::kPart, Values<T>::half, Values<T>::receive, Values<T>::release_message;
    using Values<T>::o_, Values<T>::quarters_, Values<T>::message_;

  public:
    __device__ explicit Multiplier(const Params& p) : p_(p) {}

    __device__ void run() {
        Tasks::begin();
        for (bool ready = false;;) {
            feed_tasks();
            if (!ready) {
                if (Tasks::wait() != Step::kAttend) break;
                if constexpr (kE4m3) round_my_rows();
                if (Feeder::is_at_first()) {  // all others are busy with it now: time to work out more
                    ready = true;
                    continue;
                }
            }
            attend();
            Tasks::done();
            ready = false;
        }
    }

  private:
    __device__ void attend() {
#pragma unroll
        for (int i = 0; i < 128; ++i) o_[i / kPart][i % kPart] = 0.f;
        if constexpr (!kTurned) quarters_.advance(kQueryQuarters);
        for (int spans = spans_of(Tasks::item()); spans > 0; --spans) {
            rescale();
            this->add();
            message_.advance();
            quarters_.advance(kParts);
        }
        receive();
        const Item& item = Tasks::item();
        if (item.slot < 0) {
            store(static_cast<uint16_t*>(p_.out) + item.request * rows() * kLatent);
        } else {
            store(p_.partial_out + item.slot * rows() * kLatent);
            named_barrier_sync(kMultipliersBarrier, kMultipliers);
            if (half() == 0 && threadIdx.x % kWarpgroup == 0) publish(counter_of(p_, item), item.pieces);
        }
    }

    // Of the query, for the scorer, who has done with the last one: see round_query.
    __device__ void round_my_rows() {
        const int slot = thread_anew() / (2 * kWarp) % 2;  // of the two quarters this warp's
        const Ring<kQuarterSlots> mine = quarters_.after(slot);
        mbarrier_wait(Shared::quarter_full(mine.at()), mine.phase());
        mbarrier_wait(Shared::rope_full(rope_.at()), rope_.phase());
        if (p_.q_is_fp16)
            round_query<true>(p_, half(), mine.at(), rope_.at());
        else
            round_query<false>(p_, half(), mine.at(), rope_.at());
        fence_proxy_async();
        __syncwarp();
        warp_arrive(Shared::query_full());
        warp_arrive_cluster(Shared::quarter_empty(quarters_.at()));
        warp_arrive_cluster(Shared::quarter_empty(quarters_.after(1).at()));
        quarters_.advance(4);
        rope_.advance((1 + spans_of(Tasks::item())) % (2 * kRopeSlots));
    }

    __device__ static int spans_of(const Item& item) {
        return (item.tile_end - item.tile_begin + kSpan / kTile - 1) / (kSpan / kTile);
    }

    __device__ int64_t rows() const { return p_.s_q * p_.h_q; }
    __device__ static int row0() { return blockIdx.x * kRows; }

    // Brings O to the next message's maxima.
    __device__ void rescale() {
        receive();
        if constexpr (kTurned) {
            const int4 changes = *reinterpret_cast<const int4*>(Shared::changes(message_.at()));
            if ((changes.x | changes.y | changes.z | changes.w) == 0) return;
        }
        scale_by_factors();
    }

    // Times the message's factors, each of a row of P.
    __device__ void scale_by_factors() {
        if constexpr (kTurned) {  // this lane has columns of O^T, two of each eight rows of P
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const float2 factor = factors_of_pair(i);
#pragma unroll
                for (int block = 0; block < 4; ++block)
#pragma unroll
                    for (int j = 0; j < 4; ++j) o_[block][4 * i + j] *= j % 2 ? factor.y : factor.x;
            }
        } else {
            const float2 factor = factors_of_rows();
            if (!__any_sync(~0u, factor.x != 1.f || factor.y != 1.f)) return;
#pragma unroll
            for (int i = 0; i < 128; ++i) o_[i / kPart][i % kPart] *= i / 2 % 2 ? factor.y : factor.x;
        }
    }

    // The message's factors: of rows g and g + 8 of this warp's; of rows 8i + 2j and 8i + 2j + 1.
    __device__ float2 factors_of_rows() const {
        const float* from = Shared::factors(message_.at());
        return {from[0], from[8]};
    }
    __device__ float2 factors_of_pair(int i) const {
        return reinterpret_cast<const float2*>(Shared::all_factors(message_.at()))[i * 4 + thread_anew() % 4];
    }

    // Results times the message's factors, into rows of 512 columns from `to` on. A quad writes 32 or 64 contiguous bytes
    // of a row at a time, and so do the lanes of one j of O^T: a detour through shared memory would cost more, and the
    // next item's tiles already fill it.
    template <typename Out>
    __device__ void store(Out* to) {
        const unsigned thread = thread_anew(), lane = thread % kWarp;
        if constexpr (kTurned) {
            to += half() * 256 + thread / kWarp % 4 * 16 + lane / 4 * 2;
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                asm volatile("" ::: "memory");  // one after the other, as registers are scarce
                const float2 factor = factors_of_pair(i);
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const int row = row0() + i * 8 + lane % 4 * 2 + j, at = i * 4 + j;
                    if (row >= rows()) continue;
#pragma unroll
                    for (int block = 0; block < 4; ++block)
                        store_pair(to + int64_t(row) * kLatent + block * 64, o_[block][at], o_[block][at + 2],
                                   j ? factor.y : factor.x);
                }
            }
        } else {
            constexpr int kRun = sizeof(Out) == 2 ? 8 : 2;  // columns that a lane writes together
            const float2 factor = factors_of_rows();
            const int row = row0() + threadIdx.x % kWarpgroup / kWarp * 16 + lane / 4;
            to += row * kLatent + half() * 256 + lane % 4 * kRun;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float scale = half ? factor.y : factor.x;
                const bool live = row + 8 * half < rows();
#pragma unroll
                for (int i = 0; i < 32; i += 4) {
                    const float* pairs = o_[i / 16] + i % 16 * 4 + 2 * half;
                    store_columns(to + 8 * half * kLatent + 8 * i, pairs, scale, live);
                }
            }
        }
        release_message();
        message_.advance();
    }

    // A quad's 32 columns of a row, of which a lane has two in every eight. 16-bit ones are exchanged, so that a lane
    // writes 16 bytes at a time.
    __device__ void store_columns(uint16_t* to, const float* pairs, float scale, bool live) const {
        uint32_t w[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) w[i] = pack_16bit(pairs[4 * i] * scale, pairs[4 * i + 1] * scale, out_is_fp16(p_));
        transpose_quad(w[0], w[1], w[2], w[3]);
        if (live) *reinterpret_cast<uint4*>(to) = {w[0], w[1], w[2], w[3]};
    }
    __device__ void store_columns(float* to, const float* pairs, float scale, bool live) const {
#pragma unroll
        for (int i = 0; i < 4; ++i)  // eight bytes a lane are whole sectors, too
            if (live) store_pair(to + 8 * i, pairs[4 * i], pairs[4 * i + 1], scale);
    }

    __device__ void store_pair(uint16_t* to, float x, float y, float scale) const {
        *reinterpret_cast<uint32_t*>(to) = pack_16bit(x * scale, y * scale, out_is_fp16(p_));
    }
    __device__ void store_pair(float* to, float x, float y, float scale) const {
        __stcg(reinterpret_cast<float2*>(to), float2{x * scale, y * scale});
    }

    const Params& p_;
    Ring<kRopeSlots> rope_;  // of the next query; the scorer follows the others
};
