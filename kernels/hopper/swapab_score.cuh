// SPDX-License-Identifier: Apache-2.0
// Scores of a tile in base 2, and weights as the operand of the second product.
// Included by a kernel after it has defined FORMAT, Element, N and Layout.
#pragma once

#include "swapab_shared.cuh"
#include "swapab_tile.cuh"

namespace {

// The first of the lane's two tokens in a tile; the other one is 8 further.
__device__ inline int token_of_lane() {
    const unsigned thread = thread_anew();
    return thread / kWarp % 4 * 16 + thread % kWarp / 4;
}

// Of the lane's two tokens, fp8_ds_mla: the base-2 logarithm of the largest scale. The scales themselves are read from
// the tile where they are needed: registers are scarce.
struct LargestScales {
    float log2[2] = {0.f, 0.f};

    __device__ void load(const Shared& shared, const Place& place, int token) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float4 four = *reinterpret_cast<const float4*>(scales_at(shared, place, token + 8 * half));
            const float most = fmaxf(fmaxf(four.x, four.y), fmaxf(four.z, four.w));
            log2[half] = fmaxf(log2_approx(most), -60.f);  // finite even if all scales are 0
        }
    }
};

// The same tokens' scales of groups of 128 elements. None counts as less than 2^-60 of the largest one, so that what is
// related to one can be related to another.
class GroupScales {
  public:
    __device__ GroupScales(const Shared& shared, const Place& place, const LargestScales& largest)
        : first_(scales_at(shared, place, token_of_lane())), second_(scales_at(shared, place, token_of_lane() + 8)) {
#pragma unroll
        for (int half = 0; half < 2; ++half) least_[half] = exp2_approx(largest.log2[half] - 60.f);
    }
    __device__ float scale(int group, int half) const { return fmaxf((half ? second_ : first_)[group], least_[half]); }
    __device__ float ratio(int group, int half) const { return __fdividef(scale(group, half), scale(group + 1, half)); }

  private:
    const float *first_, *second_;
    float least_[2];
};

// Where there are registers, a group's scores are added up while the next one's are made. Elsewhere there is but one set:
// it is related to a group's scale, then to that of the next one and so on.
constexpr bool kTwoSets = kGather && N < 24;
constexpr int kScoreBatch = Layout::kWarpgroups == 3 ? 1 : kFragmentBatch<N>;

__device__ inline float (&as_one_set(float (&s)[N / 2]))[1][N / 2] { return reinterpret_cast<float(&)[1][N / 2]>(s); }

// Scores of the lane's two tokens in base 2, from the tile and the query.
__device__ inline void score_tile(const Params& p, const Shared& shared, const Place& place, LargestScales& largest,
                                  float (&s)[N / 2]) {
    const auto tile = shared.tile(place);
    const uint32_t query = shared.address() + Layout::kQuery;
    if constexpr (FORMAT == Format::kSixteenBit) {
        scores_16bit<Element, N>(s, tile, query);
#pragma unroll
        for (int i = 0; i < N / 2; ++i) s[i] *= p.scale_log2;
    } else if constexpr (FORMAT == Format::kFp8) {
        const auto load = [&](uint32_t(&raw)[4], int pair) { load_fp8(raw, tile, pair); };
        scores_8bit<N, 18, 18, kFragmentBatch<N>>(as_one_set(s), query, load, [](int) {});
#pragma unroll
        for (int i = 0; i < N / 2; ++i) s[i] *= shared.row_scale()[column_of(i / 4 * 2 + i % 2)];
    } else {
        largest.load(shared, place, token_of_lane());
        const GroupScales scales(shared, place, largest);
        const auto load = [&](uint32_t(&raw)[4], int pair) { load_latent(raw, tile, pair); };
        float rope[N / 2];
        if constexpr (kTwoSets) {
            float sets[2][N / 2];
            scores_rope<false>(rope, tile, query);
#pragma unroll
            for (int i = 0; i < N / 2; ++i) s[i] = 0.f;
            scores_8bit<N, 16, 4, kScoreBatch>(sets, query, load, [&](int group) {
                const float scale[2] = {scales.scale(group, 0), scales.scale(group, 1)};
#pragma unroll
                for (int i = 0; i < N / 2; ++i) s[i] += sets[group % 2][i] * scale[i / 2 % 2];
            });
            keep_in_order(rope);
        } else {
            scores_8bit<N, 16, 4, kScoreBatch>(as_one_set(s), query, load, [&](int group) {
                const float low = group < 3 ? scales.ratio(group, 0) : scales.scale(3, 0);
                const float high = group < 3 ? scales.ratio(group, 1) : scales.scale(3, 1);
#pragma unroll
                for (int i = 0; i < N / 2; ++i) s[i] *= i / 2 % 2 ? high : low;
            });
            scores_rope<true>(rope, tile, query);
        }
#pragma unroll
        for (int i = 0; i < N / 2; ++i)
            s[i] = s[i] * shared.row_scale()[column_of(i / 4 * 2 + i % 2)] + rope[i] * p.scale_log2;
    }
}

// P^T of the warp's 16 tokens to N rows of 64 tokens.
__device__ inline void put_weights(uint32_t to, const float (&w)[N / 2]) {
    const int lane = threadIdx.x % kWarp, unit = threadIdx.x / kWarp % 4 * 2 + lane / 8 % 2;
#pragma unroll
    for (int i = 0; i < N / 8; ++i) {
        const int row = i * 8 + lane % 8;
        stmatrix_x2_trans(to + row * 128 + ((unit ^ (row & 7)) << 4),
                          pack_16bit(w[4 * i], w[4 * i + 1], kElementIsFp16),
                          pack_16bit(w[4 * i + 2], w[4 * i + 3], kElementIsFp16));
    }
}

// Where this warpgroup's weights go.
__device__ inline uint32_t own_weights(const Shared& shared) {
    return shared.address() + Layout::kWeights +
           threadIdx.x / kWarpgroup * Layout::kWeightVersions * Layout::kWeightBytes;
}

// P^T relative to the running maximum, one version for each scale group.
__device__ inline void put_all_weights(const Shared& shared, const Place& place, uint32_t to,
                                       const float (&s)[N / 2]) {
    if constexpr (FORMAT == Format::kFp8DsMla) {
        const int token = token_of_lane();
        const float* from[2] = {scales_at(shared, place, token), scales_at(shared, place, token + 8)};
        float all[2] = {0.f, 0.f}, w[N / 2];  // of a token; one that has none may not be there, its scales anything
#pragma unroll
        for (int i = 0; i < N / 2; ++i) all[i / 2 % 2] += s[i];
#pragma unroll
        for (int group = 0; group < 4; ++group) {
            float scale[2];
#pragma unroll
            for (int half = 0; half < 2; ++half)
                scale[half] = all[half] > 0.f ? from[half][group] : 0.f;
#pragma unroll
            for (int i = 0; i < N / 2; ++i) w[i] = s[i] * scale[i / 2 % 2];
            put_weights(to + group * Layout::kWeightBytes, w);
        }
    } else {
        put_weights(to, s);
    }
}

__device__ inline float max_over_tokens(float x) {  // of a warp: lanes with the same columns
#pragma unroll
    for (int step = 4; step < kWarp; step <<= 1) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
    return x;
}

// Sums of the weights, [row][warp], and the rows' maxima, [warpgroup][row].
__device__ inline void put_sums(const Shared& shared, const float (&top)[kColumns], const float (&total)[kColumns]) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
        float sum = total[c];
#pragma unroll
        for (int step = 4; step < kWarp; step <<= 1) sum += __shfl_xor_sync(~0u, sum, step);
        if (threadIdx.x % kWarp < 4) shared.sums()[column_of(c) * Layout::kWarps + threadIdx.x / kWarp] = sum;
        if (threadIdx.x % kWarpgroup < 4) shared.tops()[threadIdx.x / kWarpgroup * N + column_of(c)] = top[c];
    }
}

template <int WARPGROUPS>
struct RowSum {  // of so many warpgroups: their sums are multiplied by `factor` to be relative to 2^top
    float top, total, factor[WARPGROUPS];
};
template <int WARPGROUPS>
__device__ inline RowSum<WARPGROUPS> sum_of_row(const Shared& shared, int n) {
    RowSum<WARPGROUPS> row;
    row.top = shared.tops()[n];
#pragma unroll
    for (int i = 1; i < WARPGROUPS; ++i) row.top = fmaxf(row.top, shared.tops()[i * N + n]);
    row.total = 0.f;
#pragma unroll
    for (int i = 0; i < WARPGROUPS; ++i) {
        const float4 four = *reinterpret_cast<const float4*>(shared.sums() + n * Layout::kWarps + 4 * i);
        row.factor[i] = exp2_approx(shared.tops()[i * N + n] - row.top);
        row.total += row.factor[i] * ((four.x + four.y) + (four.z + four.w));
    }
    return row;
}

template <int WARPGROUPS>
__device__ inline float norm_of(const RowSum<WARPGROUPS>& row) {
    return row.total > 0.f ? __fdividef(1.f, row.total) : 0.f;
}
template <int WARPGROUPS>
__device__ inline float log_sum_of(const RowSum<WARPGROUPS>& row) {
    return row.total > 0.f ? row.top + log2_approx(row.total) : -INFINITY;
}

__device__ inline float value_scale(const Params& p) { return FORMAT == Format::kSixteenBit ? 1.f : k_scale_of(p); }

__device__ inline void multiply_rows(float (&o)[4][N / 2], const float (&by)[kColumns]) {
#pragma unroll
    for (int block = 0; block < 4; ++block)
#pragma unroll
        for (int i = 0; i < N / 2; ++i) o[block][i] *= by[i / 4 * 2 + i % 2];
}

}  // namespace
