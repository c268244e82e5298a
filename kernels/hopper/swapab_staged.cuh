// SPDX-License-Identifier: Apache-2.0
// Tiles that TMA brings into the stages of a ring: what the copying warp and the computing warps say to each other, and
// how the latter read a tile. swapab_listed.cuh has the same names for listed keys.
// Included by a kernel after it has defined FORMAT, Element, N and Layout.
#pragma once

#include "swapab_store.cuh"
#include "swapab_tile.cuh"

namespace {

// What the copying warp hands to the computing ones.
enum class Step { kAttend, kMerge, kEnd };
struct alignas(16) Task {
    Item item;
    Step step;
    unsigned number;  // of tasks before it
};
static_assert(sizeof(Task) == Layout::kItemBytes);

struct Shared : SharedOperands {
    __device__ uint32_t tile(int stage) const { return address() + stage * Layout::kStageBytes; }
    __device__ uint32_t full(int stage) const { return address() + Layout::kBarriers + stage * 8; }
    __device__ uint32_t empty(int stage) const { return full(stage + Layout::kStages); }
    __device__ uint32_t item_full(int i) const { return full(2 * Layout::kStages + i); }
    __device__ uint32_t item_empty(int i) const { return item_full(i + Layout::kItems); }
    __device__ Task* item(int i) const { return reinterpret_cast<Task*>(base + Layout::kItemQueue) + i; }
};

using Place = int;  // of a tile: its stage
using TileRing = Ring<Layout::kStages>;

__device__ inline Place place_of(const TileRing& ring) { return ring.stage(); }
// A barrier tells no more than the parity of its phase. The tile that was in the stage before may be another
// warpgroup's and still be on its way while this one is further. So it has to be released first: as long as its phase is
// not complete, a wait for the next one ends at once, since the one before had the same parity.
__device__ inline void wait_for_tile(const Shared& shared, const TileRing& ring) {
    if constexpr (Layout::kStages % Layout::kWarpgroups != 0)
        mbarrier_wait(shared.empty(ring.stage()), ring.phase() ^ 1);
    mbarrier_wait(shared.full(ring.stage()), ring.phase());
}
__device__ inline void release_tile(const Shared& shared, const TileRing& ring) {
    mbarrier_arrive(shared.empty(ring.stage()));
}

// Rows past the end of a request hold whatever the page holds, or nothing was copied: their weight is 0, but 0 x NaN is
// NaN.
__device__ void clear_rows_from(uint8_t* tile, int first, int thread) {
    constexpr int kUnits = FORMAT == Format::kSixteenBit ? 64 : 32;  // of 16 bytes in the latent part of a row
    for (int i = thread; i < (kTile - first) * kUnits; i += kWarpgroup) {
        const int row = first + i / kUnits, unit = i % kUnits;
        uint8_t* at =
            tile + row / kGroup * Layout::kGroupBytes + unit / 8 * kBlock + row % kGroup * 128 + unit % 8 * 16;
        *reinterpret_cast<uint4*>(at) = {0, 0, 0, 0};
    }
    fence_proxy_async();
}

__device__ inline bool has_keys(const Shared&, int) { return true; }

// Makes a tile fit to be multiplied.
__device__ inline bool prepare_tile(const Shared& shared, int stage, int tile, const Item& item) {
    const int tokens = item.seq_len - tile * kTile;
    if (tokens < kTile) clear_rows_from(shared.base + stage * Layout::kStageBytes, tokens, threadIdx.x % kWarpgroup);
    return true;
}

__device__ void mask_rows(const Params& p, int first_token, int seq_len, float (&s)[N / 2]) {
    const int token = first_token + threadIdx.x / kWarp % 4 * 16 + threadIdx.x % kWarp / 4;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
        const int row = first_row_of_block() + column_of(i / 4 * 2 + i % 2);
        const int limit = p.causal ? seq_len - p.s_q + 1 + divide(row, p.h_q) : seq_len;
        if (token + i / 2 % 2 * 8 >= limit) s[i] = -INFINITY;
    }
}

__device__ inline void mask_tile(const Params& p, const Shared&, int, int tile, const Item& item, float (&s)[N / 2]) {
    const int tokens = item.seq_len - tile * kTile;
    if (tokens - (p.causal ? p.s_q - 1 : 0) < kTile) mask_rows(p, tile * kTile, item.seq_len, s);
}

// The four scales of a token of an fp8_ds_mla tile.
__device__ inline const float* scales_at(const Shared& shared, int stage, int token) {
    const uint8_t* all = shared.base + stage * Layout::kStageBytes + Layout::kScalesOffset;
    return reinterpret_cast<const float*>(all + token * 16);
}

// 32 elements of an fp8 tile, of the rope part from pair 16 on.
__device__ inline void load_fp8(uint32_t (&raw)[4], uint32_t tile, int pair) {
    if (pair < 16)
        load_latent(raw, tile, pair);
    else
        load_rope(raw, tile + Layout::kRopeOffset, pair - 16);
}

// Scores of the rope part of an fp8_ds_mla tile, bfloat16, both operands from shared memory.
template <bool>
__device__ inline void scores_rope(float (&s)[N / 2], uint32_t tile, uint32_t query) {
    const uint32_t k = in_uniform_register(units_of(tile + Layout::kRopeOffset));
    const uint32_t q = in_uniform_register(units_of(query + 8 * N * 128));
    keep_in_order(s);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; ++step)
        Wgmma<bf16, N>::template shared<false>(s, descriptor<1024>(k + step * 2), descriptor<1024>(q + step * 2), step > 0);
    wgmma_commit();
    wgmma_wait<0>();
    keep_in_order(s);
}

// Results that are whole, or a piece's.
__device__ inline void store_log_sum(const Params& p, const Shared&, const Item& item, int n, float log_sum) {
    const int rows = p.s_q * p.h_q, row = first_row_of_block() + n;
    if (row >= rows) return;
    if (item.slot < 0)
        p.lse[int64_t(item.request) * rows + row] = log_sum * 0.6931471805599453f;
    else
        __stcg(p.partial_lse + int64_t(item.slot) * rows + row, log_sum);
}

__device__ inline void store_results(const Params& p, const Shared& shared, const Item& item,
                                     const float (&kept)[4][N / 2]) {
    if (item.slot < 0)
        store_whole(p, shared, item.request, first_row_of_block(), kept);
    else
        store_partial(p, item.slot, first_row_of_block(), kept);
}

}  // namespace
