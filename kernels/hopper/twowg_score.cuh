// SPDX-License-Identifier: Apache-2.0
// The scoring warpgroup of the 64-row kernel: S = Q K^T, the online softmax, and P for the multiplying warpgroups.
//
// Most of the query (96 registers a thread) stays in registers for a whole item: at 64 x 64 x 16 wgmma would otherwise
// read as many bytes of Q as of K from shared memory, all that it can deliver, and 48 KiB would be lost to the ring.
// A lane 4g + j of warp w holds rows 16w + g and 16w + g + 8 of everything.
#pragma once

#include "twowg_plan.cuh"
#include "twowg_wgmma.cuh"

// 16 bytes from global to shared memory, past the registers; zeros if not `live`.
__device__ inline void copy_16_async(uint32_t to, const void* from, bool live) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(live ? 16 : 0) : "memory");
}
__device__ inline void wait_for_async_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

template <typename Element>
class Scorer {
  public:
    __device__ explicit Scorer(const Params& p)
        : p_(p), row0_(blockIdx.x * kRows + threadIdx.x % kWarpgroup / kWarp * 16 + threadIdx.x % kWarp / 4) {}

    __device__ void run() {
        Ring<kTaskSlots> tasks;
        for (;; tasks.advance()) {
            mbarrier_wait(Shared::task_full(tasks.at()), tasks.phase());
            const Task& task = Shared::task(tasks.at());
            if (task.step == Step::kEnd) break;
            if (task.step == Step::kAttend) attend(task.item);
            __syncwarp();
            warp_arrive(Shared::task_empty(tasks.at()));
        }
    }

  private:
    __device__ void attend(const Item& item) {
        load_query(item.request);
        top_[0] = top_[1] = -1e30f;  // finite, so that a row without keys makes no NaN
        total_[0] = total_[1] = 0.f;
        for (int tile = item.tile_begin; tile < item.tile_end; ++tile) {
            float s[32];
            score(s);
            release_held();
            weigh(s, item.seq_len - tile * kTile);
        }
        release_held();
        finish(item);
    }

    // This lane's part of one of its rows of the query, 16 of each 64 bytes; null past the last row.
    __device__ const uint4* query_row(const void* q, const Strides& stride, int request, int half) const {
        const int row = row0_ + 8 * half, token = divide(row, p_.h_q), head = row - token * p_.h_q;
        if (row >= p_.s_q * p_.h_q) return nullptr;
        const auto* at = static_cast<const uint16_t*>(q) + request * stride.b + token * stride.s + head * stride.h;
        return reinterpret_cast<const uint4*>(at) + threadIdx.x % 4;
    }

    __device__ void load_query(int request) {
        constexpr int kInRegisters = kQueryQuarters * 4, kInShared = 16 - kInRegisters;  // units of 64 bytes of a row
        named_barrier_sync(kScorerBarrier, kWarpgroup);  // all have done with the query of the item before
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = threadIdx.x % kWarpgroup / kWarp * 16 + threadIdx.x % kWarp / 4 + 8 * half;
            const uint4* nope = query_row(p_.q_nope, p_.q_nope_stride, request, half);
            const uint4* rope = query_row(p_.q_rope, p_.q_rope_stride, request, half);
#pragma unroll
            for (int i = 0; i < kInShared + 2; ++i) {
                const int unit = i % 2 * 4 + threadIdx.x % 4;  // of 16 bytes, of the 128 of a row of a block
                const uint4* from = i < kInShared ? nope + (kInRegisters + i) * 4 : rope + (i - kInShared) * 4;
                copy_16_async(Shared::query() + i / 2 * kBlockBytes + row * 128 + ((unit ^ (row & 7)) << 4),
                              nope ? from : p_.q_nope, nope != nullptr);
            }
#pragma unroll
            for (int i = 0; i < kInRegisters; ++i) {
                const uint4 bits = nope ? __ldg(nope + i * 4) : uint4{0, 0, 0, 0};
                query_[2 * i][half] = bits.x, query_[2 * i][half + 2] = bits.y;
                query_[2 * i + 1][half] = bits.z, query_[2 * i + 1][half + 2] = bits.w;
            }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int i = 0; i < kInRegisters; ++i)  // from 16 bytes a lane to fragments
                transpose_quad(query_[2 * i][half], query_[2 * i][half + 2], query_[2 * i + 1][half],
                               query_[2 * i + 1][half + 2]);
        wait_for_async_copies();
        fence_proxy_async();
        named_barrier_sync(kScorerBarrier, kWarpgroup);
    }

    // S of the next tile, unscaled. Returns when it is there.
    __device__ void score(float (&s)[32]) {
        using Mma = Wgmma<Element, kTile>;
        constexpr uint32_t kBlock = kBlockBytes >> 4, kAtom = kAtomBytes >> 4;
        uint32_t query = units_of(Shared::query());  // of the part in shared memory the next block
        keep_in_order(s);
#pragma unroll
        for (int quarter = 0; quarter < 4; ++quarter) {
            mbarrier_wait(Shared::quarter_full(quarters_.at()), quarters_.phase());
            const uint32_t keys = units_of(Shared::quarter(quarters_.at()));
            quarters_.advance();
            wgmma_fence();
#pragma unroll
            for (int step = 0; step < 8; ++step) {  // 16 columns are 32 bytes, 2 units
                const uint64_t k = descriptor<kGroupBytes>(keys + step / 4 * kAtom + step % 4 * 2);
                const uint64_t q = descriptor<kAtomBytes>(query + step / 4 * kBlock + step % 4 * 2);
                if (quarter < kQueryQuarters)
                    Mma::registers(s, query_[quarter * 8 + step], k, quarter + step > 0);
                else
                    Mma::template shared<false>(s, q, k, quarter + step > 0);
            }
            if (quarter >= kQueryQuarters) query += 2 * kBlock;
        }
        mbarrier_wait(Shared::rope_full(), rope_.phase());
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < 4; ++step)
            Mma::template shared<false>(s, descriptor<kAtomBytes>(query + step * 2),
                                        descriptor<kAtomBytes>(units_of(Shared::rope()) + step * 2), true);
        wgmma_commit();
        wgmma_wait<0>();
        keep_in_order(s);
        warp_arrive_cluster(Shared::rope_empty());
        rope_.advance();
    }

    // Masks and weighs the scores of a tile, of which the request has `tokens` tokens or, if more, all; sends P.
    __device__ void weigh(float (&s)[32], int tokens) {
        if (tokens < kTile) clear_rows_from(tokens);
#pragma unroll
        for (int i = 0; i < 32; ++i) s[i] *= p_.scale_log2;
        if (tokens - (p_.causal ? p_.s_q - 1 : 0) < kTile) mask(s, tokens);
        float factor[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float most = -INFINITY;
#pragma unroll
            for (int i = 0; i < 8; ++i) most = fmaxf(most, fmaxf(s[4 * i + 2 * half], s[4 * i + 2 * half + 1]));
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
            const float top = most > top_[half] + FUSEDMLA_LAZY ? most : top_[half];
            factor[half] = exp2_approx(top_[half] - top);
            top_[half] = top;
            total_[half] *= factor[half];
        }
#pragma unroll
        for (int i = 0; i < 32; ++i) {
            s[i] = exp2_approx(s[i] - top_[i / 2 % 2]);
            total_[i / 2 % 2] += s[i];
        }
        mbarrier_wait(Shared::message_empty(message_.at()), message_.phase() ^ 1);
        put_factors(factor);
#pragma unroll
        for (int step = 0; step < 4; ++step) {
            uint32_t w[4];
#pragma unroll
            for (int i = 0; i < 4; ++i)
                w[i] = pack_16bit(s[8 * step + 2 * i], s[8 * step + 2 * i + 1], kIsFp16<Element>);
            Shared::weights(message_.at(), step) = {w[0], w[1], w[2], w[3]};
        }
        send();
    }

    // Rows past the end of a request hold whatever the page holds, or an older tile: with weight 0, but 0 x NaN is NaN.
    __device__ void clear_rows_from(int first) const {
#pragma unroll 1
        for (int quarter = kQuarterSlots - 4; quarter < kQuarterSlots; ++quarter) {
            uint8_t* to = shared_memory + quarters_.after(quarter).at() * kQuarterBytes +
                          threadIdx.x % 16 / 8 * kAtomBytes + threadIdx.x % 8 * 16;
#pragma unroll 1
            for (int token = first + threadIdx.x % kWarpgroup / 16; token < kTile; token += 8)
                *reinterpret_cast<uint4*>(to + token / 8 * kGroupBytes + token % 8 * 128) = {0, 0, 0, 0};
        }
        fence_proxy_async();
    }

    __device__ void mask(float (&s)[32], int tokens) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int limit = tokens;
            if (p_.causal) limit = min(tokens, tokens - p_.s_q + 1 + divide(row0_ + 8 * half, p_.h_q));
            limit -= threadIdx.x % 4 * 2;
#pragma unroll
            for (int i = 0; i < 16; ++i)
                if (i / 2 * 8 + i % 2 >= limit) s[i / 2 * 4 + half * 2 + i % 2] = -INFINITY;
        }
    }

    // What the multipliers have held back of the message before, so that the tensor cores have work during a softmax.
    __device__ void release_held() {
        warp_arrive(Shared::go(message_.at() ^ 1));  // before the very first message too: see Shared
    }

    __device__ void put_factors(const float (&factor)[2]) const {
        float* to = Shared::factors(message_.at());
        if (threadIdx.x % 4 == 0) to[0] = factor[0], to[8] = factor[1];
    }

    __device__ void send() {
        __syncwarp();
        warp_arrive(Shared::message_full(message_.at()));
        message_.advance();
    }

    // The sum of a row's weights: its logarithm to global memory, its inverse to the multipliers.
    __device__ void finish(const Item& item) {
        mbarrier_wait(Shared::message_empty(message_.at()), message_.phase() ^ 1);
        float norm[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float total = total_[half];
            total += __shfl_xor_sync(~0u, total, 1);
            total += __shfl_xor_sync(~0u, total, 2);
            norm[half] = total == 0.f ? 0.f : 1.f / total;
            const float log_sum = total == 0.f ? -INFINITY : top_[half] + log2_approx(total);
            const int row = row0_ + 8 * half, rows = p_.s_q * p_.h_q;
            if (threadIdx.x % 4 == 0 && row < rows) {
                if (item.slot < 0)
                    p_.lse[int64_t(item.request) * rows + row] = log_sum * 0.6931471805599453f;
                else
                    __stcg(p_.partial_lse + int64_t(item.slot) * rows + row, log_sum);
            }
        }
        put_factors(norm);
        send();
    }

    const Params& p_;
    const int row0_;  // of this lane
    uint32_t query_[kQueryQuarters * 8][4];
    float top_[2], total_[2];  // running maximum, base 2; this lane's share of the sum of weights
    Ring<kQuarterSlots> quarters_;
    Ring<1> rope_;
    Ring<kMessageSlots> message_;
};
