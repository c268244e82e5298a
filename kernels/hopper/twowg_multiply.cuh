// SPDX-License-Identifier: Apache-2.0
// A multiplying warpgroup of the 64-row kernel: 256 columns of O += P V, and the result.
#pragma once

#include "query_8bit.cuh"
#include "twowg_e4m3.cuh"
#include "twowg_tasks.cuh"
#include "twowg_wgmma.cuh"
#include "widen.cuh"

__device__ inline unsigned* counter_of(const Params& p, const Item& item) {
    return p.arrivals + item.request * gridDim.x + blockIdx.x;
}

// Of both multipliers' threads.
__device__ inline int multiplier_thread() { return threadIdx.x - kWarpgroup; }

// The first warp hands over further tasks.
__device__ inline void feed_tasks() {
    if (multiplier_thread() >= kWarp) return;
    Feeder feeder = Feeder::load();
    feeder.feed();
    feeder.save();
}

// What comes after all of the program's own work, by both multipliers.
__device__ inline void merge_split(const Params& p) {
    for (; Tasks::wait() == Step::kMerge; Tasks::done(), feed_tasks()) {
        const Item& item = Tasks::item();
        const int row0 = blockIdx.x * kRows, thread = multiplier_thread();
        if (thread == 0) wait_for_pieces(counter_of(p, item), item.pieces);
        named_barrier_sync(kMultipliersBarrier, kMultipliers);
        const int rows_here = max(min(p.s_q * p.h_q - row0, kRows), 0);  // none if a cluster was filled up
        merge_share<kMultipliers>(p, item, row0, rows_here, out_is_fp16(p), thread, kMultipliersBarrier,
                                  Shared::scratch());
        if (thread == 0) leave(counter_of(p, item), item.pieces);
    }
}

// Both warpgroups run the same instructions, so that those are fetched but once: which half of the columns is a
// thread's is not known to the compiler.
template <typename T>
class Multiplier {
  public:
    __device__ explicit Multiplier(const Params& p) : p_(p) {
        if (kParts == 4 && half() == 1) quarters_.advance(2);
    }

    __device__ void run() {
        Tasks::begin();
        for (bool ready = false;;) {
            feed_tasks();
            if (!ready) {
                if (Tasks::wait() != Step::kAttend) break;
                if constexpr (kTurned) load_query();
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
    __device__ static int half() { return int(thread_anew() / kWarpgroup) - 1; }

    __device__ void attend() {
#pragma unroll
        for (int i = 0; i < 128; ++i) o_[i / kPart][i % kPart] = 0.f;
        for (int spans = spans_of(Tasks::item()); spans > 0; --spans) {
            rescale();
            if constexpr (kE4m3)
                multiply_e4m3();
            else if constexpr (kWidens)
                multiply_widened();
            else
                multiply();
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

    // For the scorer, who has done with the last one. Widened tiles: see load_query_8bit; e4m3: see round_query.
    __device__ void load_query() {
        if constexpr (kWidens) {
            load_query_8bit<kRows, kScaled>(p_, shared_memory + kQueryAt, Shared::row_scales(), p_.scale_log2 * k_scale_of(p_),
                                          Tasks::item().request, row0(), multiplier_thread() / kWarp);
            fence_proxy_async();
            __syncwarp();
            warp_arrive(Shared::query_full());
        } else {
            round_my_rows();
        }
    }
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

    __device__ void receive() const { mbarrier_wait(Shared::message_full(message_.at()), message_.phase()); }

    __device__ void wait_until_held_may_go() const {
        mbarrier_wait(Shared::go(message_.at()), message_.phase() ^ message_.at());
    }

    __device__ void release_message() {
        __syncwarp();
        warp_arrive(Shared::message_empty(message_.at()));
    }

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

    __device__ void multiply() {
        const Ring<kQuarterSlots> right = quarters_.after(1);
        mbarrier_wait(Shared::quarter_full(quarters_.at()), quarters_.phase());  // long complete
        mbarrier_wait(Shared::quarter_full(right.at()), right.phase());
        if (kFencesAfterCopies) fence_proxy_async();
        const uint32_t v[2] = {units_of(Shared::quarter(quarters_.at())), units_of(Shared::quarter(right.at()))};
#pragma unroll
        for (int step = 0; step < 4; ++step) {
            const uint4 next = Shared::weights(message_.at(), step);
            const uint32_t weights[4] = {next.x, next.y, next.z, next.w};
            if (step == (half() == 0 ? FUSEDMLA_EARLY_A : FUSEDMLA_EARLY_B))
                wait_until_held_may_go();
            keep_in_order(o_[0]);
            keep_in_order(o_[1]);
            wgmma_fence();
#pragma unroll
            for (int part = 0; part < 2; ++part)
                wgmma_128(o_[part], weights,
                          descriptor<kGroupBytes, kAtomBytes>(v[part] + step * (2 * kGroupBytes >> 4)), T{});
            wgmma_commit();
            if (step == 3) release_message();
            wgmma_wait<0>();  // there are registers for the weights of only one step
            keep_in_order(o_[0]);
            keep_in_order(o_[1]);
        }
        warp_arrive_cluster(Shared::quarter_empty(quarters_.at()));
        warp_arrive_cluster(Shared::quarter_empty(right.at()));
    }

    // O^T += V^T P^T. Transposed as pairs of bytes, V comes as columns 2g and 2g + 1 of tokens 2j and 2j + 1; two such
    // words make four tokens of one column: 2j, 2j + 1, 2j + 8, 2j + 9, which is how the scorer has laid out a row of P.
    // Sums go into fresh accumulators first, 64 columns x 32 rows at a time: see twowg_e4m3.cuh.
    __device__ void multiply_e4m3() {
        const uint32_t weights = units_of(smem_address(Shared::weight_rows(message_.at())));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const Ring<kQuarterSlots> slot = quarters_.after(i);
            mbarrier_wait(Shared::quarter_full(slot.at()), slot.phase());  // long complete
#pragma unroll
            for (int part = 0; part < 2; ++part) {
                const unsigned thread = thread_anew(), lane = thread % kWarp, warp = thread / kWarp % 4;
                const uint32_t values = Shared::quarter(slot.at()) + lane * 128 + ((part * 4 + warp ^ (lane & 7)) << 4);
                uint32_t a[4][4];
#pragma unroll
                for (int step = 0; step < 4; ++step) ldmatrix_x4_trans(a[step], values + step * 32 * 128);
#pragma unroll
                for (int step = 0; step < 4; ++step) regroup(a[step]);
#pragma unroll
                for (int half = 0; half < 2; ++half) {  // of the rows of P
                    float sum[16];
                    keep_in_order(sum);
                    wgmma_fence();
#pragma unroll
                    for (int step = 0; step < 4; ++step)
                        wgmma_e4m3_32(sum, a[step], descriptor<kAtomBytes>(weights + half * (kBlockBytes >> 5) + step * 2),
                                      step > 0);
                    wgmma_commit();
                    wgmma_wait<0>();
                    keep_in_order(sum);
                    float(&o)[kPart] = o_[2 * i + part];
#pragma unroll
                    for (int j = 0; j < 16; ++j) o[half * 16 + j] += sum[j];
                    keep_in_order(o);
                }
            }
            warp_arrive_cluster(Shared::quarter_empty(slot.at()));
        }
        release_message();
    }

    // O^T += V^T P^T with V widened to fp16, 64 columns x 32 tokens at a time; one such part is widened while the last is
    // multiplied. Bytes are transposed as pairs of columns: see widen_columns.
    __device__ void multiply_widened() {
        using Mma = Wgmma<fp16, kRows>;
        constexpr int kBatches = 8;  // of the quarter, of its blocks of 64 columns, of the tile's halves
        const uint32_t weights = units_of(smem_address(Shared::weight_rows(message_.at())));
        const Ring<kQuarterSlots> right = quarters_.after(kScaled ? 0 : 1);
        mbarrier_wait(Shared::quarter_full(quarters_.at()), quarters_.phase());  // long complete
        if (!kScaled) mbarrier_wait(Shared::quarter_full(right.at()), right.phase());
        uint32_t raw[2][4], a[kInFlight + 1][2][4];
        const unsigned thread = thread_anew(), lane = thread % kWarp, warp = thread / kWarp % 4;
        const uint32_t unit[2] = {(warp ^ (lane & 7)) << 4, (4 + warp ^ (lane & 7)) << 4};
        const uint32_t left_at = Shared::quarter(quarters_.at()), right_at = Shared::quarter(right.at());
        const auto load = [&](int batch) {
            const int part = batch / 2 % 2, token = batch % 2 * 32 + lane;
            ldmatrix_x4_trans(raw[batch % 2],
                              kScaled ? left_at + token * kRowBytes + (half() * 16 + batch / 4 * 8 + part * 4 + warp) * 16
                                      : (batch < 4 ? left_at : right_at) + token * 128 + unit[part]);
        };
        const uint32_t* ratios = reinterpret_cast<const uint32_t*>(Shared::ratios(message_.at())) + half() * kTile + lane % 4;
        load(0);
#pragma unroll
        for (int block = 0; block < 4; ++block) keep_in_order(o_[block]);
#pragma unroll
        for (int batch = 0; batch < kBatches; ++batch) {
            if (batch == (half() == 0 ? FUSEDMLA_EARLY_A : FUSEDMLA_EARLY_B)) wait_until_held_may_go();
            if (batch + 1 < kBatches) load(batch + 1);
            const uint32_t(&codes)[4] = raw[batch % 2];
#pragma unroll
            for (int i = 0; i < 4; ++i) widen_columns(codes[i], a[batch % (kInFlight + 1)][i / 2][i % 2 * 2], a[batch % (kInFlight + 1)][i / 2][i % 2 * 2 + 1]);
            if constexpr (kScaled) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const uint32_t ratio = ratios[batch / 4 * (kTile / 2) + batch % 2 * 16 + i * 4];
#pragma unroll
                    for (int parity = 0; parity < 2; ++parity) {
                        __half2& pair = reinterpret_cast<__half2&>(a[batch % (kInFlight + 1)][i / 2][i % 2 * 2 + parity]);
                        pair = __hmul2(pair, reinterpret_cast<const __half2&>(ratio));
                    }
                }
            }
            wgmma_fence();
#pragma unroll
            for (int step = 0; step < 2; ++step)
                Mma::registers(o_[batch / 2], a[batch % (kInFlight + 1)][step],
                               descriptor<kAtomBytes>(weights + (batch % 2 * 2 + step) * 2), true);
            wgmma_commit();
            wgmma_wait<kInFlight>();
        }
        wgmma_wait<0>();
#pragma unroll
        for (int block = 0; block < 4; ++block) keep_in_order(o_[block]);
        release_message();
        warp_arrive_cluster(Shared::quarter_empty(quarters_.at()));
        if (!kScaled) warp_arrive_cluster(Shared::quarter_empty(right.at()));
    }

    // From two columns of two tokens to one column of four, of 16 tokens and of 16 more.
    __device__ static void regroup(uint32_t (&a)[4]) {
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            const uint32_t even = __byte_perm(a[i], a[i + 1], 0x6420);
            a[i + 1] = __byte_perm(a[i], a[i + 1], 0x7531);
            a[i] = even;
        }
    }

    // Results times the message's factors, into rows of 512 columns from `to` on. A quad, or with e4m3 the lanes of one
    // j, write 16 or 32 contiguous bytes of a row at a time, of which L2 makes whole sectors: a detour through shared
    // memory would cost more, and the next item's tiles already fill it.
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
            const float2 factor = factors_of_rows();
            const int row = row0() + threadIdx.x % kWarpgroup / kWarp * 16 + lane / 4;
            to += row * kLatent + half() * 256 + lane % 4 * 2;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                if (row + 8 * half >= rows()) break;
#pragma unroll
                for (int i = 0; i < 32; ++i) {
                    const float* pair = o_[i / 16] + i % 16 * 4 + 2 * half;
                    store_pair(to + 8 * half * kLatent + 8 * i, pair[0], pair[1], half ? factor.y : factor.x);
                }
            }
        }
        release_message();
        message_.advance();
    }
    __device__ void store_pair(uint16_t* to, float x, float y, float scale) const {
        *reinterpret_cast<uint32_t*>(to) = pack_16bit(x * scale, y * scale, out_is_fp16(p_));
    }
    __device__ void store_pair(float* to, float x, float y, float scale) const {
        __stcg(reinterpret_cast<float2*>(to), float2{x * scale, y * scale});
    }

    static constexpr int kPart = kTurned ? 64 / 2 : 128 / 2;  // registers of O for the columns of one instruction

    const Params& p_;
    float o_[128 / kPart][kPart];
    Ring<kQuarterSlots> quarters_;
    Ring<kRopeSlots> rope_;  // of the next query; the scorer follows the others
    Ring<kMessageSlots> message_;
};
