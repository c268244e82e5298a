// SPDX-License-Identifier: Apache-2.0
// An item of at most two tiles: two warpgroups score one each; then each multiplies the weights of both by its half of
// V's columns. They share maxima and sums, so nothing has to be joined in the end.
// Included by a kernel after it has defined FORMAT, Element, N and Layout.
#pragma once

#include "swapab_score.cuh"

namespace {

__device__ inline float largest_of_8(const float* from) {
    const float4 a = reinterpret_cast<const float4*>(from)[0], b = reinterpret_cast<const float4*>(from)[1];
    return fmaxf(fmaxf(fmaxf(a.x, a.y), fmaxf(a.z, a.w)), fmaxf(fmaxf(b.x, b.y), fmaxf(b.z, b.w)));
}

// The tiles of an item that has two, one or none.
class Pair {
  public:
    __device__ Pair(const Params& p, const Shared& shared, const TileRing& ring, const Item& item)
        : p_(p), shared_(shared), item_(item), ring_(ring) {}

    // Scores of this warpgroup's tile, no weight where there is none.
    __device__ void score(float (&s)[N / 2], LargestScales& largest) const {
        const int tile = item_.tile_begin + warpgroup();
        if (tile < item_.tile_end) {
            const TileRing ring = ring_of(warpgroup());
            wait_for_tile(shared_, ring);
            if (prepare_tile(shared_, place_of(ring), tile, item_)) {
                score_tile(p_, shared_, place_of(ring), largest, s);
                mask_tile(p_, shared_, place_of(ring), tile, item_, s);
                return;
            }
        }
#pragma unroll
        for (int i = 0; i < N / 2; ++i) s[i] = -INFINITY;
    }

    __device__ Place own_place() const { return place_of(ring_of(warpgroup())); }

    // Adds both tiles' values in this warpgroup's columns.
    __device__ void multiply(float (&o)[4][N / 2]) const {
        constexpr int kVersion = Layout::kWeightVersions == 4 ? Layout::kWeightBytes : 0;
        const uint32_t weights = shared_.address() + Layout::kWeights + warpgroup() * 2 * kVersion;
#pragma unroll 1
        for (int i = 0; i < item_.tile_end - item_.tile_begin; ++i) {
            const TileRing ring = ring_of(i);
            wait_for_tile(shared_, ring);
            const uint32_t from = weights + i * Layout::kWeightVersions * Layout::kWeightBytes;
            if (!has_keys(shared_, place_of(ring))) continue;
            if constexpr (FORMAT == Format::kSixteenBit)
                accumulate_16bit<Element, N, 4>(o, shared_.tile(place_of(ring)), from, warpgroup() * 4);
            else
                accumulate_8bit<N, 4, kVersion>(o, shared_.tile(place_of(ring)), from, warpgroup() * 4);
        }
    }

    // This warpgroup's tile, when nobody reads it any more.
    __device__ void release() const {
        if (item_.tile_begin + warpgroup() < item_.tile_end) release_tile(shared_, ring_of(warpgroup()));
    }

  private:
    __device__ static int warpgroup() { return threadIdx.x / kWarpgroup; }
    __device__ TileRing ring_of(int i) const {
        TileRing ring = ring_;
        if (i > 0) ring.advance();
        return ring;
    }

    const Params& p_;
    const Shared& shared_;
    const Item& item_;
    const TileRing ring_;
};

// Each lane's two tokens' share of the maxima, [row][warp].
__device__ inline void put_maxima(const Shared& shared, const float (&s)[N / 2], const LargestScales& largest) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
        float low = s[c / 2 * 4 + c % 2], high = s[c / 2 * 4 + 2 + c % 2];
        if constexpr (FORMAT == Format::kFp8DsMla) low += largest.log2[0], high += largest.log2[1];
        const float most = max_over_tokens(fmaxf(low, high));
        if (threadIdx.x % kWarp < 4) shared.exchange()[column_of(c) * 8 + threadIdx.x / kWarp] = most;
    }
}

// Results of this warpgroup's half of the columns, not divided by the sums yet. Every consumer calls meet() when the
// weights, the sums and the maxima are in shared memory; it returns when everybody's are.
template <typename Meet>
__device__ void attend_in_pairs(const Params& p, const Shared& shared, const TileRing& ring, const Item& item,
                                float (&o)[4][N / 2], const Meet& meet) {
    const Pair pair(p, shared, ring, item);
    float s[N / 2];
    LargestScales largest;
    pair.score(s, largest);
    put_maxima(shared, s, largest);
    named_barrier_sync(kFirstTwo, kTwo);
    float top[kColumns], total[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
        top[c] = fmaxf(-1e30f, largest_of_8(shared.exchange() + column_of(c) * 8));
        total[c] = 0.f;
    }
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
        s[i] = exp2_approx(s[i] - top[i / 4 * 2 + i % 2]);
        total[i / 4 * 2 + i % 2] += s[i];
    }
    put_all_weights(shared, pair.own_place(), own_weights(shared), s);
    put_sums(shared, top, total);
    fence_proxy_async();
#pragma unroll
    for (int block = 0; block < 4; ++block)
#pragma unroll
        for (int i = 0; i < N / 2; ++i) o[block][i] = 0.f;
    meet();
    pair.multiply(o);
}

// When nobody reads the tiles any more.
__device__ inline void release_pair(const Params& p, const Shared& shared, TileRing& ring, const Item& item) {
    Pair(p, shared, ring, item).release();
    for (int tile = item.tile_begin; tile < item.tile_end; ++tile) ring.advance();
}

}  // namespace
