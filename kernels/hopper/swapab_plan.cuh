// SPDX-License-Identifier: Apache-2.0
// Shared memory of the swap-AB kernel: what lies where, for each cache format and number of query rows.
#pragma once

#include "merge.cuh"

enum class Format { kSixteenBit, kFp8, kFp8DsMla };

constexpr int kSharedLimit = 227 * 1024;
constexpr int kBlock = kGroup * 128;  // bytes of 8 tokens x 128 bytes: what a swizzle permutes

// What both ways of getting tiles have in common.
template <Format FORMAT, int N, int WARPGROUPS>
struct Operands {
    static constexpr int kWarpgroups = WARPGROUPS;  // that compute
    static constexpr int kWarps = 4 * kWarpgroups, kConsumers = kWarps * kWarp;
    static constexpr int kThreads = kConsumers + kWarpgroup;  // registers of the last warpgroup go to the others
    static constexpr int kConsumerRegisters = kWarpgroups == 3 ? 152 : 224, kProducerRegisters = 56;
    static constexpr int kRowBytes = FORMAT == Format::kSixteenBit ? 1152 : FORMAT == Format::kFp8 ? 576 : 656;
    // The query: N rows in nine blocks of 64 elements. Reused to turn the result around.
    static constexpr int kQueryBlock = N * 128;
    static constexpr int kQueryBytes = 9 * kQueryBlock;
    static constexpr int kResultPitch = kLatent + 16;  // bytes: half a row of 16-bit values, and against bank conflicts
    // Weights: N rows of 64 tokens for each warpgroup, one version for each scale group of a token.
    static constexpr int kWeightVersions = FORMAT == Format::kFp8DsMla ? 4 : 1;
    static constexpr int kWeightBytes = N * 128;
    // Maxima and sums by warp and row, scales of rows, maxima by warpgroup and row.
    static constexpr int kExchangeFloats = 2 * kWarps * N + N + kWarpgroups * N;
    static_assert(2 * N * kResultPitch <= kQueryBytes);
    static_assert(kQueryBlock % 1024 == 0);
};

// Of 8-bit tiles and few rows a third warpgroup has registers and room for the tile it holds.
template <Format FORMAT, int N>
constexpr int kPagedWarpgroups = FORMAT != Format::kSixteenBit && N <= 16 ? 3 : 2;

template <Format FORMAT, int N>
struct Plan : Operands<FORMAT, N, kPagedWarpgroups<FORMAT, N>> {
    using Base = Operands<FORMAT, N, kPagedWarpgroups<FORMAT, N>>;
    using Base::kExchangeFloats, Base::kQueryBytes, Base::kRowBytes, Base::kWarpgroups, Base::kWarps;
    using Base::kWeightBytes, Base::kWeightVersions;
    // A tile: 8 groups of 8 tokens; of a group, blocks of 128 bytes of each token.
    static constexpr int kBlocks = FORMAT == Format::kSixteenBit ? 9 : 4;
    static constexpr int kGroupBytes = kBlocks * kBlock;
    static constexpr int kRopeOffset = 8 * kGroupBytes;  // of 8-bit formats: 64 tokens of 64 bytes, or 128 (fp8_ds_mla)
    static constexpr int kScalesOffset = kRopeOffset + kTile * 128;  // fp8_ds_mla: 64 tokens of 16 bytes
    static constexpr int kStageBytes = kTile * kRowBytes;
    static constexpr int kReleases = kWarpgroup;  // threads that release a stage
    static constexpr int kItems = 4;  // handed to the computing warps ahead of time
    static constexpr int kItemBytes = 48;
    static constexpr int kFixedBytes =
        kQueryBytes + kWarpgroups * kWeightVersions * kWeightBytes + kExchangeFloats * 4 + 512 /* barriers, items */;
    static constexpr int kStages = (kSharedLimit - kFixedBytes) / kStageBytes < 6
                                       ? (kSharedLimit - kFixedBytes) / kStageBytes
                                       : 6;

    static constexpr int kQuery = kStages * kStageBytes;
    static constexpr int kWeights = kQuery + kQueryBytes;
    static constexpr int kExchange = kWeights + kWarpgroups * kWeightVersions * kWeightBytes;
    static constexpr int kRowScale = kExchange + 2 * kWarps * N * 4;
    static constexpr int kBarriers = kExchange + kExchangeFloats * 4;
    static constexpr int kItemQueue = kBarriers + 16 * (kStages + kItems);
    static constexpr int kBytes = kItemQueue + kItems * kItemBytes;
    static_assert(kStages >= 2 && kBytes <= kSharedLimit);
    static_assert(kStageBytes % 1024 == 0);
};

// Slots of a ring that fit shared memory beside `fixed` bytes: their rows, aligned, two barriers and a word for each.
constexpr int most_slots(int slot_bytes, int fixed) {
    int slots = 24;
    while ((slots * slot_bytes + 1023) / 1024 * 1024 + 20 * slots + fixed > kSharedLimit) --slots;
    return slots;
}

// Of listed keys. Rows lie as they do in memory, some padded so that eight of them are in different banks; they are
// operands through registers only. The ring's slots hold what a copying warp brings of a tile.
template <Format FORMAT, int N>
struct ListedPlan : Operands<FORMAT, N, 2> {
    using Base = Operands<FORMAT, N, 2>;
    using Base::kExchangeFloats, Base::kQueryBytes, Base::kRowBytes, Base::kWarpgroups, Base::kWarps;
    using Base::kWeightBytes, Base::kWeightVersions;
    // With 32 rows 224 do not suffice; 40 do for copying, though not with every other number of rows.
    static constexpr int kConsumerRegisters = N > 24 ? 232 : 224, kProducerRegisters = N > 24 ? 40 : 56;
    static constexpr int kPitch = kRowBytes / 16 % 2 ? kRowBytes : kRowBytes + 16;
    static constexpr int kCopiers = 4;  // warps
    static constexpr int kSlotRows = kTile / kCopiers, kSlotBytes = kSlotRows * kPitch;
    // Results of a cluster's CTAs, brought together at the end of the ring: see swapab_cluster.cuh.
    static constexpr int kMostRanks = 16;
    static constexpr int kColumnSets = kLatent / 16, kSetBytes = N * 16 * 4;
    static constexpr int kRowSumBytes = kMostRanks * N * 8, kOwnerBytes = kColumnSets * 8;
    static constexpr int kFixedBytes = kQueryBytes + kWarpgroups * kWeightVersions * kWeightBytes + kExchangeFloats * 4 +
                                       kRowSumBytes + kOwnerBytes + 16 /* barriers of a cluster */;
    static constexpr int kSlots = most_slots(kSlotBytes, kFixedBytes);

    static constexpr int kQuery = (kSlots * kSlotBytes + 1023) / 1024 * 1024;
    static constexpr int kWeights = kQuery + kQueryBytes;
    static constexpr int kExchange = kWeights + kWarpgroups * kWeightVersions * kWeightBytes;
    static constexpr int kRowScale = kExchange + 2 * kWarps * N * 4;
    static constexpr int kRowSums = kExchange + kExchangeFloats * 4;
    static constexpr int kOwners = kRowSums + kRowSumBytes;
    static constexpr int kBarriers = kOwners + kOwnerBytes;
    static constexpr int kClusterBarriers = kBarriers + 16 * kSlots;
    static constexpr int kValid = kClusterBarriers + 16;  // for each slot, which of its rows are there
    static constexpr int kBytes = kValid + 4 * kSlots;
    static constexpr int kLandingBytes = (kColumnSets + kMostRanks) * kSetBytes;
    static constexpr int kLanding = (kSlots * kSlotBytes - kLandingBytes) / 16 * 16;  // if it may be anywhere
    static_assert(kLanding >= 0 && kMostRanks * N * 4 <= kQueryBytes);  // their weights where the query was
    static_assert(kSlots >= 8 && kBytes <= kSharedLimit && kSlotBytes % 16 == 0 && kRowBytes % 16 == 0);
};
