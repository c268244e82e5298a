// SPDX-License-Identifier: Apache-2.0
// The scoring warpgroup of the 64-row kernel: S = Q K^T, the online softmax, and P for the multiplying warpgroups.
// A lane 4g + j of warp w holds rows 16w + g and 16w + g + 8 of everything.
#pragma once

#include "twowg_e4m3.cuh"
#include "twowg_join.cuh"
#include "twowg_product.cuh"
#include "twowg_tasks.cuh"

template <typename T>
class Scorer {
  public:
    __device__ explicit Scorer(const Params& p) : p_(p), product_(p) {}

    __device__ void run() {
        Tasks::for_items([&](const Item&) { attend(); });
    }

  private:
    __device__ void attend() {
        product_.load_query(Tasks::item().request, quarters_, rope_);
        top_[0] = top_[1] = -1e30f;  // finite, so that a row without keys makes no NaN
        total_[0] = total_[1] = 0.f;
        if (kGather) largest_[0] = largest_[1] = -INFINITY;
        int left = Tasks::item().seq_len - Tasks::item().tile_begin * kTile;  // tokens of the request
        const int after = max(Tasks::item().seq_len - Tasks::item().tile_end * kTile, 0);  // that are not of the item
        const bool any = left > after;
        for (; left > after; left -= kSpan) {
            const bool cut = is_cut(p_, left - after, left);  // before the scores, which take longer
            float s[kScores];
            product_.score(s, quarters_, rope_);
            if (kGather && left <= after + kSpan) product_.release_query();  // those who gather bring the next one now
            release_held();
            weigh(s, cut, left - after, left);
        }
        release_held();
        if (!kGather || !any) product_.release_query();
        finish(Tasks::item());
    }

    // Masks and weighs the scores of a span and sends P. The item has `tokens` more tokens, the request `left`.
    __device__ void weigh(float (&s)[kScores], bool cut, int tokens, int left) {
        if constexpr (kGather) {
            mask_invalid(s);
        } else if (cut) {
            if (tokens < kSpan) clear_rows_from(quarters_, tokens);
            mask(s, tokens, left);
        }
        float most[2], factor[2] = {1.f, 1.f};
        bool exceeds = false;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float chains[4] = {s[2 * half], s[2 * half + 1], s[2 * half + 4], s[2 * half + 5]};
#pragma unroll
            for (int i = 2; i < kScores / 4; ++i)
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    float& chain = chains[i % 2 * 2 + j];
                    chain = fmaxf(chain, s[4 * i + 2 * half + j]);
                }
            most[half] = fmaxf(fmaxf(chains[0], chains[1]), fmaxf(chains[2], chains[3])) * product_.scale(half);
            exceeds |= most[half] > top_[half] + FUSEDMLA_LAZY;
            if (kGather) largest_[half] = fmaxf(largest_[half], most[half]);
        }
        if (__any_sync(~0u, exceeds)) {  // seldom, past an item's first tile
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                most[half] = fmaxf(most[half], __shfl_xor_sync(~0u, most[half], 1));
                most[half] = fmaxf(most[half], __shfl_xor_sync(~0u, most[half], 2));
                const float top = most[half] > top_[half] + FUSEDMLA_LAZY ? most[half] : top_[half];
                factor[half] = exp2_approx(top_[half] - top);
                top_[half] = top;
                total_[half] *= factor[half];
            }
        }
#pragma unroll
        for (int i = 0; i < kScores; ++i) {
            s[i] = exp2_approx(fmaf(s[i], product_.scale(i / 2 % 2), kWeightExponent - top_[i / 2 % 2]));
            total_[i / 2 % 2] += s[i];
        }
        mbarrier_wait(Shared::message_empty(message_.at()), message_.phase() ^ 1);
        put_factors(factor);
        put_weights(s);
        send();
    }

    __device__ void put_weights(const float (&s)[kScores]) const {
        if constexpr (kE4m3) {
            // P as a B operand, rows of 128 tokens. Where tokens lie within 16: see Multiplier::multiply_e4m3.
            const unsigned thread = thread_anew() % kWarpgroup;
            const int row = thread / kWarp * 16 + thread % kWarp / 4;
            uint8_t* to = Shared::weight_rows(message_.at()) + row * 128 + thread % 4 * 4;
#pragma unroll
            for (int i = 0; i < 16; ++i) {
                const int half = i % 2, unit = i / 2;
                const float* four = s + unit * 8 + half * 2;
                *reinterpret_cast<uint32_t*>(to + half * 8 * 128 + ((unit ^ (row & 7)) << 4)) =
                    pack_e4m3(four[0], four[1]) |
                    pack_e4m3(four[4], four[5]) << 16;
            }
            fence_proxy_async();
        } else {
#pragma unroll
            for (int step = 0; step < 4; ++step) {
                uint32_t w[4];
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    w[i] = pack_16bit(s[8 * step + 2 * i], s[8 * step + 2 * i + 1], kIsFp16<Element>);
                Shared::weights(message_.at(), step) = {w[0], w[1], w[2], w[3]};
            }
        }
    }

    // Of listed keys, those that are not there.
    __device__ void mask_invalid(float (&s)[kScores]) const {
        const int tile = rope_.after(2 * kRopeSlots - 1).turn();  // whose scores these are
        const uint2 valid = *reinterpret_cast<const uint2*>(Shared::valid(tile));
        if ((valid.x & valid.y) == ~0u) return;
        const unsigned first = thread_anew() % 4 * 2;
        const uint32_t bits[2] = {valid.x >> first, valid.y >> first};
#pragma unroll
        for (int i = 0; i < kScores; ++i)
            if (!(bits[i / 16] >> (i / 4 % 4 * 8 + i % 2) & 1)) s[i] = -INFINITY;
    }

    __device__ void mask(float (&s)[kScores], int tokens, int left) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int limit = tokens;
            if (p_.causal) limit = min(tokens, left - p_.s_q + 1 + divide(first_row() + 8 * half, p_.h_q));
            limit -= thread_anew() % 4 * 2;
#pragma unroll
            for (int i = 0; i < kScores / 2; ++i)
                if (i / 2 * 8 + i % 2 >= limit) s[i / 2 * 4 + half * 2 + i % 2] = -INFINITY;
        }
    }

    // What the multipliers have held back of the message before, so that the tensor cores have work during a softmax.
    __device__ void release_held() {
        if constexpr (!kE4m3) warp_arrive(Shared::go(message_.at() ^ 1));  // before the very first message too: see Shared
    }

    __device__ void put_factors(const float (&factor)[2]) const {
        float* to = Shared::factors(message_.at());
        if (threadIdx.x % 4 == 0) to[0] = factor[0], to[8] = factor[1];
        if constexpr (kE4m3) {
            const bool changed = __any_sync(~0u, factor[0] != 1.f || factor[1] != 1.f);
            if (threadIdx.x % kWarp == 0) Shared::changes(message_.at())[threadIdx.x / kWarp] = changed;
        }
    }

    __device__ void send() {
        __syncwarp();
        warp_arrive(Shared::message_full(message_.at()));
        message_.advance();
    }

    // The sum of a row's weights: its logarithm to global memory, its inverse to the multipliers.
    __device__ void finish(const Item& item) {
        const bool joined = kMostJoined > 1 && joins(p_, item);
        if (joined) await_others(p_, item);
        float norm[2], others[2][kMostJoined];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float total = total_[half];
            total += __shfl_xor_sync(~0u, total, 1);
            total += __shfl_xor_sync(~0u, total, 2);
            norm[half] = total == 0.f ? 0.f : k_scale_of(p_) / total;
            float log_sum = total == 0.f ? -INFINITY : top_[half] - kWeightExponent + log2_approx(total);
            if (joined) {
                const JoinedRow row(p_, item, first_row() + 8 * half, log_sum);
                norm[half] *= row.weight[0];
                log_sum = row.log_sum;
#pragma unroll
                for (int piece = 1; piece < kMostJoined; ++piece) others[half][piece] = row.weight[piece];
            }
            if (threadIdx.x % 4 == 0) store_log_sum(p_, item, first_row() + 8 * half, log_sum);
            if (kGather && p_.max_logits != nullptr) {
                float largest = largest_[half];
                largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
                largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
                if (threadIdx.x % 4 == 0) store_largest(p_, item, first_row() + 8 * half, largest);
            }
        }
        send_factors(norm);
        if constexpr (kMostJoined > 1)
            if (joined) send_others(item, others);
    }

    // The factors of the other pieces' results, and at last those of the sum.
    __device__ void send_others(const Item& item, const float (&others)[2][kMostJoined]) {
#pragma unroll
        for (int piece = 1; piece < kMostJoined; ++piece) {
            if (piece == item.pieces) break;
            release_held();
            const float factors[2] = {others[0][piece], others[1][piece]};
            send_factors(factors);
        }
        release_held();
        const float ones[2] = {1.f, 1.f};
        send_factors(ones);
    }

    __device__ void send_factors(const float (&factors)[2]) {
        mbarrier_wait(Shared::message_empty(message_.at()), message_.phase() ^ 1);
        put_factors(factors);
        send();
    }

    const Params& p_;
    Product<T> product_;
    float top_[2], total_[2];  // running maximum, base 2; this lane's share of the sum of weights
    float largest_[2];         // of this lane's share, exactly
    Ring<kQuarterSlots> quarters_;
    Ring<kRopeSlots> rope_;
    Ring<kMessageSlots> message_;
};
