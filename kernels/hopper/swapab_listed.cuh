// SPDX-License-Identifier: Apache-2.0
// Tiles of listed keys, gathered row by row into the slots of a ring: the names of swapab_staged.cuh for them. Operands
// come from the rows through registers.
// Included by a kernel after it has defined FORMAT, Element, N and Layout.
#pragma once

#include "swapab_store.cuh"
#include "swapab_tile.cuh"

namespace {

constexpr int kSlotsOfTile = Layout::kCopiers;

struct Shared : SharedOperands {
    __device__ uint32_t slot(unsigned i) const { return address() + i * Layout::kSlotBytes; }
    __device__ uint32_t full(unsigned i) const { return address() + Layout::kBarriers + i * 8; }
    __device__ uint32_t empty(unsigned i) const { return full(i + Layout::kSlots); }
    __device__ uint32_t* valid(unsigned i) const { return reinterpret_cast<uint32_t*>(base + Layout::kValid) + i; }
    __device__ struct ListedTile tile(const struct ListedTile& tile) const;
};

// A tile whose rows lie in four slots that follow one another.
struct ListedTile {
    unsigned first;
    __device__ unsigned slot(unsigned i) const {
        return first + i < Layout::kSlots ? first + i : first + i - Layout::kSlots;
    }
    __device__ uint32_t row(unsigned token) const {
        constexpr unsigned kRows = Layout::kSlotRows;
        return SharedOperands().address() + slot(token / kRows) * Layout::kSlotBytes + token % kRows * Layout::kPitch;
    }
};
__device__ inline ListedTile Shared::tile(const ListedTile& tile) const { return tile; }

using Place = ListedTile;

struct TileRing {
    unsigned count = 0;  // of slots so far
    __device__ unsigned slot(unsigned i) const { return (count + i) % Layout::kSlots; }
    __device__ uint32_t phase(unsigned i) const { return (count + i) / Layout::kSlots & 1; }
    __device__ void advance() { count += kSlotsOfTile; }
    __device__ void retreat() { count -= kSlotsOfTile; }
};

__device__ inline Place place_of(const TileRing& ring) { return {ring.slot(0)}; }
// What was in the slots before has to be released first, as in swapab_staged.cuh; a lane looks at one slot.
__device__ inline void wait_for_tile(const Shared& shared, const TileRing& ring) {
    const unsigned lane = threadIdx.x % kWarp;
    if (lane < kSlotsOfTile) mbarrier_wait(shared.empty(ring.slot(lane)), ring.phase(lane) ^ 1);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kSlotsOfTile; ++i) mbarrier_wait(shared.full(ring.slot(i)), ring.phase(i));
}
__device__ inline void release_tile(const Shared& shared, const TileRing& ring) {
    __syncwarp();
    const unsigned lane = threadIdx.x % kWarp;
    if (lane < kSlotsOfTile) mbarrier_arrive(shared.empty(ring.slot(lane)));
}

// Room of a tile that has been read, for quarter i of a half of a warpgroup's results.
__device__ inline float4* room_in(const Shared& shared, const Place& tile, int i) {
    static_assert(N * 64 * 4 <= Layout::kSlotBytes && kSlotsOfTile == 4);
    return reinterpret_cast<float4*>(shared.base + tile.slot(i) * Layout::kSlotBytes);
}

// Whether any key of the tile is there.
__device__ inline bool has_keys(const Shared& shared, const Place& tile) {
    uint32_t any = 0;
#pragma unroll
    for (int i = 0; i < kSlotsOfTile; ++i) any |= *shared.valid(tile.slot(i));
    return any != 0;
}
__device__ inline bool prepare_tile(const Shared& shared, const Place& tile, int, const Item&) {
    return has_keys(shared, tile);
}

__device__ inline void mask_tile(const Params&, const Shared& shared, const Place& tile, int, const Item&,
                                 float (&s)[N / 2]) {
    const uint32_t valid = *shared.valid(tile.slot(threadIdx.x / kWarp % 4)) >> threadIdx.x % kWarp / 4;
#pragma unroll
    for (int i = 0; i < N / 2; ++i)
        if (!(valid >> i / 2 % 2 * 8 & 1)) s[i] = -INFINITY;
}

__device__ inline uint32_t latent_unit(const ListedTile& tile, int token, int unit) {
    return tile.row(token) + unit * 16;
}

// The four scales of a token of fp8_ds_mla.
__device__ inline const float* scales_at(const Shared& shared, const Place& tile, int token) {
    return reinterpret_cast<const float*>(shared.base + (tile.row(token) - shared.address()) + kLatent);
}

// Scores over STEPS x 16 elements of 16 bits, from byte FIRST of a row on; without WAIT they are begun.
template <typename T, int STEPS, int FIRST, bool WAIT = true>
__device__ inline void scores_of_elements(float (&s)[N / 2], const ListedTile& tile, uint32_t query) {
    constexpr int kBatch = 2 * kFragmentBatch<N>;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp % 4;
    const uint32_t row = tile.row(warp * 16 + lane % 16) + FIRST + lane / 16 * 16;
    const uint32_t units = in_uniform_register(units_of(query));
    uint32_t raw[2][kBatch][4];
    const auto load = [&](int batch) {
#pragma unroll
        for (int i = 0; i < kBatch; ++i) ldmatrix_x4(raw[batch % 2][i], row + (batch * kBatch + i) * 32);
    };
    load(0);
    keep_in_order(s);
#pragma unroll
    for (int batch = 0; batch < STEPS / kBatch; ++batch) {
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < kBatch; ++step) {
            const int k = batch * kBatch + step;
            const uint64_t q = descriptor<1024>(units + k / 4 * N * 8 + k % 4 * 2);
            Wgmma<T, N>::registers(s, raw[batch % 2][step], q, k > 0);
        }
        wgmma_commit();
        wgmma_wait<1>();  // the batch before: its registers are free
        if (batch + 1 < STEPS / kBatch) load(batch + 1);
    }
    if constexpr (WAIT) {
        wgmma_wait<0>();
        keep_in_order(s);
    }
}

__device__ inline void load_fp8(uint32_t (&raw)[4], const ListedTile& tile, int pair) { load_latent(raw, tile, pair); }

template <bool WAIT>
__device__ inline void scores_rope(float (&s)[N / 2], const ListedTile& tile, uint32_t query) {
    scores_of_elements<bf16, 4, kLatent + 16, WAIT>(s, tile, query + 8 * N * 128);
}

template <typename T, int>
__device__ inline void scores_16bit(float (&s)[N / 2], const ListedTile& tile, uint32_t query) {
    scores_of_elements<T, 36, 0>(s, tile, query);
}

template <typename T, int, int BLOCKS>
__device__ inline void accumulate_16bit(float (&o)[BLOCKS][N / 2], const ListedTile& tile, uint32_t weights,
                                        int first = 0) {
    constexpr int kBatch = 2 * kFragmentBatch<N>, kBatches = 4 * BLOCKS / kBatch;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp % 4;
    const uint32_t units = in_uniform_register(units_of(weights));
    uint32_t raw[2][kBatch][4];
    const auto load = [&](int batch) {
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const int at = batch * kBatch + i, token = at / BLOCKS * 16 + lane / 16 * 8 + lane % 8;
            const int unit = (first + at % BLOCKS) * 8 + warp * 2 + lane / 8 % 2;
            ldmatrix_x4_trans(raw[batch % 2][i], latent_unit(tile, token, unit));
        }
    };
    load(0);
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block) keep_in_order(o[block]);
#pragma unroll
    for (int batch = 0; batch < kBatches; ++batch) {
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const int at = batch * kBatch + i;
            Wgmma<T, N>::registers(o[at % BLOCKS], raw[batch % 2][i], descriptor<1024>(units + at / BLOCKS * 2), true);
        }
        wgmma_commit();
        wgmma_wait<1>();
        if (batch + 1 < kBatches) load(batch + 1);
    }
    wgmma_wait<0>();
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block) keep_in_order(o[block]);
}

__device__ inline void store_log_sum(const Params& p, const Shared&, const Item& item, int n, float log_sum) {
    const int head = first_row_of_block() + n;
    if (head < p.h_q) p.lse[int64_t(item.request) * p.h_q + head] = log_sum * 0.6931471805599453f;
}

__device__ inline void store_results(const Params& p, const Shared& shared, const Item& item,
                                     const float (&o)[4][N / 2]) {
    store_whole(p, shared, item.request, first_row_of_block(), o);
}

}  // namespace
