// SPDX-License-Identifier: Apache-2.0
// Softmax by the multiplying warpgroups of the 64-row kernel, from the scores that the scoring one hands over.
//
// A multiplier weighs half of the rows, for both: lane l of warp w has row l of them, and of the tile tokens 16w to 16w +
// 15. Weights are related to a row's reference. It moves only if the weights of some lane add up to so much that one of
// them must exceed it by more than FUSEDMLA_LAZY; without a key so far it is -inf, and any weight is too much.
#pragma once

#include "query_8bit.cuh"
#include "twowg_join.cuh"

class Weigher {
  public:
    __device__ explicit Weigher(const Params& p) : p_(p) {}

    __device__ void begin() { reference_ = -INFINITY, total_ = 0.f; }

    // What the scores of an item's row are multiplied by, for base 2. After the item's first message has come.
    __device__ void take_scale() {
        scale_ = Shared::row_scales(items_++ % kScalesSlots)[row()];
        if (scale_ == 0.f) scale_ = 1e-38f;  // an infinite score stays one
    }

    // Weighs a tile whose scores have come; `taken` is called when they have been read. The item has `tokens` more tokens,
    // the request `left`; if `cut`, a row does not attend to all of the tile's. Returns whether O has to be rescaled, by
    // the factors in `slot`. All weights are there then, in the same slot.
    template <typename Taken>
    __device__ bool weigh(int slot, bool cut, int tokens, int left, const Taken& taken) {
        float x[kTokens];
        const float4* from = reinterpret_cast<const float4*>(Shared::scores(row()) + warp() * kTokens);
#pragma unroll
        for (int i = 0; i < kTokens / 4; ++i) {  // tokens 0, 8, 1, 9, ...
            const float4 four = from[i];
            x[2 * i] = four.x, x[2 * i + 8] = four.y, x[2 * i + 1] = four.z, x[2 * i + 9] = four.w;
        }
        taken();
        if (cut) {
            const int limit = limit_of(tokens, left);
#pragma unroll
            for (int i = 0; i < kTokens; ++i)
                if (i >= limit) x[i] = scale_ > 0.f ? -INFINITY : INFINITY;
        }
        float sum = put(slot, x, reference_);
        const bool moves = named_barrier_any(kMultipliersBarrier, kMultipliers, !(sum <= kMostWeight));
        if (moves) sum = raise(slot, x);
        total_ += sum;
        return moves;
    }

    // The sums of the rows' weights: their logarithms to global memory, their inverses to slot 0 of the factors. Where other
    // pieces' results are joined, what those are multiplied by to the slots of their numbers.
    __device__ void finish(const Item& item) {
        const bool joined = kMostJoined > 1 && joins(p_, item);
        reinterpret_cast<float*>(Shared::of_warps() + row())[warp()] = total_;
        named_barrier_sync(kMultipliersBarrier, kMultipliers);  // both have done with the factors of the last tile, too
        if (joined) {
            if (thread_anew() == kWarpgroup) wait_for_pieces(counter_of(p_, item), item.pieces - 1);
            named_barrier_sync(kMultipliersBarrier, kMultipliers);
        }
        if (warp() == 0) {
            const float4 of = Shared::of_warps()[row()];
            const float total = of.x + of.y + (of.z + of.w);
            float factor = total == 0.f ? 0.f : k_scale_of(p_) / total;
            float log_sum = total == 0.f ? -INFINITY : reference_ + log2_approx(total);
            const int of_all = block_x_anew() * kRows + row();
            if (joined) {
                const JoinedRow together(p_, item, of_all, log_sum);
                factor *= together.weight[0];
                log_sum = together.log_sum;
#pragma unroll
                for (int piece = 1; piece < kMostJoined; ++piece) Shared::all_factors(piece)[row()] = together.weight[piece];
            }
            Shared::all_factors(0)[row()] = factor;
            store_log_sum(p_, item, of_all, log_sum);
        }
        named_barrier_sync(kMultipliersBarrier, kMultipliers);
    }

  private:
    static constexpr int kTokens = 16;  // of a lane
    static constexpr float kMostWeight = kTokens << FUSEDMLA_LAZY;

    static __device__ int half() { return int(thread_anew() / kWarpgroup) - 1; }
    static __device__ int warp() { return thread_anew() / kWarp % 4; }
    static __device__ int row() { return half() * (kRows / 2) + thread_anew() % kWarp; }

    __device__ int limit_of(int tokens, int left) const {
        int limit = tokens;
        if (p_.causal) limit = min(tokens, left - p_.s_q + 1 + divide(block_x_anew() * kRows + row(), p_.h_q));
        return limit - warp() * kTokens;
    }

    // A row of P^T, as the B operand, has 64 tokens. Returns the sum of this lane's.
    __device__ float put(int slot, const float (&x)[kTokens], float reference) const {
        const int of = row();
        uint8_t* to = Shared::weight_rows(slot) + of * 128;
        float sums[2] = {0.f, 0.f};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            uint32_t words[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float y = exp2_approx(fmaf(x[8 * i + 2 * j], scale_, -reference));
                const float z = exp2_approx(fmaf(x[8 * i + 2 * j + 1], scale_, -reference));
                sums[0] += y, sums[1] += z;
                words[j] = pack_16bit(y, z, true);
            }
            *reinterpret_cast<uint4*>(to + ((warp() * 2 + i ^ (of & 7)) << 4)) = {words[0], words[1], words[2], words[3]};
        }
        fence_proxy_async();
        return sums[0] + sums[1];
    }

    // Of a row what each of the four warps has.
    __device__ static void exchange(float value) {
        reinterpret_cast<float*>(Shared::of_warps() + row())[warp()] = value;
        __syncwarp();  // otherwise there is code for lanes apart, which spills registers
        named_barrier_sync(kHalfBarrier + half(), kWarpgroup);
    }

    // New references where scores exceed them, and the factors that bring O and the sums to them. Returns the new sum.
    __device__ float raise(int slot, const float (&x)[kTokens]) {
        const bool first = reference_ == -INFINITY;
        float most = -INFINITY;
#pragma unroll
        for (int i = 0; i < kTokens; ++i) most = fmaxf(most, x[i] * scale_);
        exchange(most);
        const float4 of = Shared::of_warps()[row()];
        most = fmaxf(fmaxf(of.x, of.y), fmaxf(of.z, of.w));
        const float factor = first || !(most > reference_ + FUSEDMLA_LAZY) ? 1.f : exp2_approx(reference_ - most);
        if (most > (first ? -INFINITY : reference_ + FUSEDMLA_LAZY)) reference_ = most;
        total_ *= factor;
        if (warp() == 0) Shared::all_factors(slot)[row()] = factor;
        const float sum = put(slot, x, reference_ == -INFINITY ? 0.f : reference_);
        named_barrier_sync(kMultipliersBarrier, kMultipliers);
        return sum;
    }

    const Params& p_;
    float scale_, reference_;  // of this lane's row
    float total_;              // this lane's share of the sum of weights
    unsigned items_ = 0;
};
