// SPDX-License-Identifier: Apache-2.0
// In the place of the kernels' ptx.cuh: the same functions, for the machine of machine.hpp.
#pragma once

#include "cuda.hpp"

using bf16 = __nv_bfloat16;
using fp16 = __half;

constexpr int kWarp = 32;
constexpr int kWarpgroup = 128;

inline uint32_t smem_address(const void* p) { return machine::address_of(p); }

// ---- mbarrier ----

inline void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
    machine::mbarrier(barrier) = {0, int64_t(arrivals), int64_t(arrivals), 0, 0};
}
inline void fence_mbarrier_init() {}
inline void mbarrier_expect_tx(uint32_t barrier, uint32_t bytes) {
    machine::mbarrier(barrier).bytes += bytes;
    machine::arrive(machine::mbarrier(barrier));
}
inline void mbarrier_arrive(uint32_t barrier) { machine::arrive(machine::mbarrier(barrier)); }
inline void mbarrier_arrive_in(uint32_t barrier, uint32_t rank) { mbarrier_arrive(machine::address_in(barrier, int(rank))); }
inline bool mbarrier_test(uint32_t barrier, uint32_t parity) { return machine::mbarrier(barrier).phase != parity; }
inline void mbarrier_wait(uint32_t barrier, uint32_t parity) {
    const machine::Mbarrier& of = machine::mbarrier(barrier);
    machine::wait_until("an mbarrier", [&] { return of.phase != parity; });
}

// ---- ordering ----

inline void fence_proxy_async() {}
inline void fence_proxy_async_global() {}
inline void named_barrier_sync(int id, int threads) { machine::named_barrier(id, threads, true); }
inline void named_barrier_arrive(int id, int threads) { machine::named_barrier(id, threads, false); }
inline bool named_barrier_any(int id, int threads, bool condition) {
    return machine::named_barrier(id, threads, true, condition);
}
inline uint32_t cluster_cta_rank() { return machine::the().cta->rank; }
inline int cluster_size() { return int(machine::the().cta->cluster->ctas.size()); }
inline void cluster_arrive() { machine::cluster_arrive(); }
inline void cluster_arrive_relaxed() { machine::cluster_arrive(); }
inline void cluster_wait() { machine::cluster_wait(); }
inline void cluster_sync() { cluster_arrive(), cluster_wait(); }
inline uint32_t address_in(uint32_t smem, int rank) { return machine::address_in(smem, rank); }
inline int cluster_id() { return int(blockIdx.x) / cluster_size(); }
inline unsigned thread_anew() { return threadIdx.x; }
inline int block_x_anew() { return blockIdx.x; }
inline int grid_x_anew() { return gridDim.x; }
inline int block_y_anew() { return blockIdx.y; }
inline void launch_dependents() {}
inline void wait_for_predecessor() {}
template <int COUNT>
inline void raise_registers() { __syncwarp(); }
template <int COUNT>
inline void lower_registers() { __syncwarp(); }

// ---- global memory between CTAs ----

inline void count_release(unsigned* p, unsigned last) { *p = *p >= last ? 0 : *p + 1; }
inline void count_relaxed(unsigned* p, unsigned last) { count_release(p, last); }
inline unsigned load_acquire(const unsigned* p) { return *p; }

// ---- arithmetic ----

inline float exp2_approx(float x) { return exp2f(x); }
inline float log2_approx(float x) { return std::log2(x); }
inline int divide(int a, int b) { return a / b; }

inline uint16_t to_bf16(float x) {
    const uint32_t bits = bits_as<uint32_t>(x);
    if ((bits & 0x7FFFFFFF) > 0x7F800000) return 0x7FFF;
    return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
inline uint32_t pack_16bit(float low, float high, bool to_fp16) {
    const auto one = [&](float x) { return to_fp16 ? bits_as<uint16_t>(_Float16(x)) : to_bf16(x); };
    return one(low) | uint32_t{one(high)} << 16;
}

inline const std::array<float, 256>& e4m3_values() {
    static const auto values = [] {
        std::array<float, 256> all;
        for (int code = 0; code < 256; ++code) {
            const int exponent = code >> 3 & 15, mantissa = code & 7;
            const float size = exponent ? std::ldexp(float(8 + mantissa), exponent - 10) : std::ldexp(float(mantissa), -9);
            all[code] = (code & 0x7F) == 0x7F ? NAN : code & 0x80 ? -size : size;
        }
        return all;
    }();
    return values;
}
inline uint8_t to_e4m3(float x) {  // to the nearest, of two the even one; beyond the largest, to that
    if (std::isnan(x)) return 0x7F;
    const float size = std::min(std::fabs(x), 448.f);
    int code = 0;
    while (code < 0x7E && e4m3_values()[code + 1] <= size) ++code;
    if (code < 0x7E) {
        const float below = size - e4m3_values()[code], above = e4m3_values()[code + 1] - size;
        if (above < below || (above == below && code % 2)) ++code;
    }
    return uint8_t(code | (std::signbit(x) ? 0x80 : 0));
}
inline uint32_t pack_e4m3(float low, float high) { return to_e4m3(low) | uint32_t{to_e4m3(high)} << 8; }
inline void widen(uint32_t codes, uint32_t& low, uint32_t& high) {
    const auto two = [](uint32_t pair) {
        return pack_16bit(e4m3_values()[pair & 0xFF], e4m3_values()[pair >> 8 & 0xFF], true);
    };
    low = two(codes & 0xFFFF), high = two(codes >> 16);
}

// ---- shared memory fragments: of 8 x 8 matrices of 16 bits, whose rows' addresses the lanes give ----

inline uint16_t element_at(uint64_t row, int column) {
    uint16_t element;
    std::memcpy(&element, machine::at(uint32_t(row), 16) + 2 * column, 2);
    return element;
}
inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
    const auto rows = machine::exchange(address);
    const int g = machine::lane() / 4, j = machine::lane() % 4;
    for (int i = 0; i < 4; ++i)
        r[i] = element_at(rows[8 * i + g], 2 * j) | uint32_t{element_at(rows[8 * i + g], 2 * j + 1)} << 16;
    __syncwarp();
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
    const auto rows = machine::exchange(address);
    const int g = machine::lane() / 4, j = machine::lane() % 4;
    for (int i = 0; i < 4; ++i)
        r[i] = element_at(rows[8 * i + 2 * j], g) | uint32_t{element_at(rows[8 * i + 2 * j + 1], g)} << 16;
    __syncwarp();
}
inline void stmatrix_x2_trans(uint32_t address, uint32_t r0, uint32_t r1) {
    const auto rows = machine::exchange(address);
    const int g = machine::lane() / 4, j = machine::lane() % 4;
    const uint32_t words[2] = {r0, r1};
    for (int i = 0; i < 2; ++i)
        for (int k = 0; k < 2; ++k) {
            const auto element = uint16_t(words[i] >> 16 * k);
            std::memcpy(machine::at(uint32_t(rows[8 * i + 2 * j + k]), 16) + 2 * g, &element, 2);
        }
    __syncwarp();
}
