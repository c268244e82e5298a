// SPDX-License-Identifier: Apache-2.0
// O += P V of the 64-row kernel: what a span's weights add to the 256 columns that a multiplying warpgroup has.
#pragma once

#include "twowg_e4m3.cuh"
#include "twowg_wgmma.cuh"
#include "widen.cuh"

template <typename T>
class Values {
  protected:
    __device__ Values() {
        if (kParts == 4 && half() == 1) quarters_.advance(2);
    }

    // The message that comes next, of a span; or the weights in a slot, which the multipliers have made themselves, and
    // `more` of the item's tiles follow.
    __device__ void add(int weights = 0, bool more = false) {
        if constexpr (kE4m3)
            multiply_e4m3();
        else if constexpr (kWidens)
            multiply_widened(kMultipliersWeigh ? weights : message_.at(), more);
        else
            multiply();
    }

    __device__ static int half() { return int(thread_anew() / kWarpgroup) - 1; }

    __device__ void receive() const { mbarrier_wait(Shared::message_full(message_.at()), message_.phase()); }

    __device__ void release_message() {
        __syncwarp();
        warp_arrive(Shared::message_empty(message_.at()));
    }

    // The tile after the next message's.
    __device__ void let_score() const { warp_arrive(Shared::may_score(message_.phase() ^ 1)); }

    static constexpr int kPart = kTurned ? 64 / 2 : 128 / 2;  // registers of O for the columns of one instruction

    float o_[128 / kPart][kPart];
    Ring<kQuarterSlots> quarters_;
    Ring<kMessageSlots> message_;

  private:
    __device__ void wait_until_held_may_go() const {
        mbarrier_wait(Shared::go(message_.at()), message_.phase() ^ message_.at());
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
    __device__ void multiply_widened(int slot, bool more) {
        using Mma = Wgmma<fp16, kRows>;
        constexpr int kAhead = kScaled ? 1 : 2, kBatches = 8;  // of the quarter, of its blocks of 64 columns, of the tile's halves
        const uint32_t weights = in_uniform_register(units_of(smem_address(Shared::weight_rows(slot))));
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
        if (kAhead > 1) load(1);
#pragma unroll
        for (int block = 0; block < 4; ++block) keep_in_order(o_[block]);
#pragma unroll
        for (int batch = 0; batch < kBatches; ++batch) {
            if (batch == (half() == 0 ? FUSEDMLA_EARLY_A : FUSEDMLA_EARLY_B)) wait_until_held_may_go();
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
            if (kMultipliersWeigh && batch == FUSEDMLA_NEXT_SCORES && more) let_score();
            if (batch + kAhead < kBatches) load(batch + kAhead);  // after the products: ptxas waits for it as early as it can
            wgmma_wait<kInFlight>();
        }
        wgmma_wait<0>();
#pragma unroll
        for (int block = 0; block < 4; ++block) keep_in_order(o_[block]);
        if (!kMultipliersWeigh) release_message();
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
};
