// SPDX-License-Identifier: Apache-2.0
// In the place of the kernels' ptx_copy.cuh. A tensor map is what emulated.py writes, not the driver's encoding.
#pragma once

#include "ptx.cuh"

struct alignas(64) TensorMap {
    const uint8_t* start;
    int32_t element_bytes, dims;
    uint64_t shape[5];   // elements, innermost first
    uint64_t stride[4];  // bytes, of all but the innermost
    int32_t box[5];
    int32_t swizzle;  // bytes: 0, 64, 128
};
static_assert(sizeof(TensorMap) == 128);

constexpr uint64_t kEvictFirst = 0, kEvictNormal = 0;

// Where the hardware puts a byte: 16-byte units of a span of 64 or 128 bytes change places by the address bits above.
inline uint32_t swizzled(uint32_t address, int span) {
    return span == 128 ? address ^ (address >> 7 & 7) << 4 : span == 64 ? address ^ (address >> 7 & 3) << 4 : address;
}

// A box into the shared memory of all CTAs in the mask; zeros where it reaches beyond the tensor.
inline void load_box(uint32_t smem, const TensorMap* map, uint32_t barrier, uint32_t ctas, std::array<int, 5> first) {
    const machine::Cta* cta = machine::the().cta;
    if (smem % 128) machine::fail("a copy's target is not aligned");
    machine::sometime([=, map = *map] {
        int total = map.element_bytes;
        for (int d = 0; d < map.dims; ++d) total *= map.box[d];
        std::array<int, 5> at{};
        for (int done = 0; done < total;) {
            const int row = map.box[0] * map.element_bytes;
            const uint8_t* from = map.start + int64_t{first[0]} * map.element_bytes;
            bool inside = true;
            for (int d = 1; d < map.dims; ++d) {
                const int64_t index = first[d] + at[d];
                inside &= index >= 0 && uint64_t(index) < map.shape[d];
                from += index * int64_t(map.stride[d - 1]);
            }
            for (int unit = 0; unit < row; unit += 16)
                for (int rank = 0; rank < 32; ++rank) {
                    if (!(ctas >> rank & 1)) continue;
                    const uint32_t to = swizzled(machine::address_in(smem, 0) + done + unit, map.swizzle);
                    uint8_t* target = machine::at(*cta, machine::address_in(to, rank), 16);
                    inside ? void(std::memcpy(target, from + unit, 16)) : void(std::memset(target, 0, 16));
                }
            done += row;
            for (int d = 1; d < map.dims && ++at[d] == map.box[d]; ++d) at[d] = 0;
        }
        for (int rank = 0; rank < 32; ++rank)
            if (ctas >> rank & 1) machine::complete(machine::mbarrier(*cta, machine::address_in(barrier, rank)), total);
    });
}
inline void tma_prefetch(const TensorMap*) {}
inline void tma_load_3d(uint32_t smem, const TensorMap* map, uint32_t barrier, int x, int y, int z, uint64_t) {
    load_box(smem, map, barrier, 1u << cluster_cta_rank(), {x, y, z});
}
inline void tma_load_5d(
    uint32_t smem, const TensorMap* map, uint32_t barrier, int x, int y, int z, int w, int v, uint64_t) {
    load_box(smem, map, barrier, 1u << cluster_cta_rank(), {x, y, z, w, v});
}
inline void tma_load_5d_multicast(uint32_t smem, const TensorMap* map, uint32_t barrier, uint16_t cta_mask, int x, int y,
                                  int z, int w, int v, uint64_t) {
    load_box(smem, map, barrier, cta_mask, {x, y, z, w, v});
}
inline void tma_prefetch_5d(const TensorMap*, int, int, int, int, int, uint64_t) {}

inline void bulk_load(uint32_t smem, const void* from, uint32_t bytes, uint32_t barrier, uint64_t = 0) {
    const machine::Cta* cta = machine::the().cta;
    if (smem % 16 || bytes % 16 || reinterpret_cast<uintptr_t>(from) % 16) machine::fail("a bulk copy is not aligned");
    machine::sometime([=] {
        std::memcpy(machine::at(*cta, smem, int(bytes)), from, bytes);
        machine::complete(machine::mbarrier(*cta, barrier), int(bytes));
    });
}
inline void prefetch_bulk(const void*, uint32_t) {}
inline void prefetch_line(const void*) {}

// ---- asynchronous copies of 16 bytes ----

inline machine::Groups& own_copies() {
    machine::Groups& groups = machine::the().thread->copies;
    if (groups.empty()) groups.emplace_back();
    return groups;
}
inline void copy_16_async(uint32_t to, const void* from, bool live) {
    if (to % 16 || (live && reinterpret_cast<uintptr_t>(from) % 16)) machine::fail("a copy is not aligned");
    const machine::Cta* cta = machine::the().cta;
    own_copies().back().push_back([=] {
        uint8_t* target = machine::at(*cta, to, 16);
        live ? void(std::memcpy(target, from, 16)) : void(std::memset(target, 0, 16));
    });
}
inline void commit_async_copies() { machine::close_group(own_copies()); }
template <int PENDING>
inline void wait_for_async_copies() { machine::finish_groups(own_copies(), PENDING); }
inline void arrive_with_copies(uint32_t full) {
    const machine::Cta* cta = machine::the().cta;
    machine::Groups copies = std::move(own_copies());
    machine::the().thread->copies.clear();
    machine::sometime([=] {
        for (const auto& group : copies)
            for (const auto& copy : group) copy();
        machine::arrive(machine::mbarrier(*cta, full));
    });
}

// ---- stores to a CTA of the cluster, whose barrier counts the bytes ----

template <size_t COUNT>
inline void send_all(uint32_t to, uint32_t barrier, std::array<float, COUNT> values) {
    const machine::Cta* cta = machine::the().cta;
    machine::sometime([=] {
        std::memcpy(machine::at(*cta, to, sizeof values), values.data(), sizeof values);
        machine::complete(machine::mbarrier(*cta, barrier), sizeof values);
    });
}
inline void send(uint32_t to, uint32_t barrier, float a, float b, float c, float d) {
    send_all<4>(to, barrier, {a, b, c, d});
}
inline void send(uint32_t to, uint32_t barrier, float a, float b) { send_all<2>(to, barrier, {a, b}); }
