// SPDX-License-Identifier: Apache-2.0
// A multiprocessor in slow motion: every CUDA thread is a coroutine of one host thread, and a seed decides who goes on.
//
// Warps run in random order and some are held back for a while, copies arrive late and in any order, and wgmma reads
// its operands between its issue and the wait for it. What waits for something that cannot come is reported.
#pragma once

#include <ucontext.h>

#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace machine {

constexpr int kMemory = 227 * 1024, kStack = 64 * 1024, kRankShift = 24;

struct Dim {
    unsigned x, y;
};
struct Cta;
struct Warp;

struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    unsigned index;
    Cta* cta;
    Warp* warp;
    bool done = false, polls = false;
    bool (*ready)(void*) = nullptr;  // whether what it waits for has come
    void* waits_for = nullptr;
    const char* what = "";
    uint32_t cluster_turn = 0;
    std::vector<std::vector<std::function<void()>>> copies;  // of cp.async, by group; the last one is open
};

struct Warp {
    std::vector<Thread*> threads;
    int arrived = 0, frozen = 0;
    uint32_t turn = 0;
    std::array<uint64_t, 32> values[2];
    std::vector<std::vector<std::function<void()>>> products;  // of wgmma, by group; the last one is open
};

struct NamedBarrier {
    int arrived = 0;
    uint32_t turn = 0;
    bool any = false, result[2];
};

struct Cluster {
    std::vector<Cta*> ctas;
    int arrived = 0;
    uint32_t turn = 0;
};

struct Cta {
    uint8_t* memory;
    Dim index;
    int rank;
    Cluster* cluster;
    NamedBarrier barriers[16];
    std::vector<Warp*> warps;
};

struct Machine {
    Dim grid, thread_index;
    int threads;  // of a CTA
    Cta* cta;
    Thread* thread = nullptr;
    ucontext_t scheduler;
    std::mt19937 random;
    std::vector<std::function<void()>> in_flight, late;
    std::string failure;

    bool coin() { return random() & 1; }
};
inline Machine& the() {
    static Machine machine;
    return machine;
}

inline int lane() { return the().thread->index % 32; }

struct Failure : std::runtime_error {
    using std::runtime_error::runtime_error;
};
[[noreturn]] inline void fail(const std::string& what) {
    const Thread& thread = *the().thread;
    throw Failure("CTA " + std::to_string(thread.cta->index.x) + "," + std::to_string(thread.cta->index.y) + " thread " +
                  std::to_string(thread.index) + ": " + what);
}

// ---- waiting ----

inline void leave() { swapcontext(&the().thread->context, &the().scheduler); }

template <typename Done>
inline void wait_until(const char* what, Done done) {
    if (done()) return;
    Thread& thread = *the().thread;
    thread.what = what;
    thread.waits_for = &done;
    thread.ready = [](void* condition) { return (*static_cast<Done*>(condition))(); };
    leave();
    thread.ready = nullptr;
    thread.what = "";
}

// Others may go on. What a polling thread waits for need not come from this machine's barriers.
inline void poll() {
    the().thread->polls = true;
    leave();
    the().thread->polls = false;
}

// ---- warps ----

// A value of each lane, when all are there.
inline const std::array<uint64_t, 32>& exchange(uint64_t value) {
    Warp& warp = *the().thread->warp;
    const uint32_t turn = warp.turn;
    auto& values = warp.values[turn & 1];
    values[lane()] = value;
    if (++warp.arrived == int(warp.threads.size())) {
        warp.arrived = 0;
        ++warp.turn;
    } else {
        wait_until("its warp", [&] { return warp.turn != turn; });
    }
    return values;
}

// ---- barriers ----

inline bool named_barrier(int id, int threads, bool waits, bool condition = false) {
    NamedBarrier& barrier = the().cta->barriers[id];
    const uint32_t turn = barrier.turn;
    barrier.any |= condition;
    if (++barrier.arrived > threads) fail("barrier " + std::to_string(id) + " has too many threads");
    if (barrier.arrived == threads) {
        barrier.result[turn & 1] = barrier.any;
        barrier.any = false;
        barrier.arrived = 0;
        ++barrier.turn;
    } else if (waits) {
        wait_until("a named barrier", [&] { return barrier.turn != turn; });
    }
    return barrier.result[turn & 1];
}

inline void cluster_arrive() {
    Thread& thread = *the().thread;
    Cluster& cluster = *thread.cta->cluster;
    thread.cluster_turn = cluster.turn;
    if (++cluster.arrived == int(cluster.ctas.size()) * the().threads) cluster.arrived = 0, ++cluster.turn;
}
inline void cluster_wait() {
    Thread& thread = *the().thread;
    Cluster& cluster = *thread.cta->cluster;
    wait_until("its cluster", [&] { return cluster.turn != thread.cluster_turn; });
}

// ---- shared memory ----

inline uint32_t address_of(const void* p) {
    const Cta& cta = *the().cta;
    const auto offset = static_cast<const uint8_t*>(p) - cta.memory;
    if (offset < 0 || offset > kMemory) fail("no address in shared memory");
    return uint32_t(cta.rank) << kRankShift | uint32_t(offset);
}
inline uint32_t address_in(uint32_t address, int rank) {
    return uint32_t(rank) << kRankShift | (address & ((1u << kRankShift) - 1));
}
inline uint8_t* at(const Cta& cta, uint32_t address, int bytes) {
    const uint32_t rank = address >> kRankShift, offset = address & ((1u << kRankShift) - 1);
    if (rank >= cta.cluster->ctas.size() || offset + bytes > kMemory) fail("outside shared memory");
    return cta.cluster->ctas[rank]->memory + offset;
}
inline uint8_t* at(uint32_t address, int bytes) { return at(*the().cta, address, bytes); }

// ---- mbarriers ----

struct Mbarrier {  // in their eight bytes
    int64_t bytes : 28;
    int64_t pending : 16;
    int64_t arrivals : 16;
    uint64_t phase : 1;
    uint64_t unused : 3;

    void settle() {
        if (pending < 0) fail("a barrier has too many arrivals");
        if (pending == 0 && bytes == 0) phase ^= 1, pending = arrivals;
    }
};
static_assert(sizeof(Mbarrier) == 8);

inline Mbarrier& mbarrier(const Cta& cta, uint32_t address) {
    if (address % 8) fail("a barrier that is not aligned");
    return *reinterpret_cast<Mbarrier*>(at(cta, address, 8));
}
inline Mbarrier& mbarrier(uint32_t address) { return mbarrier(*the().cta, address); }
inline void arrive(Mbarrier& barrier) { --barrier.pending, barrier.settle(); }
inline void complete(Mbarrier& barrier, int bytes) { barrier.bytes -= bytes, barrier.settle(); }

// ---- what goes on by itself ----

// At once or later, in any order; seldom so late that nobody can go on without it.
inline void sometime(std::function<void()> action) {
    const unsigned when = the().random() % 32;
    if (when < 8)
        action();
    else
        (when == 8 ? the().late : the().in_flight).push_back(std::move(action));
}
inline void run_one_of(std::vector<std::function<void()>>& all) {
    const size_t i = the().random() % all.size();
    const auto action = std::move(all[i]);
    all[i] = std::move(all.back());
    all.pop_back();
    action();
}

// Of groups of actions, of which the last is open: starts the next group; does all but the last `pending` closed ones.
using Groups = std::vector<std::vector<std::function<void()>>>;
inline void close_group(Groups& groups) {
    if (groups.empty()) groups.emplace_back();
    if (the().coin()) {  // done early
        for (auto& group : groups) {
            for (auto& action : group) action();
            group.clear();
        }
    }
    groups.emplace_back();
}
inline void finish_groups(Groups& groups, size_t pending) {
    while (groups.size() > pending + 1) {
        for (auto& action : groups.front()) action();
        groups.erase(groups.begin());
    }
}

// ---- running ----

inline void start(unsigned high, unsigned low) {
    auto* body = reinterpret_cast<std::function<void()>*>(uintptr_t{high} << 32 | low);
    try {
        (*body)();
    } catch (const Failure& failure) {
        if (the().failure.empty()) the().failure = failure.what();
    }
    the().thread->done = true;
    leave();
}

inline void resume(Thread& thread) {
    Machine& machine = the();
    machine.thread = &thread;
    machine.cta = thread.cta;
    machine.thread_index = {thread.index, 0};
    swapcontext(&machine.scheduler, &thread.context);
}

inline std::string who_waits(const std::vector<Cta*>& ctas) {
    std::string text = "all threads wait:";
    for (const Cta* cta : ctas)
        for (size_t w = 0; w < cta->warps.size(); ++w) {
            int waiting = 0;
            const char* what = "";
            for (const Thread* thread : cta->warps[w]->threads)
                if (!thread->done) ++waiting, what = thread->polls ? "global memory" : thread->what;
            if (waiting)
                text += "\n  CTA " + std::to_string(cta->index.x) + "," + std::to_string(cta->index.y) + " warp " +
                        std::to_string(w) + ": " + std::to_string(waiting) + " for " + what;
        }
    return text;
}

// Runs a grid; the CTAs of a cluster follow each other along x. Throws if it cannot come to an end.
inline void run(std::function<void()> body, Dim grid, int threads, int cluster_size, unsigned seed) {
    Machine& machine = the();
    machine.grid = grid;
    machine.threads = threads;
    machine.random.seed(seed);
    machine.in_flight.clear(), machine.late.clear();
    machine.failure.clear();
    std::vector<std::unique_ptr<Cluster>> clusters;
    std::vector<std::unique_ptr<Cta>> owned;
    std::vector<std::unique_ptr<Warp>> warps;
    std::vector<std::unique_ptr<Thread>> all;
    std::vector<Cta*> ctas;
    const auto body_at = reinterpret_cast<uintptr_t>(&body);
    for (unsigned y = 0; y < grid.y; ++y)
        for (unsigned x = 0; x < grid.x; ++x) {
            if (x % cluster_size == 0) clusters.push_back(std::make_unique<Cluster>());
            Cta* cta = owned.emplace_back(std::make_unique<Cta>()).get();
            ctas.push_back(cta);
            cta->memory = static_cast<uint8_t*>(std::aligned_alloc(1024, kMemory));
            std::memset(cta->memory, 0xFF, kMemory);  // NaN, whatever it is read as
            cta->index = {x, y};
            cta->rank = int(x % cluster_size);
            cta->cluster = clusters.back().get();
            cta->cluster->ctas.push_back(cta);
            for (int i = 0; i < threads; ++i) {
                if (i % 32 == 0) cta->warps.push_back(warps.emplace_back(std::make_unique<Warp>()).get());
                Thread* thread = all.emplace_back(std::make_unique<Thread>()).get();
                cta->warps.back()->threads.push_back(thread);
                thread->index = i;
                thread->cta = cta;
                thread->warp = cta->warps.back();
                thread->stack = std::make_unique<char[]>(kStack);
                getcontext(&thread->context);
                thread->context.uc_stack.ss_sp = thread->stack.get();
                thread->context.uc_stack.ss_size = kStack;
                thread->context.uc_link = nullptr;
                makecontext(&thread->context, reinterpret_cast<void (*)()>(start), 2, unsigned(body_at >> 32), unsigned(body_at));
            }
        }
    int idle = 0;
    size_t done = 0;
    while (done < all.size() && machine.failure.empty()) {
        bool progress = false, frozen = false;
        const size_t first = machine.random() % warps.size();
        for (size_t i = 0; i < warps.size() && machine.failure.empty(); ++i) {
            Warp& warp = *warps[(first + i) % warps.size()];
            if (warp.frozen > 0) {
                --warp.frozen;
                frozen = true;
                continue;
            }
            if (machine.random() % 64 == 0) warp.frozen = int(machine.random() % 24);
            for (Thread* thread : warp.threads) {
                if (thread->done || (thread->ready && !thread->ready(thread->waits_for))) continue;
                progress |= !thread->polls;
                resume(*thread);
                done += thread->done;
                if (!machine.failure.empty()) break;
            }
            if (!machine.in_flight.empty() && machine.random() % 4 == 0) run_one_of(machine.in_flight);
        }
        if (!progress && frozen) {  // until nobody else can go on
            for (auto& warp : warps) warp->frozen = 0;
            continue;
        }
        for (auto* actions : {&machine.in_flight, &machine.late})
            if (!progress && !actions->empty()) run_one_of(*actions), progress = true;
        idle = progress ? 0 : idle + 1;
        if (idle > 100 && machine.failure.empty()) machine.failure = who_waits(ctas);
    }
    if (machine.failure.empty() && !(machine.in_flight.empty() && machine.late.empty())) machine.failure = "copies are still on their way";
    for (Cta* cta : ctas) std::free(cta->memory);
    if (!machine.failure.empty()) throw Failure(machine.failure);
}

}  // namespace machine
