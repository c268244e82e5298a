// SPDX-License-Identifier: Apache-2.0
// The scoring warpgroup of the 64-row kernel for fp8_ds_mla caches: S^T = K Q^T, so that K, too, comes from registers, and
// the softmax.
//
// A warp has 16 tokens of S^T; its lane 4g + j holds tokens g and g + 8, rows 8i + 2j and 8i + 2j + 1. Maxima are over
// all tokens, so over warps. They are worked out only for a tile in which some score exceeds a row's reference by more
// than FUSEDMLA_LAZY, or has none yet; otherwise the reference stays, and one vote is all that the warps have to agree on.
#pragma once

#include "twowg_join.cuh"
#include "twowg_query_8bit.cuh"
#include "twowg_tasks.cuh"
#include "twowg_turned_product.cuh"

static_assert(!kScaled || kMostJoined == 1);

class TurnedScorer : TurnedProduct {
  public:
    __device__ explicit TurnedScorer(const Params& p) : TurnedProduct(p) {}

    __device__ void run() {
        Tasks::for_items([&](const Item&) { attend(); });
    }

  private:
    __device__ void attend() {
        mbarrier_wait(Shared::query_full(), queries_++ & 1);
        if (!kMultipliersLoad) widen_query(p_);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) total_[c] = 0.f;
        if (thread_anew() < kRows) Shared::references()[thread_anew()] = 0.f;
        named_barrier_sync(kScorerBarrier, kWarpgroup);
        unset_ = (1 << kColumns) - 1;
        int left = Tasks::item().seq_len - Tasks::item().tile_begin * kTile;  // tokens of the request
        const int after = max(Tasks::item().seq_len - Tasks::item().tile_end * kTile, 0);  // that are not of the item
        for (; left > after; left -= kTile) {
            const bool cut = is_cut(p_, left - after, left);  // before the scores, which take longer
            float s[32];
            score_scaled(s, left - after);
            release_held();
            weigh(s, cut, left - after, left);
        }
        release_held();
        warp_arrive(Shared::query_empty());
        finish(Tasks::item());
    }

    // Masks and weighs the scores of a tile and sends P. The item has `tokens` more tokens, the request `left`.
    __device__ void weigh(float (&s)[32], bool cut, int tokens, int left) {
        if constexpr (kGather)
            mask_invalid(s);
        else if (cut)
            mask(s, tokens, left);
        float mosts[4] = {s[0], s[1], s[2], s[3]};
#pragma unroll
        for (int i = 4; i < 32; ++i) mosts[i % 4] = fmaxf(mosts[i % 4], s[i]);
        const float most = fmaxf(fmaxf(mosts[0], mosts[1]), fmaxf(mosts[2], mosts[3]));
        mbarrier_wait(Shared::message_empty(message_.at()), message_.phase() ^ 1);
        const bool moves = named_barrier_any(kScorerBarrier, kWarpgroup, most > FUSEDMLA_LAZY || unset_ != 0);
        if (moves) raise_tops(s);
        if (threadIdx.x % kWarp == 0) Shared::changes(message_.at())[threadIdx.x / kWarp] = moves;
#pragma unroll
        for (int i = 0; i < 32; ++i) s[i] = exp2_approx(s[i]);
        const float share[2] = {exp2_approx(-log2_scale_[0]), exp2_approx(-log2_scale_[1])};
        put_ratios(share);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) total_[c] += fmaf(s[at(c)], share[0], s[at(c) + 2] * share[1]);
        put_weights(s);
        send();
    }

    __device__ void mask(float (&s)[32], int tokens, int left) const {
        const int token = thread_anew() / kWarp % 4 * 16 + thread_anew() % kWarp / 4;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
            int limit = tokens;
            if (p_.causal) limit = min(tokens, left - p_.s_q + 1 + divide(block_x_anew() * kRows + row_of(c), p_.h_q));
            if (token >= limit) s[at(c)] = -INFINITY;
            if (token + 8 >= limit) s[at(c) + 2] = -INFINITY;
        }
    }

    // Of listed keys, those that are not there.
    __device__ void mask_invalid(float (&s)[32]) {
        // This warp's 16 tokens.
        const uint32_t valid = Shared::valid(quarters_.after(2 * kQuarterSlots - 1).turn())[thread_anew() / kWarp % 4];
        if (valid == 0xFFFF) return;
        const uint32_t bits = valid >> thread_anew() % kWarp / 4;
#pragma unroll
        for (int i = 0; i < 32; ++i)
            if (!(bits >> (i / 2 % 2 * 8) & 1)) s[i] = -INFINITY;
    }

    // The four lanes that have a token see to a group's scale each.
    __device__ void put_ratios(const float (&share)[2]) const {
        const unsigned thread = thread_anew(), group = thread % 4;
        const int slot = quarters_.after(kQuarterSlots - 1).at();
#pragma unroll
        for (int token = 0; token < 2; ++token)
            Shared::ratios(message_.at())[group * kTile + thread / kWarp % 4 * 16 + thread % kWarp / 4 + token * 8] =
                __float2half_rn(reinterpret_cast<const float*>(scales_of(token, slot))[group] * share[token]);
    }

    // New references where scores exceed them, and the factors that bring O and the sums to them.
    __device__ void raise_tops(float (&s)[32]) {
        const unsigned thread = thread_anew() % kWarpgroup;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
            float most = fmaxf(s[at(c)], s[at(c) + 2]);
#pragma unroll
            for (int step = 4; step < kWarp; step <<= 1) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
            if (thread % kWarp < 4) reinterpret_cast<float*>(Shared::of_warps() + row_of(c))[thread / kWarp] = most;
        }
        named_barrier_sync(kScorerBarrier, kWarpgroup);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
            const float4 of = Shared::of_warps()[row_of(c)];
            const float most = fmaxf(fmaxf(of.x, of.y), fmaxf(of.z, of.w));
            const bool first = unset_ >> c & 1;
            const float rise = most > (first ? -INFINITY : FUSEDMLA_LAZY) ? most : 0.f;
            const float factor = first ? 1.f : exp2_approx(-rise);  // of sums that are still 0
            if (first && most > -INFINITY) unset_ &= ~(1 << c);
            if (thread < 4) {
                Shared::all_factors(message_.at())[row_of(c)] = factor;
                Shared::references()[row_of(c)] += rise;
            }
            total_[c] *= factor;
            s[at(c)] -= rise, s[at(c) + 2] -= rise;
        }
        named_barrier_sync(kScorerBarrier, kWarpgroup);  // the next scores are related to these
    }

    // P^T as a B operand: a row for each row of the query, with the tile's 64 tokens.
    __device__ void put_weights(const float (&s)[32]) const {
        const unsigned thread = thread_anew() % kWarpgroup, lane = thread % kWarp;
        const unsigned row = lane % 8, unit = thread / kWarp * 2 + lane / 8 % 2;
        const uint32_t to = smem_address(Shared::weight_rows(message_.at())) + row * 128 + ((unit ^ row) << 4);
#pragma unroll
        for (int i = 0; i < 8; ++i)
            stmatrix_x2_trans(to + i * kAtomBytes, pack_16bit(s[4 * i], s[4 * i + 1], true),
                              pack_16bit(s[4 * i + 2], s[4 * i + 3], true));
        fence_proxy_async();
    }

    // What the multipliers have held back of the message before, so that the tensor cores have work during a softmax.
    __device__ void release_held() { warp_arrive(Shared::go(message_.at() ^ 1)); }  // before the very first message too: see Shared

    __device__ void send() {
        __syncwarp();
        warp_arrive(Shared::message_full(message_.at()));
        message_.advance();
    }

    // The sums of the rows' weights: their logarithms to global memory, their inverses to the multipliers.
    __device__ void finish(const Item& item) {
        const unsigned thread = thread_anew() % kWarpgroup;
        named_barrier_sync(kScorerBarrier, kWarpgroup);  // all have read the last maxima
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
            float total = total_[c];
#pragma unroll
            for (int step = 4; step < kWarp; step <<= 1) total += __shfl_xor_sync(~0u, total, step);
            if (thread % kWarp < 4) reinterpret_cast<float*>(Shared::of_warps() + row_of(c))[thread / kWarp] = total;
        }
        named_barrier_sync(kScorerBarrier, kWarpgroup);
        mbarrier_wait(Shared::message_empty(message_.at()), message_.phase() ^ 1);
        if (thread < kRows) {
            const float4 of = Shared::of_warps()[thread];
            const float total = of.x + of.y + (of.z + of.w);
            Shared::all_factors(message_.at())[thread] = total == 0.f ? 0.f : 1.f / total;
            const float log_sum = total == 0.f ? -INFINITY : Shared::references()[thread] + log2_approx(total);
            store_log_sum(p_, item, block_x_anew() * kRows + thread, log_sum);
        }
        send();
    }

    float total_[kColumns];  // this lane's share of the sum of weights
    uint32_t unset_;         // a bit for each row that has not seen a key yet
    unsigned queries_ = 0;
    Ring<kMessageSlots> message_;
};
