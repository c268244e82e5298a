// SPDX-License-Identifier: Apache-2.0
// The copying warp of the 64-row kernel: keeps the ring of tiles full.
#pragma once

#include "twowg_plan.cuh"

// Five dimensions: 64 columns, 8 tokens, 9 blocks of columns, groups of 8 tokens of a page, pages.
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

class Copier {
  public:
    __device__ explicit Copier(const Params& p) : p_(p) {}

    __device__ void run() {
        Ring<kTaskSlots> tasks;
        for (;; tasks.advance()) {
            mbarrier_wait(Shared::task_full(tasks.at()), tasks.phase());
            const Task& task = Shared::task(tasks.at());
            if (task.step == Step::kEnd) break;
            if (task.step == Step::kAttend) copy_item(task.item);
            __syncwarp();
            warp_arrive(Shared::task_empty(tasks.at()));
        }
    }

  private:
    // The tiles of an item, one box a lane. Two CTAs of a cluster take turns at the quarters of a tile, and at the rope
    // blocks, and copy to both. They follow the same schedule, so each knows how many bytes arrive from either.
    __device__ void copy_item(const Item& item) {
        const int lane = threadIdx.x % kWarp;
        const int boxes = kTile / box_tokens();  // of a tile
        const int ahead = kWarp / boxes;         // tiles whose pages the warp looks up at once
        for (int first = item.tile_begin; first < item.tile_end; first += ahead) {
            const int mine = first + lane / boxes, token = mine * kTile + lane % boxes * box_tokens();
            const int entry = divide(token, p_.page_size), group = (token - entry * p_.page_size) / 8;
            const bool live = mine < item.tile_end && token < item.seq_len;
            const int page = live ? p_.block_table[item.request * p_.table_stride + entry] : 0;
            for (int tile = first; tile < min(first + ahead, item.tile_end); ++tile)
                copy_tile(item.seq_len - tile * kTile, live && mine == tile, page, group);
        }
    }

    // `mine`: this lane copies its box, which begins with a group of 8 tokens of a page.
    __device__ void copy_tile(int tokens, bool mine, int page, int group) {
        const int box = threadIdx.x % kWarp % (kTile / box_tokens()) * box_tokens();
        const int copied = (min(tokens, kTile) + box_tokens() - 1) & -box_tokens();
        if (FUSEDMLA_PREFETCH && mine) {  // into L2 what has to wait longest for a slot
            if (is_mine(3)) tma_prefetch_5d(&p_.latent, 0, 0, 6, group, page, policy());
            if (is_mine(rope_.phase())) tma_prefetch_5d(&p_.rope, 0, 0, 8, group, page, policy());
        }
#pragma unroll 1
        for (int quarter = 0; quarter < 4; ++quarter) {
            const uint32_t full = Shared::quarter_full(quarters_.at());
            open(Shared::quarter_empty(quarters_.at()), full, quarters_.phase(), copied * 256);
            if (mine && is_mine(quarter))
                load(Shared::quarter(quarters_.at()) + box * 256, &p_.latent, full, quarter * 2, group, page);
            quarters_.advance();
        }
        const uint32_t full = Shared::rope_full();
        open(Shared::rope_empty(), full, rope_.phase(), copied * 128);
        if (mine && is_mine(rope_.phase())) load(Shared::rope() + box * 128, &p_.rope, full, 8, group, page);
        rope_.advance();
    }

    // Of a copy: the largest power of two up to 64 that divides page_size. The tensor maps must agree.
    __device__ int box_tokens() const { return min(p_.page_size & -p_.page_size, kTile); }

    // Waits until a slot is empty and says how many bytes will fill it.
    __device__ void open(uint32_t empty, uint32_t full, uint32_t phase, int bytes) const {
        mbarrier_wait(empty, phase ^ 1);
        if (threadIdx.x % kWarp == 0) mbarrier_expect_tx(full, bytes);
        __syncwarp();
    }

    __device__ bool is_mine(uint32_t turn) const { return kCluster == 1 || cluster_cta_rank() == turn % 2; }

    __device__ void load(uint32_t to, const TensorMap* map, uint32_t full, int block, int group, int page) const {
        if constexpr (kCluster == 1)
            tma_load_5d(to, map, full, 0, 0, block, group, page, policy());
        else
            tma_load_5d_multicast(to, map, full, (1 << kCluster) - 1, 0, 0, block, group, page, policy());
    }

    // The cache is read once if all rows are here.
    __device__ static constexpr uint64_t policy() { return kEvictNormal; }  // evict-first costs read rate

    const Params& p_;
    Ring<kQuarterSlots> quarters_;
    Ring<1> rope_;
};
