// SPDX-License-Identifier: Apache-2.0
// A multiplying warpgroup of the 64-row kernel: its query, its 256 columns of O from item to item, and the result.
#pragma once

#include "merge.cuh"
#include "query_8bit.cuh"
#include "twowg_tasks.cuh"
#include "twowg_values.cuh"
#include "twowg_weigh.cuh"

// Of both multipliers' threads.
__device__ inline int multiplier_thread() { return threadIdx.x - kWarpgroup; }

// The first warp hands over further tasks.
__device__ inline void feed_tasks() {
    if (multiplier_thread() >= kWarp || Feeder::has_ended()) return;
    Feeder feeder = Feeder::load();
    feeder.feed();
    feeder.save();
}

// What comes after all of the program's own work, by both multipliers.
__device__ inline void merge_split(const Params& p) {
    static_assert(kScratchOfMerge<kMultipliers> <= kWeightsAt - kQueryAt);
    for (; Tasks::wait() == Step::kMerge; Tasks::done(), feed_tasks()) {
        const Item& item = Tasks::item();
        const int row0 = block_x_anew() * kRows, thread = multiplier_thread();
        const int rows_here = max(min(p.s_q * p.h_q - row0, kRows), 0);  // none if a cluster was filled up
        merge_share<Tiles, kMultipliers>(p, item, row0, rows_here, thread, out_is_fp16(p), kMultipliersBarrier,
                                         Shared::scratch(), [&] {
                                             if (thread == 0) wait_for_pieces(counter_of(p, item), item.pieces);
                                             named_barrier_sync(kMultipliersBarrier, kMultipliers);
                                         });
        if (thread == 0) leave(counter_of(p, item), item.pieces);
    }
}

// Both warpgroups run the same instructions, so that those are fetched but once: which half of the columns is a
// thread's is not known to the compiler.
template <typename T>
class Multiplier : Values<T> {
    using Values<T>::kPart, Values<T>::half, Values<T>::receive, Values<T>::release_message;
    using Values<T>::o_, Values<T>::quarters_, Values<T>::message_;

  public:
    __device__ explicit Multiplier(const Params& p) : weigher_(p), p_(p) {}

    __device__ void run() {
        Tasks::begin();
        for (bool ready = false;;) {
            feed_tasks();
            if (!ready) {
                if (Tasks::wait() != Step::kAttend) break;
                if constexpr (kMultipliersLoad) load_query();
                if (Feeder::is_at_first()) {  // all others are busy with it now: time to work out more
                    ready = true;
                    continue;
                }
            }
            attend();
            Tasks::done();
            ready = false;
        }
    }

  private:
    // The scorer has done with the last one.
    __device__ void load_query() const {
        load_query_8bit<kRows, kScaled>(p_, shared_memory + kQueryAt, Shared::row_scales(), p_.scale_log2, k_scale_of(p_),
                                        Tasks::item().request, row0(), multiplier_thread() / kWarp);
        fence_proxy_async();
        __syncwarp();
        warp_arrive(Shared::query_full());
    }

    __device__ void attend() {
#pragma unroll
        for (int i = 0; i < 128; ++i) o_[i / kPart][i % kPart] = 0.f;
        quarters_.advance(kQuerySlots);
        if constexpr (kMultipliersWeigh) {
            weigh_and_add();
        } else {
            for (int spans = spans_of(Tasks::item()); spans > 0; --spans) {
                rescale();
                this->add();
                message_.advance();
                quarters_.advance(kParts);
            }
            receive();
        }
        if (kMostJoined > 1 && joins(p_, Tasks::item())) join();
        const Item& item = Tasks::item();
        if (item.slot < 0 || joins(p_, item)) {
            store(static_cast<uint16_t*>(p_.out) + item.request * rows() * kLatent);
        } else {
            store_partial(partial_of(p_, item, item.piece));
            publish_partial(item);
        }
    }

    // Scores instead of weights come, and no message at the end of an item.
    __device__ void weigh_and_add() {
        const Item& item = Tasks::item();
        int left = item.seq_len - item.tile_begin * kTile;  // tokens of the request
        const int after = max(item.seq_len - item.tile_end * kTile, 0);  // that are not of the item
        weigher_.begin();
        bool first = true;
#pragma unroll 1
        for (; left > after; left -= kTile, first = false) {
            const bool cut = is_cut(p_, left - after, left);
            if (first) this->let_score();
            receive();
            if (first) weigher_.take_scale();
            factors_at_ ^= 1;
            const auto taken = [&] {
                release_message();
                message_.advance();
            };
            if (weigher_.weigh(factors_at_, cut, left - after, left, taken)) scale_by_factors();
            this->add(factors_at_, left - after > kTile);
            quarters_.advance(kParts);
        }
        weigher_.finish(item);
        factors_at_ = 0;
    }

    __device__ void publish_partial(const Item& item) {
        const bool joined = is_joined(p_, item);
        if (joined) fence_proxy_async_global();
        named_barrier_sync(kMultipliersBarrier, kMultipliers);
        if (multiplier_thread() != 0) return;
        if (joined)
            publish_to_first(counter_of(p_, item), item.pieces);
        else
            publish(counter_of(p_, item), item.pieces);
    }

    // Adds the other pieces' results. Their factors come in messages after that of this one's, and then ones.
    __device__ void join() {
        scale_by_factors();
        next_factors();
        for (int piece = 1; piece < Tasks::item().pieces; ++piece) {
            add_other();
            next_factors();
        }
        if constexpr (kMultipliersWeigh) {
            named_barrier_sync(kMultipliersBarrier, kMultipliers);
            if (multiplier_thread() < kRows) Shared::all_factors(0)[multiplier_thread()] = 1.f;
            named_barrier_sync(kMultipliersBarrier, kMultipliers);
            factors_at_ = 0;
        }
        if (multiplier_thread() == 0) leave_joined(counter_of(p_, Tasks::item()), Tasks::item().pieces);
    }
    __device__ void next_factors() {
        if constexpr (kMultipliersWeigh) {
            ++factors_at_;
        } else {
            release_message();
            message_.advance();
            receive();
        }
    }
    __device__ int factors_at() const { return kMultipliersWeigh ? factors_at_ : message_.at(); }

    // ---- partial results: see twowg_partial.cuh ----

    static constexpr int kGroupsOfWarp = kTurned ? kGroups : 2;

    // Calls act(pair, x, y) for pairs of neighbouring columns that this lane holds of a group of rows, of the warp's two
    // if a warp has two; `pair` counts those of a half of a group in memory.
    template <typename Act>
    __device__ void for_pairs(int group, const Act& act) {
        const unsigned thread = thread_anew(), lane = thread % kWarp;
        if constexpr (kTurned) {
            const int first = thread / kWarp % 4 * 2 * kWarp + lane % 4 * 8 + lane / 4;
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const int block = i / 2, odd = i % 2, at = group * 4 + odd;
                act(first + block * 8 * kWarp + odd * kWarp, o_[block][at], o_[block][at + 2]);
            }
        } else {
#pragma unroll
            for (int i = 0; i < 32; ++i) {
                float* pair = o_[i / 16] + i % 16 * 4 + group * 2;
                act(i * kWarp + lane, pair[0], pair[1]);
            }
        }
    }

    __device__ void store_partial(float4* to) {
        const int live = int(rows()) - row0(), first = kTurned ? 0 : thread_anew() / kWarp % 4 * kGroupsOfWarp;
#pragma unroll
        for (int i = 0; i < kGroupsOfWarp; ++i) {
            if ((first + i) * kGroupRows >= live) break;
            float2* half_of_group = reinterpret_cast<float2*>(to + ((first + i) * 2 + half()) * kUnitsOfHalf);
            FactorsOfGroup factor(*this, i);
            for_pairs(i, [&](int pair, float x, float y) {
                const float scale = factor.next();
                __stcg(half_of_group + pair, float2{x * scale, y * scale});
            });
        }
        if constexpr (!kMultipliersWeigh) {
            release_message();
            message_.advance();
        }
    }

    // Another piece's result times the message's factors, from the ring.
    __device__ void add_other() {
        if constexpr (kTurned) {
#pragma unroll
            for (int group = 0; group < kGroups; group += kGroupsOfSlot) {
                const Ring<kQuarterSlots> slot = quarters_.after(group / kGroupsOfSlot % 2);
                mbarrier_wait(Shared::quarter_full(slot.at()), slot.phase());
#pragma unroll
                for (int i = 0; i < kGroupsOfSlot; ++i) add_group(group + i, slot.at(), i);
                __syncwarp();
                warp_arrive_cluster(Shared::quarter_empty(slot.at()));
                if (group / kGroupsOfSlot % 2) quarters_.advance(kParts);
            }
        } else {  // a slot has two groups: those of one warp
#pragma unroll 1
            for (int slots = 0; slots < kGroups / 2; ++slots) {
                const Ring<kQuarterSlots> slot = quarters_.after(slots % 2);
                mbarrier_wait(Shared::quarter_full(slot.at()), slot.phase());
                if (slots == int(thread_anew() / kWarp % 4)) {
                    add_group(0, slot.at(), 0);
                    add_group(1, slot.at(), 1);
                }
                __syncwarp();
                warp_arrive_cluster(Shared::quarter_empty(slot.at()));
                if (slots % 2) quarters_.advance(kParts);
            }
        }
    }

    // The group that is number `place` of a slot, as the warp's number `group`.
    __device__ void add_group(int group, int slot, int place) {
        const float2* pairs = reinterpret_cast<const float2*>(shared_memory + slot * kQuarterBytes + place * kHalfBytes);
        FactorsOfGroup factor(*this, group);
        for_pairs(group, [&](int pair, float& x, float& y) {
            const float2 other = pairs[pair];
            const float scale = factor.next();
            x += scale * other.x, y += scale * other.y;
        });
    }

    // The message's, one for each of for_pairs' pairs.
    struct FactorsOfGroup {
        float2 factors;
        int group, pair = 0;
        __device__ FactorsOfGroup(const Multiplier& of, int group) : group(group) {
            if constexpr (kTurned)
                factors = of.factors_of_pair(group);
            else
                factors = of.factors_of_rows();
        }
        __device__ float next() { return (kTurned ? pair++ : group) % 2 ? factors.y : factors.x; }
    };

    __device__ static int spans_of(const Item& item) {
        return (item.tile_end - item.tile_begin + kSpan / kTile - 1) / (kSpan / kTile);
    }

    __device__ int64_t rows() const { return p_.s_q * p_.h_q; }
    __device__ static int row0() { return block_x_anew() * kRows; }

    // Brings O to the next message's maxima.
    __device__ void rescale() {
        receive();
        if constexpr (kTurned) {
            const int4 changes = *reinterpret_cast<const int4*>(Shared::changes(message_.at()));
            if ((changes.x | changes.y | changes.z | changes.w) == 0) return;
        }
        scale_by_factors();
    }

    // Times the message's factors, each of a row of P.
    __device__ void scale_by_factors() {
        if constexpr (kTurned) {  // this lane has columns of O^T, two of each eight rows of P
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const float2 factor = factors_of_pair(i);
#pragma unroll
                for (int block = 0; block < 4; ++block)
#pragma unroll
                    for (int j = 0; j < 4; ++j) o_[block][4 * i + j] *= j % 2 ? factor.y : factor.x;
            }
        } else {
            const float2 factor = factors_of_rows();
            if (!__any_sync(~0u, factor.x != 1.f || factor.y != 1.f)) return;
#pragma unroll
            for (int i = 0; i < 128; ++i) o_[i / kPart][i % kPart] *= i / 2 % 2 ? factor.y : factor.x;
        }
    }

    // The message's factors: of rows g and g + 8 of this warp's; of rows 8i + 2j and 8i + 2j + 1.
    __device__ float2 factors_of_rows() const {
        const float* from = Shared::factors(message_.at());
        return {from[0], from[8]};
    }
    __device__ float2 factors_of_pair(int i) const {
        return reinterpret_cast<const float2*>(Shared::all_factors(factors_at()))[i * 4 + thread_anew() % 4];
    }

    // Into rows of 512 columns from `to` on. The lanes of one j of O^T write 32 contiguous bytes of a row at a time: a
    // detour through shared memory would cost more, and the next item's tiles already fill it.
    __device__ void store(uint16_t* to) {
        const unsigned thread = thread_anew(), lane = thread % kWarp;
        if constexpr (kTurned) {
            to += half() * 256 + thread / kWarp % 4 * 16 + lane / 4 * 2;
#pragma unroll
            for (int i = 0; i < 16; ++i) {
                const float2 factors = factors_of_pair(i / 2);
                const float factor = i % 2 ? factors.y : factors.x;
                const int row = row0() + i / 2 * 8 + lane % 4 * 2 + i % 2, at = i / 2 * 4 + i % 2;
                if (row >= rows()) continue;
#pragma unroll
                for (int block = 0; block < 4; ++block)
                    *reinterpret_cast<uint32_t*>(to + int64_t(row) * kLatent + block * 64) =
                        pack_16bit(o_[block][at] * factor, o_[block][at + 2] * factor, out_is_fp16(p_));
            }
        } else {
            // A quad's lanes have two columns in every eight of its row. They exchange them, so that a lane writes 16
            // bytes at a time.
            const float2 factor = factors_of_rows();
            uint32_t words[2][32];
#pragma unroll
            for (int i = 0; i < 32; ++i) {
                const float* pairs = o_[i / 16] + i % 16 * 4;
                words[0][i] = pack_16bit(pairs[0] * factor.x, pairs[1] * factor.x, out_is_fp16(p_));
                words[1][i] = pack_16bit(pairs[2] * factor.y, pairs[3] * factor.y, out_is_fp16(p_));
            }
            __syncwarp();  // all of them are packed before the first exchange: registers are scarce
            const int row = row0() + thread % kWarpgroup / kWarp * 16 + lane / 4;
            to += row * kLatent + half() * 256 + lane % 4 * 8;
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int i = 0; i < 32; i += 4) {
                    uint32_t* w = words[half] + i;
                    transpose_quad(w[0], w[1], w[2], w[3]);
                    if (row + 8 * half < rows())
                        *reinterpret_cast<uint4*>(to + 8 * half * kLatent + 8 * i) = {w[0], w[1], w[2], w[3]};
                }
        }
        if constexpr (!kMultipliersWeigh) {
            release_message();
            message_.advance();
        }
    }

    Weigher weigher_;
    int factors_at_ = 0;  // slot of factors and weights, where the multipliers make them
    const Params& p_;
};
