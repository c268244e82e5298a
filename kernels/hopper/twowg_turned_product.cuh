// SPDX-License-Identifier: Apache-2.0
// S^T = K Q^T of the 64-row kernel where 8-bit caches are widened.
#pragma once

#include "twowg_plan.cuh"
#include "widen.cuh"
#include "wgmma.cuh"

class TurnedProduct {
  protected:
    __device__ explicit TurnedProduct(const Params& p) : p_(p) {}

    static constexpr int kColumns = 16;  // query rows of a lane

    // Of the lane's query rows; and where its scores of a row are, of the first token: the second's are 2 further.
    __device__ static int row_of(int c) { return c / 2 * 8 + c % 2 + thread_anew() % 4 * 2; }
    static constexpr __device__ int at(int c) { return c / 2 * 4 + c % 2; }

    // Scores of the next tile of an fp8 cache, unscaled. 64 columns at a time; one part is widened while the last is
    // multiplied.
    __device__ void score(float (&s)[32]) {
        using Mma = Wgmma<fp16, kRows>;
        constexpr int kLatentParts = 8, kAllParts = 9;
        const unsigned thread = thread_anew(), lane = thread % kWarp, token = thread / kWarp % 4 * 16 + lane % 16;
        const uint32_t unit = (lane / 16 ^ (token & 7)) << 4, query = units_of(Shared::query());
        uint32_t raw[2][4], a[kInFlight + 1][2][2][4];
        bool there = false;  // the next quarter, or the rope part
        const auto look = [&](int part) {
            if (part < kLatentParts && part % 2 == 0) there = mbarrier_test(Shared::quarter_full(quarters_.at()), quarters_.phase());
            if (part == kLatentParts) there = mbarrier_test(Shared::rope_full(rope_.at()), rope_.phase());
        };
        const auto load = [&](int part) {
            if (part < kLatentParts && part % 2 == 0 && !there) mbarrier_wait(Shared::quarter_full(quarters_.at()), quarters_.phase());
            if (part == kLatentParts && !there) mbarrier_wait(Shared::rope_full(rope_.at()), rope_.phase());
#pragma unroll
            for (int i = 0; i < 2; ++i)
                ldmatrix_x4(raw[i], part < kLatentParts
                                        ? Shared::quarter(quarters_.at()) + token * 128 + (unit ^ (part % 2 * 2 + i) << 5)
                                        : Shared::rope(rope_.at()) + token * kRope + ((i * 2 + lane / 16 ^ (token >> 1 & 3)) << 4));
            if (part < kLatentParts && part % 2 == 1) quarters_.advance();
        };
        load(0);
        keep_in_order(s);
#pragma unroll
        for (int part = 0; part < kAllParts; ++part) {
#pragma unroll
            for (int i = 0; i < 2; ++i) widen_steps(raw[i], a[part % (kInFlight + 1)][i]);
            if (part + 1 < kAllParts) load(part + 1);
            look(part + 2);
            wgmma_fence();
#pragma unroll
            for (int step = 0; step < 4; ++step)
                Mma::registers(s, a[part % (kInFlight + 1)][step / 2][step % 2],
                               descriptor<kAtomBytes>(query + part * (kBlockBytes >> 4) + step * 2), part + step > 0);
            wgmma_commit();
            wgmma_wait<kInFlight>();
        }
        wgmma_wait<0>();
        keep_in_order(s);
        warp_arrive_cluster(Shared::rope_empty(rope_.at()));
        rope_.advance();
    }

    // Those of an fp8_ds_mla tile in base 2, as differences from the rows' references: each 128 columns have a scale, and rope
    // parts are bf16. The weights of a token take on the largest of its scales, the multipliers know its other scales as
    // ratios to that.
    __device__ void score_scaled(float (&sum)[32], int tokens) {
        using Mma = Wgmma<fp16, kRows>;
        const unsigned thread = thread_anew(), lane = thread % kWarp, warp = thread / kWarp % 4;
        const uint32_t query = units_of(Shared::query());
        mbarrier_wait(Shared::quarter_full(quarters_.at()), quarters_.phase());
        if (!kGather && tokens < kTile) {  // scales, too, may be anything
            clear_rows_from(quarters_.after(1), tokens);
            named_barrier_sync(kScorerBarrier, kWarpgroup);
        }
        const uint32_t tile = Shared::quarter(quarters_.at()) + (warp * 16 + lane % 16) * kRowBytes + lane / 16 * 16;
        float s[32];
#pragma unroll
        for (int group = 0; group < 4; ++group) {
            uint32_t raw[2][4], a[2][2][4];
            ldmatrix_x4(raw[0], tile + group * 128);
            keep_in_order(s);
#pragma unroll
            for (int part = 0; part < 4; ++part) {
                if (part + 1 < 4) ldmatrix_x4(raw[(part + 1) % 2], tile + group * 128 + (part + 1) * 32);
                widen_steps(raw[part % 2], a[part % 2]);
                wgmma_fence();
#pragma unroll
                for (int step = 0; step < 2; ++step)
                    Mma::registers(s, a[part % 2][step],
                                   descriptor<kAtomBytes>(query + (group * 2 + part / 2) * (kBlockBytes >> 4) + (part % 2 * 2 + step) * 2),
                                   part + step > 0);
                wgmma_commit();
                if (part < 3) wgmma_wait<1>();
            }
            const float scale[2] = {scale_of(0, group), scale_of(1, group)};
            wgmma_wait<0>();
            keep_in_order(s);
#pragma unroll
            for (int i = 0; i < 32; ++i) sum[i] = group == 0 ? s[i] * scale[i / 2 % 2] : fmaf(s[i], scale[i / 2 % 2], sum[i]);
        }
        uint32_t a[4][4];
#pragma unroll
        for (int step = 0; step < 4; ++step) ldmatrix_x4(a[step], tile + kRopeOfRowAt + step * 32);
        keep_in_order(s);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < 4; ++step)
            Wgmma<bf16, kRows>::registers(s, a[step], descriptor<kAtomBytes>(query + 8 * (kBlockBytes >> 4) + step * 2), step > 0);
        wgmma_commit();
        float most[2];
#pragma unroll
        for (int token = 0; token < 2; ++token) {
            const float4 of = *reinterpret_cast<const float4*>(scales_of(token));
            most[token] = log2_approx(fmaxf(fmaxf(of.x, of.y), fmaxf(of.z, of.w)));
            log2_scale_[token] = most[token] = fmaxf(most[token], -60.f);  // finite even if all scales are 0
        }
        wgmma_wait<0>();
        keep_in_order(s);
        quarters_.advance();
#pragma unroll
        for (int c = 0; c < kColumns; c += 2) {
            const float2 scale = of_pair(Shared::row_scales(), c), top = of_pair(Shared::references(), c);
#pragma unroll
            for (int token = 0; token < 2; ++token) {
                float(&x) = sum[at(c) + 2 * token], (&y) = sum[at(c + 1) + 2 * token];
                x = fmaf(x, scale.x, fmaf(s[at(c) + 2 * token], p_.scale_log2, most[token] - top.x));
                y = fmaf(y, scale.y, fmaf(s[at(c + 1) + 2 * token], p_.scale_log2, most[token] - top.y));
            }
        }
    }

    // Of two neighbouring rows of the query.
    __device__ static float2 of_pair(const float* values, int c) {
        return *reinterpret_cast<const float2*>(values + row_of(c));
    }
    // Of the lane's tokens in the tile that comes next, or the one before.
    __device__ const uint8_t* scales_of(int token, int slot) const {
        const unsigned thread = thread_anew();
        return shared_memory + slot * kQuarterBytes + (thread / kWarp % 4 * 16 + thread % kWarp / 4 + token * 8) * kRowBytes + kScalesAt;
    }
    __device__ const uint8_t* scales_of(int token) const { return scales_of(token, quarters_.at()); }
    __device__ float scale_of(int token, int group) const { return reinterpret_cast<const float*>(scales_of(token))[group]; }

    const Params& p_;
    float log2_scale_[2];  // of the lane's tokens' largest scales
    Ring<kQuarterSlots> quarters_;
    Ring<kRopeSlots> rope_;
};
