// SPDX-License-Identifier: Apache-2.0
// What the kernels use of CUDA C++, for a host's compiler: qualifiers, types, built-in variables, intrinsics.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "machine.hpp"

#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define shared_memory (machine::the().cta->memory)

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };

#define threadIdx (machine::the().thread_index)
#define blockIdx (machine::the().cta->index)
#define gridDim (machine::the().grid)

// ---- numbers ----

template <typename To, typename From>
inline To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

struct __half { _Float16 value; };
struct __half2 { __half x, y; };
struct __nv_bfloat16 { uint16_t bits; };
struct __nv_bfloat162 { __nv_bfloat16 x, y; };

inline float __half2float(__half x) { return x.value; }
inline __half __float2half_rn(float x) { return {_Float16(x)}; }
inline __half __ushort_as_half(uint16_t bits) { return bits_as<__half>(bits); }
inline float2 __half22float2(__half2 x) { return {x.x.value, x.y.value}; }

inline float number(__half x) { return x.value; }
inline float number(__nv_bfloat16 x) { return bits_as<float>(uint32_t{x.bits} << 16); }
inline void round_to(__half& to, float x) { to.value = _Float16(x); }
inline void round_to(__nv_bfloat16& to, float x) {
    const uint32_t bits = bits_as<uint32_t>(x);
    to.bits = x != x ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
template <typename Two, typename Act>
inline Two each_of_two(Two a, Two b, const Act& act) {
    Two result;
    round_to(result.x, act(number(a.x), number(b.x)));
    round_to(result.y, act(number(a.y), number(b.y)));
    return result;
}
template <typename Two>
inline Two __habs2(Two a) { return bits_as<Two>(bits_as<uint32_t>(a) & 0x7FFF7FFF); }
template <typename Two>
inline Two __hmax2(Two a, Two b) { return each_of_two(a, b, [](float x, float y) { return std::fmax(x, y); }); }
template <typename Two>
inline Two __hmul2(Two a, Two b) { return each_of_two(a, b, [](float x, float y) { return x * y; }); }

inline float __uint_as_float(uint32_t bits) { return bits_as<float>(bits); }
inline float __int_as_float(int bits) { return bits_as<float>(bits); }
inline int __float_as_int(float x) { return bits_as<int>(x); }
inline unsigned __float_as_uint(float x) { return bits_as<unsigned>(x); }
template <typename T>
inline T atomicMax(T* to, T value) { return std::exchange(*to, std::max(*to, value)); }
template <typename T>
inline T atomicMin(T* to, T value) { return std::exchange(*to, std::min(*to, value)); }
inline float __fdividef(float a, float b) { return a / b; }

template <typename A, typename B>
inline auto min(A a, B b) { using T = std::common_type_t<A, B>; return T(a) < T(b) ? T(a) : T(b); }
template <typename A, typename B>
inline auto max(A a, B b) { using T = std::common_type_t<A, B>; return T(a) < T(b) ? T(b) : T(a); }
using std::fmaf;

inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return uint64_t{a} * b >> 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline uint32_t __vmaxu2(uint32_t a, uint32_t b) {
    return std::max(a & 0xFFFF, b & 0xFFFF) | std::max(a >> 16, b >> 16) << 16;
}
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = uint64_t{b} << 32 | a;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) result |= uint32_t(bytes >> (selector >> 4 * i & 7) * 8 & 0xFF) << 8 * i;
    return result;
}

// ---- threads together ----

inline void __syncthreads() { machine::named_barrier(0, machine::the().threads, true); }
inline void __syncwarp() { machine::exchange(0); }
inline void __nanosleep(unsigned) { machine::poll(); }

template <typename T>
inline T shuffle(T x, int source) {
    uint64_t bits = 0;
    std::memcpy(&bits, &x, sizeof x);
    const uint64_t got = machine::exchange(bits)[source & 31];
    std::memcpy(&x, &got, sizeof x);
    return x;
}
template <typename T>
inline T __shfl_sync(uint32_t, T x, int source) { return shuffle(x, source); }
template <typename T>
inline T __shfl_xor_sync(uint32_t, T x, int distance) { return shuffle(x, machine::lane() ^ distance); }
template <typename T>
inline T __shfl_up_sync(uint32_t, T x, int distance) {
    const int source = machine::lane() - distance;
    return shuffle(x, source < 0 ? machine::lane() : source);
}
inline uint32_t __ballot_sync(uint32_t, bool x) {
    uint32_t mask = 0;
    const auto& all = machine::exchange(x);
    for (int i = 0; i < 32; ++i) mask |= uint32_t(all[i]) << i;
    return mask;
}
inline bool __any_sync(uint32_t, bool x) { return __ballot_sync(~0u, x) != 0; }
inline bool __all_sync(uint32_t, bool x) { return __ballot_sync(~0u, x) == ~0u; }
template <typename T>
inline T __reduce_max_sync(uint32_t, T x) {
    const auto all = machine::exchange(uint32_t(x));
    T most = T(uint32_t(all[0]));
    for (uint64_t other : all) most = std::max(most, T(uint32_t(other)));
    return most;
}
template <typename T>
inline T __reduce_add_sync(uint32_t, T x) {
    T sum = 0;
    for (uint64_t other : machine::exchange(uint32_t(x))) sum += T(uint32_t(other));
    return sum;
}

// ---- global memory ----

template <typename T>
inline T __ldcg(const T* from) { return *from; }
template <typename T>
inline void __stcg(T* to, const T& x) { *to = x; }
