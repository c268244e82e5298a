// SPDX-License-Identifier: Apache-2.0
// The scoring warpgroup of the 64-row kernel for fp8 caches: S^T = K Q^T, handed over as it is for the multipliers to weigh.
// A warp has 16 tokens of S^T; its lane 4g + j holds tokens g and g + 8, rows 8i + 2j and 8i + 2j + 1.
#pragma once

#include "twowg_query_8bit.cuh"
#include "twowg_tasks.cuh"
#include "twowg_turned_product.cuh"

class RawScorer : TurnedProduct {
  public:
    __device__ explicit RawScorer(const Params& p) : TurnedProduct(p) {}

    __device__ void run() {
        Tasks::for_items([&](const Item& item) { attend(item); });
    }

  private:
    __device__ void attend(const Item& item) {
        mbarrier_wait(Shared::query_full(), queries_++ & 1);
        int tokens = min(item.seq_len, item.tile_end * kTile) - item.tile_begin * kTile;
        if (tokens > 0) {
            widen_query(p_, items_++ % kScalesSlots);
            named_barrier_sync(kScorerBarrier, kWarpgroup);
        }
#pragma unroll 1
        for (; tokens > 0; tokens -= kTile) {
            float s[32];
            // The first needs no leave; tile n's is number (n - 1) / 2 of its barrier.
            if (tiles_ > 0) mbarrier_wait(Shared::may_score(tiles_ % 2), tiles_ / 2 - 1 + tiles_ % 2 & 1);
            ++tiles_;
            score(s);
            if (tokens < kTile) clear_rows_from(quarters_, tokens);
            mbarrier_wait(Shared::message_empty(message_.at()), message_.phase() ^ 1);
            put_scores(s);
            __syncwarp();
            warp_arrive(Shared::message_full(message_.at()));
            message_.advance();
        }
        warp_arrive(Shared::query_empty());
    }

    // A lane's two tokens of a row lie side by side.
    __device__ void put_scores(const float (&s)[32]) const {
        const unsigned thread = thread_anew(), lane = thread % kWarp;
        float* to = Shared::scores(lane % 4 * 2) + thread / kWarp % 4 * 16 + lane / 4 * 2;
#pragma unroll
        for (int i = 0; i < 8; ++i)
#pragma unroll
            for (int row = 0; row < 2; ++row)
                *reinterpret_cast<float2*>(to + (i * 8 + row) * (kScoresPitch / 4)) = {s[4 * i + row], s[4 * i + row + 2]};
    }

    unsigned queries_ = 0, items_ = 0, tiles_ = 0;
    Ring<kMessageSlots> message_;
};
