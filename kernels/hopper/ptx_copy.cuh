// SPDX-License-Identifier: Apache-2.0
// Thin wrappers of the PTX instructions that copy without registers, as those in ptx.cuh.
#pragma once

#include "ptx.cuh"

struct alignas(64) TensorMap {
    uint8_t bytes[128];
};

// ---- bulk tensor copies (TMA) ----

constexpr uint64_t kEvictFirst = 0x12F0000000000000;  // L2 policies as createpolicy would encode them
constexpr uint64_t kEvictNormal = 0x1000000000000000;

__device__ inline void tma_prefetch(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
__device__ inline void tma_load_3d(
    uint32_t smem, const TensorMap* map, uint32_t barrier, int x, int y, int z, uint64_t policy) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(smem),
        "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z), "l"(policy)
        : "memory");
}
__device__ inline void tma_load_5d(
    uint32_t smem, const TensorMap* map, uint32_t barrier, int x, int y, int z, int w, int v, uint64_t policy) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(smem),
        "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(w), "r"(v), "l"(policy)
        : "memory");
}
__device__ inline void tma_load_5d_multicast(
    uint32_t smem, const TensorMap* map, uint32_t barrier, uint16_t cta_mask, int x, int y, int z, int w, int v,
    uint64_t policy) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint"
        " [%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8, %9;" ::"r"(smem),
        "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(w), "r"(v), "h"(cta_mask), "l"(policy)
        : "memory");
}
__device__ inline void tma_prefetch_5d(const TensorMap* map, int x, int y, int z, int w, int v, uint64_t policy) {
    asm volatile(
        "cp.async.bulk.prefetch.tensor.5d.L2.global.tile.L2::cache_hint [%0, {%1, %2, %3, %4, %5}], %6;" ::"l"(map),
        "r"(x), "r"(y), "r"(z), "r"(w), "r"(v), "l"(policy)
        : "memory");
}

// ---- bulk copies ----

// `bytes` contiguous bytes, a multiple of 16, from global to shared memory.
__device__ inline void bulk_load(uint32_t smem, const void* from, uint32_t bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(smem),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}
__device__ inline void bulk_load(uint32_t smem, const void* from, uint32_t bytes, uint32_t barrier, uint64_t policy) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
            "r"(smem),
        "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
        : "memory");
}
__device__ inline void prefetch_line(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }

// ---- asynchronous copies of 16 bytes ----

// 16 bytes from global to shared memory, past the registers; zeros if not `live`.
__device__ inline void copy_16_async(uint32_t to, const void* from, bool live) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(live ? 16 : 0) : "memory");
}
__device__ inline void commit_async_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for this thread's copies, but for those of the last PENDING groups.
template <int PENDING>
__device__ inline void wait_for_async_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
// Arrives when this thread's copies have. What they bring is no operand yet: the reader has to fence.
__device__ inline void arrive_with_copies(uint32_t full) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(full) : "memory");
}

// ---- stores to a CTA of the cluster, whose barrier counts the bytes ----

__device__ inline void send(uint32_t to, uint32_t barrier, float a, float b, float c, float d) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
                 "f"(a), "f"(b), "f"(c), "f"(d), "r"(barrier)
                 : "memory");
}
__device__ inline void send(uint32_t to, uint32_t barrier, float a, float b) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(to), "f"(a),
                 "f"(b), "r"(barrier)
                 : "memory");
}
