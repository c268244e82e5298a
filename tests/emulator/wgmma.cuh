// SPDX-License-Identifier: Apache-2.0
// In the place of the kernels' wgmma.cuh. Each warp multiplies its 16 rows by itself, at some time until it waits.
#pragma once

#include "ptx_copy.cuh"

inline machine::Groups& own_products() {
    machine::Groups& groups = machine::the().thread->warp->products;
    if (groups.empty()) groups.emplace_back();
    return groups;
}
inline bool is_last_lane() { return machine::lane() == kWarp - 1; }

inline void wgmma_fence() { __syncwarp(); }
inline void wgmma_commit() {
    __syncwarp();
    if (is_last_lane()) machine::close_group(own_products());
    __syncwarp();
}
template <int PENDING>
inline void wgmma_wait() {
    __syncwarp();
    if (is_last_lane()) machine::finish_groups(own_products(), PENDING);
    __syncwarp();
}
template <int COUNT>
inline void keep_in_order(float (&)[COUNT]) {}

// Where elements of a descriptor's operand lie: `row` along m or n, k; of `size` bytes.
struct Operand {
    const machine::Cta* cta;
    uint64_t descriptor;
    bool row_contiguous;  // else k is
    int size;

    const uint8_t* at(int row, int k) const {
        const uint32_t start = (descriptor & 0x3FFF) << 4, leading = (descriptor >> 16 & 0x3FFF) << 4;
        const uint32_t stride = (descriptor >> 32 & 0x3FFF) << 4;
        const int span = descriptor >> 62 == 1 ? 128 : 64, across = row_contiguous ? row : k, along = row_contiguous ? k : row;
        const int per_span = span / size;
        const uint32_t linear = start + along / 8 * stride + along % 8 * span + across % per_span * size +
                                (across / per_span > 0 ? across / per_span * leading : 0);
        return machine::at(*cta, machine::address_in(swizzled(linear, span), cta->rank), size);
    }
    template <typename T>
    float value(int row, int k) const {
        const uint8_t* from = at(row, k);
        if (size == 1) return e4m3_values()[*from];
        uint16_t bits;
        std::memcpy(&bits, from, 2);
        return std::is_same_v<T, fp16> ? float(bits_as<_Float16>(bits)) : bits_as<float>(uint32_t{bits} << 16);
    }
};

// A warp's rows of D += A B, all of its lanes'. T: fp16, bf16, or uint8_t for e4m3.
template <typename T, int N, int K>
struct ProductOfWarp {
    static constexpr int kSize = sizeof(T);
    std::array<float*, kWarp> d;
    std::array<std::array<uint32_t, 4>, kWarp> fragments;
    Operand a, b;
    bool a_in_registers, accumulate;
    int warp;

    float a_value(int row, int k) const {
        if (!a_in_registers) return a.value<T>(warp * 16 + row, k);
        constexpr int kOfWord = 4 / kSize, kHalf = 4 * kOfWord;
        const uint32_t word = fragments[row % 8 * 4 + k % kHalf / kOfWord][k / kHalf * 2 + row / 8];
        const uint32_t bits = word >> k % kOfWord * 8 * kSize;
        if constexpr (kSize == 1) return e4m3_values()[bits & 0xFF];
        else if constexpr (std::is_same_v<T, fp16>) return float(bits_as<_Float16>(uint16_t(bits)));
        else return bits_as<float>(bits << 16);
    }
    void operator()() const {
        static float right[K][N];
        for (int k = 0; k < K; ++k)
            for (int n = 0; n < N; ++n) right[k][n] = b.value<T>(n, k);
        for (int row = 0; row < 16; ++row) {
            float sum[N] = {};
            for (int k = 0; k < K; ++k) {
                const float left = a_value(row, k);
                for (int n = 0; n < N; ++n) sum[n] += left * right[k][n];
            }
            for (int n = 0; n < N; ++n) {
                float& to = d[row % 8 * 4 + n % 8 / 2][n / 8 * 4 + row / 8 * 2 + n % 2];
                to = accumulate ? to + sum[n] : sum[n];
            }
        }
    }
};

template <typename T, int N, int K, int R>
inline void multiply(float (&d)[R], const uint32_t* fragments, uint64_t a, bool a_transposed, uint64_t b,
                     bool b_transposed, bool accumulate) {
    static_assert(R == N / 2);
    const machine::Cta* cta = machine::the().cta;
    const std::array<uint64_t, 32> to = machine::exchange(reinterpret_cast<uint64_t>(&d[0]));
    ProductOfWarp<T, N, K> product = {{}, {}, {cta, a, a_transposed, sizeof(T)}, {cta, b, b_transposed, sizeof(T)},
                                      fragments != nullptr, accumulate, int(threadIdx.x / kWarp % 4)};
    for (int i = 0; i < 4; ++i) {
        const std::array<uint64_t, 32> words = machine::exchange(fragments ? fragments[i] : 0);
        for (int lane = 0; lane < kWarp; ++lane) product.fragments[lane][i] = uint32_t(words[lane]);
    }
    for (int lane = 0; lane < kWarp; ++lane) product.d[lane] = reinterpret_cast<float*>(to[lane]);
    if (is_last_lane()) own_products().back().push_back(product);
    __syncwarp();
}

template <typename T, int N>
struct Wgmma {
    template <bool TRANSPOSE_A, int R>
    static void shared(float (&d)[R], uint64_t a, uint64_t b, bool accumulate) {
        multiply<T, N, 16>(d, nullptr, a, TRANSPOSE_A, b, false, accumulate);
    }
    template <int R>  // not N / 2, of which a host's compiler would complain where the call is never made
    static void registers(float (&d)[R], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
        multiply<T, N, 16>(d, a, 0, false, b, false, accumulate);
    }
};
template <typename T>
inline void wgmma_128(float (&d)[64], const uint32_t (&a)[4], uint64_t b, T) {
    multiply<T, 128, 16>(d, a, 0, false, b, true, true);
}
inline void wgmma_e4m3_128(float (&d)[64], uint64_t a, uint64_t b, bool accumulate) {
    multiply<uint8_t, 128, 32>(d, nullptr, a, false, b, false, accumulate);
}
inline void wgmma_e4m3_32(float (&d)[16], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    multiply<uint8_t, 32, 32>(d, a, 0, false, b, false, accumulate);
}
