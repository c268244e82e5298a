// SPDX-License-Identifier: Apache-2.0
// Shared memory of the pair kernel; the names are those of swapab_plan.cuh.
#pragma once

#include "swapab_plan.cuh"

struct PairPlan : Plan<Format::kFp8, 32> {  // what belongs to the cache's format is the same
    static constexpr int kRows = 64;
    static constexpr int kStages = 3;
    static constexpr int kReleases = kConsumers;
    static constexpr int kResultBytes = 2 * kRows * kResultPitch;
    static constexpr int kQueryBlock = kRows * 128;
    static constexpr int kQueryBytes = 9 * kQueryBlock > kResultBytes ? 9 * kQueryBlock : kResultBytes;
    static constexpr int kWeightBytes = kRows * kTile * 2;

    static constexpr int kQuery = kStages * kStageBytes;
    static constexpr int kWeights = kQuery + kQueryBytes;
    static constexpr int kExchange = kWeights + 2 * kWeightBytes;     // [64][8 warps]: maxima, later sums
    static constexpr int kRowValues = kExchange + 8 * kRows * 4;      // [64]: what to multiply by
    static constexpr int kTops = kRowValues + kRows * 4;  // [2][64]: running maxima, base 2
    static constexpr int kRowScale = kTops + 2 * kRows * 4;                // [64]
    static constexpr int kBarriers = kRowScale + kRows * 4;
    static constexpr int kItemQueue = kBarriers + 16 * (kStages + kItems);
    static constexpr int kBytes = kItemQueue + kItems * kItemBytes;
    static_assert(kBytes <= kSharedLimit && kQueryBytes % 1024 == 0);
    static_assert(merge_scratch(kConsumers, kRows) * 4 <= kQueryBytes);
};
