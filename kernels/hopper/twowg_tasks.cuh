// SPDX-License-Identifier: Apache-2.0
// Who walks the schedule in the 64-row kernel, and how the others follow it: the first multiplier's first warp, a few items ahead, between two items.
//
// The others never have the registers for it. A multiplier has those of O between items, and time until the next item's
// first weights. What it knows rests in shared memory meanwhile.
#pragma once

#include <new>

#include "even.cuh"
#include "twowg_partial.cuh"

class Feeder {
  public:
    __device__ explicit Feeder(const Params& p) : p_(p), work_(p.schedule, p.seq_lens, blockIdx.y) {}

    // Hands over the next task, the second time some more. All lanes of the warp work them out.
    __device__ void feed() {
        int due = calls_++ == 1 ? kTasksAhead : 1;
#pragma unroll 1
        for (; due > 0 && step_ != Step::kEnd; --due) {
            Item item;
            while (step_ != Step::kEnd && !find(item)) {
                step_ = step_ == Step::kAttend && any_merged_ ? Step::kMerge : Step::kEnd;
                work_.rewind();
            }
            mbarrier_wait(Shared::task_empty(tasks_.at()), tasks_.phase() ^ 1);
            if (threadIdx.x % kWarp == 0) hand_over(tasks_.at(), item, step_);
            tasks_.advance();
        }
    }

    // Hands over everything where that takes no walk: a small batch, of which a program has one item at most. False if
    // it is none.
    static __device__ bool feed_even(const Params& p) {
        const int each = programs_each(p.schedule);
        if (each == 0) return false;
        const int request = divide(blockIdx.y, each), piece = blockIdx.y - request * each;
        const EvenBatch batch(p.schedule, each, EvenBatch::length_of_lane(p.schedule, p.seq_lens));
        if (!batch.balanced()) return false;
        Item item = batch.tiles_of(request, piece);
        const bool is_item = batch.complete(item);
        if (threadIdx.x % kWarp == 0) {
            saved()->step_ = Step::kEnd, saved()->calls_ = 0;
            int slot = 0;
            if (is_item) {
                hand_over(slot++, item, Step::kAttend);
                if (is_merged(p, item)) hand_over(slot++, item, Step::kMerge);
            }
            hand_over(slot, item, Step::kEnd);
        }
        __syncwarp();
        return true;
    }

    // Whether all tasks have been handed over.
    static __device__ bool has_ended() { return saved()->step_ == Step::kEnd; }

    // Whether only the first task has been handed over, for which all are waiting.
    static __device__ bool is_at_first() { return saved()->calls_ == 1; }

    __device__ void save() const {
        __syncwarp();
        if (threadIdx.x % kWarp == 0) new (shared_memory + kFeederAt) Feeder(*this);
        __syncwarp();
    }
    __device__ static Feeder load() {
        Feeder feeder = *reinterpret_cast<const Feeder*>(shared_memory + kFeederAt);
        feeder.work_.refresh();
        return feeder;
    }

  private:
    static __device__ Feeder* saved() { return reinterpret_cast<Feeder*>(shared_memory + kFeederAt); }

    static __device__ void hand_over(int slot, const Item& item, Step step) {
        Shared::task(slot) = {item, step};
        mbarrier_arrive(Shared::task_full(slot));
    }

    // First all items of this program, then again those that are to be merged.
    __device__ bool find(Item& item) {
        while (work_.next(item)) {
            const bool merged = is_merged(p_, item);
            any_merged_ |= merged;
            if (step_ == Step::kAttend || merged) return true;
        }
        return false;
    }

    const Params& p_;
    Work work_;
    Ring<kTaskSlots> tasks_;
    Step step_ = Step::kAttend;
    bool any_merged_ = false;
    int calls_ = 0;
};
static_assert(sizeof(Feeder) <= kFeederBytes);

// A warp's place in the tasks. It rests in shared memory: registers are scarce while a task is attended to.
struct Tasks {
    static __device__ void begin() { Shared::place_in_tasks() = {}; }
    static __device__ Step wait() {
        const Ring<kTaskSlots> place = Shared::place_in_tasks();
        mbarrier_wait(Shared::task_full(place.at()), place.phase());
        return Shared::task(place.at()).step;
    }
    // Calls attend(item) for every item of this program, one after the other. Merging is the multipliers' business.
    template <typename Attend>
    static __device__ void for_items(const Attend& attend) {
        begin();
        for (Step step; (step = wait()) != Step::kEnd; done())
            if (step == Step::kAttend) attend(item());
    }
    static __device__ const Item& item() { return Shared::task(Shared::place_in_tasks().at()).item; }
    static __device__ void done() {
        Ring<kTaskSlots> place = Shared::place_in_tasks();
        __syncwarp();
        warp_arrive(Shared::task_empty(place.at()));
        place.advance();
        Shared::place_in_tasks() = place;
    }
};
