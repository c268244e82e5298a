// SPDX-License-Identifier: Apache-2.0
// Shared memory, barriers and tuning of the 64-row kernel: what lies where, who fills it, who empties it.
#pragma once

#include <type_traits>

#include "splitkv.cuh"

// ---- tuning: see docs/performance.md ----
// Of a tile's PV, the steps (16-bit caches: four) or parts (widened ones: eight) that the first and the second multiplier do
// at once. The others wait for the next tile's scores, so that the tensor cores have work during its softmax.
#ifndef FUSEDMLA_EARLY_A
#define FUSEDMLA_EARLY_A (kMultipliersWeigh ? 8 : kWidens ? 0 : 4)
#endif
#ifndef FUSEDMLA_EARLY_B
#define FUSEDMLA_EARLY_B (kMultipliersWeigh ? 8 : kWidens || kGather ? 0 : kCluster == 1 ? 4 : 0)
#endif
#ifndef FUSEDMLA_NEXT_SCORES  // the part of a tile's PV after which the scorer may begin with the next but one
#define FUSEDMLA_NEXT_SCORES 5
#endif
#ifndef FUSEDMLA_LAZY  // the reference maximum moves only if a score exceeds it by more (base 2); 0: whenever it can
#define FUSEDMLA_LAZY (kE4m3 ? 1 : 8)
#endif
#ifndef FUSEDMLA_QUARTERS  // slots of the ring; four are a span
#define FUSEDMLA_QUARTERS (kE4m3 ? 9 : kScaled ? 3 : kWidens ? 13 : 11)
#endif
#ifndef FUSEDMLA_PREFETCH  // 1: copies that have to wait for a slot are brought into L2 meanwhile
#define FUSEDMLA_PREFETCH (!kE4m3 && !kWidens)
#endif
#ifndef FUSEDMLA_QUERY_QUARTERS  // of the query's four latent quarters, those in registers; the others in shared memory
#define FUSEDMLA_QUERY_QUARTERS (kTurned ? 0 : 3)
#endif
#ifndef FUSEDMLA_SCORER_REGISTERS  // with the copier's and twice the multipliers' 512
#define FUSEDMLA_SCORER_REGISTERS (kE4m3 ? 96 : kScaled ? 128 : kWidens ? 112 : 160)
#endif
#ifndef FUSEDMLA_MULTIPLIER_REGISTERS
#define FUSEDMLA_MULTIPLIER_REGISTERS (kE4m3 ? 192 : kScaled ? 176 : kWidens ? 184 : 160)
#endif
#ifndef FUSEDMLA_COPIER_REGISTERS
#define FUSEDMLA_COPIER_REGISTERS 32
#endif

// What the cache has and tensor cores multiply: 16-bit floats; e4m3 as it is; e4m3 widened to fp16 in registers, with one
// scale for all or with four for each token (fp8_ds_mla).
struct e4m3 {};
struct widened {};
struct scaled {};
using Element = FUSEDMLA_TYPE;
constexpr bool kE4m3 = std::is_same_v<Element, e4m3>;
constexpr bool kScaled = std::is_same_v<Element, scaled>;
constexpr bool kWidens = std::is_same_v<Element, widened> || kScaled;
#ifndef FUSEDMLA_GATHER
#define FUSEDMLA_GATHER 0
#endif
constexpr bool kGather = FUSEDMLA_GATHER;  // the keys of a request are listed
constexpr int kCopiers = kGather ? 4 : 1;  // warps
constexpr bool kMultipliersWeigh = std::is_same_v<Element, widened>;  // the scorer hands over scores
constexpr bool kTurned = kE4m3 || kWidens;  // O^T += V^T P^T: V is the operand that comes from registers
static_assert(!kGather || kScaled || !kTurned);
constexpr bool kMultipliersLoad = kGather && kScaled;  // the query: who gathers has no registers for it
constexpr int kLoaders = kGather ? 4 : 3;  // warps that bring the query: who gathers, or has nothing else to do
constexpr bool kFencesAfterCopies = kGather && !kScaled;  // they are not the asynchronous proxy's: see Gatherer
constexpr int kCacheBytes = kTurned ? 1 : 2, kOperandBytes = kE4m3 ? 1 : 2;
constexpr int kSpan = kE4m3 ? 2 * kTile : kTile;  // tokens that are scored and multiplied at a time

constexpr int kRows = 64;                 // query rows of a CTA
constexpr int kThreads = 4 * kWarpgroup;  // scores, O[:, :256], O[:, 256:], copies
constexpr int kMultipliers = 2 * kWarpgroup;
constexpr int kLaunchRegisters = 65536 / kThreads;
// Registers of a thread; 128 while the kernel starts. ptxas puts accumulators behind 24 others, so a multiplier needs
// 152 and some, with e4m3 32 more for fresh accumulators and fragments of V.
constexpr int kScorerRegisters = FUSEDMLA_SCORER_REGISTERS, kCopierRegisters = FUSEDMLA_COPIER_REGISTERS;
constexpr int kMultiplierRegisters = FUSEDMLA_MULTIPLIER_REGISTERS;
static_assert(kScorerRegisters + 2 * kMultiplierRegisters + kCopierRegisters <= 512);

constexpr int kScores = kRows * kSpan / kWarpgroup;  // of a scoring thread

constexpr int kCluster = FUSEDMLA_CLUSTER;
constexpr int kQuarterSlots = FUSEDMLA_QUARTERS, kMessageSlots = kMultipliersWeigh ? 1 : 2, kTaskSlots = 8;
constexpr int kWeightSlots = 2;  // of P and of factors
constexpr int kRopeSlots = kE4m3 ? 2 : kScaled ? 0 : kWidens ? 3 : 1;
constexpr int kParts = kScaled ? 1 : 4;  // slots of the ring that a span takes: of fp8_ds_mla they hold whole rows
constexpr int kTasksAhead = 4;  // of the one that the first multiplier works on
constexpr int kQueryQuarters = FUSEDMLA_QUERY_QUARTERS;
constexpr int kQuerySlots = kE4m3 ? 4 : kQueryQuarters;  // of the ring, that a query takes
constexpr int kAtomBytes = 8 * 128;          // 8 tokens (or rows) x 128 bytes in the 128-byte swizzle
constexpr int kBlockBytes = 8 * kAtomBytes;  // 64 rows x 128 bytes
constexpr int kGroupBytes = kCacheBytes * kAtomBytes;  // 8 tokens x 128 columns
constexpr int kInFlight = 1;  // parts of a widened tile that the tensor cores work on while the next is widened
constexpr int kRowBytes =  // of a cache; of fp8_ds_mla: codes, scales, rope part
    kScaled ? kLatent + 4 * 4 + kRope * 2 : (kLatent + kRope) * kCacheBytes;
constexpr int kScalesAt = kLatent, kRopeOfRowAt = kLatent + 4 * 4;
constexpr int kQuarterBytes =  // a span x 128 of the 512 latent columns, group by group
    kScaled ? kSpan * kRowBytes : kSpan / 8 * kGroupBytes;

// What the first multiplier hands to all warps.
enum class Step { kAttend, kMerge, kEnd };
struct Task {
    Item item;
    Step step;
};

// Named barriers; 0 is __syncthreads.
constexpr int kMultipliersBarrier = 1, kScorerBarrier = 2, kLoadersBarrier = 3, kHalfBarrier = 4;

constexpr int kRopeBytes = kSpan * kRope * kCacheBytes;
constexpr int kQueryQuarterBytes = kRows * 128 * kOperandBytes;
constexpr int kRopeAt = kQuarterSlots * kQuarterBytes;
constexpr int kQueryAt = kRopeAt + kRopeSlots * kRopeBytes;  // the quarters that are not in registers, then rope
constexpr int kWeightsAt = kQueryAt + (4 - kQueryQuarters) * kQueryQuarterBytes + kRows * kRope * kOperandBytes;
constexpr int kWeightBytes = kRows * kSpan * kOperandBytes;
// Scores as they are handed over, row by row; longer than 64, so that neither stores nor loads conflict.
constexpr int kScoresPitch = (kTile + 4) * 4, kScoreBytes = kMultipliersWeigh ? kRows * kScoresPitch : 0;
constexpr int kScoresAt = kWeightsAt + kWeightSlots * kWeightBytes;
constexpr int kFactorsAt = kScoresAt + kScoreBytes;
constexpr int kFactorBytes = kRows * 4;
constexpr int kChangesAt = kFactorsAt + kWeightSlots * kFactorBytes;
constexpr int kRowScalesAt = kChangesAt + kMessageSlots * 16;
constexpr int kScalesSlots = kMultipliersWeigh ? 4 : 1;  // an item's is overwritten after it has been taken
constexpr int kExchangeAt = kRowScalesAt + kScalesSlots * kRows * 4;
constexpr int kRatiosAt = kExchangeAt + (kWidens ? kRows * 5 * 4 : 0), kRatioBytes = kScaled ? 4 * kTile * 2 : 0;
constexpr int kValidAt = kRatiosAt + kMessageSlots * kRatioBytes;
constexpr int kValidSlots = 2 * (kScaled ? kQuarterSlots : kRopeSlots), kTasksAt = kValidAt + (kGather ? kValidSlots * 8 : 0);
constexpr int kFeederAt = kTasksAt + kTaskSlots * sizeof(Task), kFeederBytes = 96;
constexpr int kRestingAt = kFeederAt + kFeederBytes;
constexpr int kBarriersAt = kRestingAt + kThreads / kWarp * 4;
constexpr int kBarriers = 2 * (kQuarterSlots + kRopeSlots + kTaskSlots) + 3 * kMessageSlots + 3 + 2;
constexpr int kSharedBytes = kBarriersAt + kBarriers * 8;
static_assert(kSharedBytes <= 227 * 1024);
static_assert(kFeederAt % 8 == 0 && kBarriersAt % 8 == 0);

// The slot of a ring that is used next, and whether it has gone round an odd number of times: in one register.
template <int SLOTS>
class Ring {
  public:
    __device__ int at() const {
        int state = state_;
        asm volatile("" : "+r"(state));  // addresses are worked out where they are used, and not kept in registers
        return state >= SLOTS ? state - SLOTS : state;
    }
    __device__ uint32_t phase() const { return state_ >= SLOTS; }
    __device__ int turn() const { return state_; }  // of two rounds
    __device__ void advance(int count = 1) {
        state_ += count;
        if (state_ >= 2 * SLOTS) state_ -= 2 * SLOTS;
    }
    __device__ Ring after(int count) const {
        Ring ring = *this;
        ring.advance(count);
        return ring;
    }

  private:
    int state_ = 0;
};

// Barriers come in pairs: `full` is waited for by the reader of a slot, `empty` by its writer.
// - quarter: 128 latent columns of a span. The copying warp fills it. The scorer reads it first, and by sending the
//   span's weights hands it on to a multiplier (the first one has quarters 0 and 1), which alone says when it is empty.
//   With e4m3 an item begins with its query's rows in four quarters and a rope slot, which the scorer rounds.
// - rope: the span's last 64 columns, for the scorer only.
// - query: what the scorer does not keep in registers, see twowg_query.cuh; the rest comes through the ring, and the
//   scorer says when its slots are empty. `may come` hands those slots to the loaders, and `full` says that they have
//   done with them.
// - message: what the scorer tells the multipliers: for a span the weights P and the factors that rescale O's rows, and
//   at the end of an item the factors that normalise them; or, of fp8 caches, a tile's scores. `go` lets them do what they
//   hold back of it; it comes with the next message at the latest. That of slot 1 is one round ahead, for it also comes
//   before the first message.
// - may score: of fp8 caches, where scores are handed over as they are: lets the scorer begin with a tile, in turns, for it
//   would always be a tile ahead, and then compete for the tensor cores with PV instead of having them during the softmax.
// - task: what the schedule has for this program, see twowg_tasks.cuh.
extern __shared__ __align__(1024) uint8_t shared_memory[];

struct Shared {
    static __device__ uint32_t quarter(int slot) { return smem_address(shared_memory) + slot * kQuarterBytes; }
    static __device__ uint32_t rope(int slot) { return smem_address(shared_memory) + kRopeAt + slot * kRopeBytes; }
    static __device__ uint32_t query() { return smem_address(shared_memory) + kQueryAt; }
    // P as the A operand of its four steps, lane by lane: a scorer's registers are what a multiplier needs in its own.
    static __device__ uint4& weights(int slot, int step) {
        const int lane = step * kWarpgroup + thread_anew() % kWarpgroup;
        return reinterpret_cast<uint4*>(shared_memory + kWeightsAt + slot * kWeightBytes)[lane];
    }
    static __device__ float* all_factors(int slot) {
        return reinterpret_cast<float*>(shared_memory + kFactorsAt + slot * kFactorBytes);
    }
    // Of this lane's two rows the first; the second's are 8 further.
    static __device__ float* factors(int slot) {
        return all_factors(slot) + threadIdx.x % kWarpgroup / kWarp * 16 + threadIdx.x % kWarp / 4;
    }
    // Whether the factors of each scoring warp's rows are other than 1.
    static __device__ int* changes(int slot) { return reinterpret_cast<int*>(shared_memory + kChangesAt) + slot * 4; }
    static __device__ float* row_scales(int slot = 0) {
        return reinterpret_cast<float*>(shared_memory + kRowScalesAt) + slot * kRows;
    }
    static __device__ float* scores(int row) {
        return reinterpret_cast<float*>(shared_memory + kScoresAt + row * kScoresPitch);
    }
    // Of widened tiles: for each row of the query something of each scoring warp's; what its scores are related to.
    static __device__ float4* of_warps() { return reinterpret_cast<float4*>(shared_memory + kExchangeAt); }
    static __device__ float* references() { return reinterpret_cast<float*>(of_warps() + kRows); }
    // Of fp8_ds_mla tokens, each of the four scales over the largest, as fp16: [4][kTile].
    static __device__ __half* ratios(int slot) { return reinterpret_cast<__half*>(shared_memory + kRatiosAt + slot * kRatioBytes); }
    // A bit for each token of a tile that is there, 16 by each copying warp; by the turn of the tile's rope part or,
    // where the ring has whole rows, of its slot. They are read when the slot may be empty already, hence two rounds.
    static __device__ uint16_t* valid(int turn) {
        return reinterpret_cast<uint16_t*>(shared_memory + kValidAt + turn * 8);
    }
    static __device__ uint8_t* weight_rows(int slot) { return shared_memory + kWeightsAt + slot * kWeightBytes; }
    static __device__ Task& task(int slot) { return reinterpret_cast<Task*>(shared_memory + kTasksAt)[slot]; }
    static __device__ Ring<kTaskSlots>& place_in_tasks() {  // this warp's
        return reinterpret_cast<Ring<kTaskSlots>*>(shared_memory + kRestingAt)[thread_anew() / kWarp];
    }
    static __device__ float* scratch() { return reinterpret_cast<float*>(shared_memory + kQueryAt); }

    static __device__ uint32_t quarter_full(int slot) { return barrier(slot); }
    static __device__ uint32_t quarter_empty(int slot) { return barrier(kQuarterSlots + slot); }
    static __device__ uint32_t task_full(int slot) { return barrier(2 * kQuarterSlots + slot); }
    static __device__ uint32_t task_empty(int slot) { return barrier(2 * kQuarterSlots + kTaskSlots + slot); }
    static __device__ uint32_t message_full(int slot) { return barrier(kOthers + slot); }
    static __device__ uint32_t message_empty(int slot) { return barrier(kOthers + kMessageSlots + slot); }
    static __device__ uint32_t go(int slot) { return barrier(kOthers + 2 * kMessageSlots + slot); }
    static __device__ uint32_t rope_full(int slot) { return barrier(kOthers + 3 * kMessageSlots + slot); }
    static __device__ uint32_t rope_empty(int slot) { return rope_full(kRopeSlots + slot); }
    static __device__ uint32_t query_full() { return rope_full(2 * kRopeSlots); }
    static __device__ uint32_t query_may_come() { return rope_full(2 * kRopeSlots + 2); }
    static __device__ uint32_t query_empty() { return rope_full(2 * kRopeSlots + 1); }
    static __device__ uint32_t may_score(int turn) { return rope_full(2 * kRopeSlots + 3 + turn); }

    // By the first lane of every warp: an initialisation takes as long as a load, one after the other.
    static __device__ void init_barriers() {
        constexpr int kScorerWarps = 4, kMultiplierWarps = 8, kFills = kCopiers * (kFencesAfterCopies ? kWarp : 1);
        constexpr int kWarps = kThreads / kWarp;
        const int warp = thread_anew() / kWarp;
        for (int i = warp; i < kQuarterSlots; i += kWarps) {
            mbarrier_init(quarter_full(i), kFills);
            // Every CTA's, for copies go to all.
            mbarrier_init(quarter_empty(i), (kParts == 1 ? kMultiplierWarps : kMultiplierWarps / 2) * kCluster);
        }
        for (int i = kWarps - 1 - warp; i < kRopeSlots; i += kWarps) {
            mbarrier_init(rope_full(i), kFills + (kFencesAfterCopies ? kCopiers : 0));
            mbarrier_init(rope_empty(i), kScorerWarps * kCluster);
        }
        for (int i = warp; i < kTaskSlots; i += kWarps) {
            mbarrier_init(task_full(i), 1);
            mbarrier_init(task_empty(i), kScorerWarps + kMultiplierWarps + kCopiers + (kGather ? 0 : kLoaders));
        }
        if (warp == kTaskSlots) {
            mbarrier_init(query_full(), kMultipliersLoad ? kMultiplierWarps : kGather ? kLoaders * kWarp : kLoaders);
            mbarrier_init(query_empty(), kScorerWarps);
            mbarrier_init(query_may_come(), 1);
            mbarrier_init(may_score(0), kMultiplierWarps);
            mbarrier_init(may_score(1), kMultiplierWarps);
        }
        for (int i = warp - kTaskSlots - 1; 0 <= i && i < kMessageSlots; i += kWarps) {
            mbarrier_init(message_full(i), kScorerWarps);
            mbarrier_init(message_empty(i), kMultiplierWarps);
            mbarrier_init(go(i), kScorerWarps);
        }
        fence_mbarrier_init();
    }

  private:
    static constexpr int kOthers = 2 * (kQuarterSlots + kTaskSlots);
    static __device__ uint32_t barrier(int i) { return smem_address(shared_memory) + kBarriersAt + i * 8; }
};

__device__ inline float k_scale_of(const Params& p) {
    return !kTurned || kScaled ? 1.f : p.k_scale ? *p.k_scale : p.k_scale_value;
}
__device__ inline bool out_is_fp16(const Params& p) { return kTurned ? p.q_is_fp16 : std::is_same_v<Element, fp16>; }

// Of a scoring lane's two query rows the first; the second is 8 further. Worked out anew: registers are scarce.
__device__ inline int first_row() {
    const unsigned thread = thread_anew() % kWarpgroup;
    return blockIdx.x * kRows + thread / kWarp * 16 + thread % kWarp / 4;
}

// One arrival of this warp, which has converged. Where 16-bit keys are listed, ptxas has no register for who arrives.
__device__ inline void warp_arrive(uint32_t barrier) {
    if ((kGather && !kScaled ? thread_anew() : threadIdx.x) % kWarp == 0) mbarrier_arrive(barrier);
}

// The same in every CTA of the cluster: their copies fill this CTA's memory too. What it guards was only read, so it
// need not be a release at the cluster's scope, for which ptxas would put a slow fence.
__device__ inline void warp_arrive_cluster(uint32_t barrier) {
    if constexpr (kCluster == 1) {
        warp_arrive(barrier);
    } else if (threadIdx.x % kWarp < kCluster) {
        mbarrier_arrive_in(barrier, threadIdx.x % kWarp);
    }
}

// Whether some row does not attend to all tokens of the next span, of an item that has `tokens` more tokens and a request
// that has `left`.
__device__ inline bool is_cut(const Params& p, int tokens, int left) {
    return __any_sync(~0u, min(tokens, left - (p.causal ? p.s_q - 1 : 0)) < kSpan);
}

// Rows past the end of a request hold whatever the page holds, or an older span: with weight 0, but 0 x NaN is NaN. By
// the scoring warps, for the span before `next`.
__device__ inline void clear_rows_from(const Ring<kQuarterSlots>& next, int first) {
    if constexpr (kScaled) {
        uint8_t* tile = shared_memory + next.after(kQuarterSlots - 1).at() * kQuarterBytes;
#pragma unroll 1
        for (int i = first * kRowBytes + threadIdx.x % kWarpgroup * 16; i < kQuarterBytes; i += kWarpgroup * 16)
            *reinterpret_cast<uint4*>(tile + i) = {0, 0, 0, 0};
    } else {
        constexpr int kUnits = 8 * kCacheBytes;  // of 16 bytes in a quarter of a token
#pragma unroll 1
        for (int quarter = kQuarterSlots - 4; quarter < kQuarterSlots; ++quarter) {
            uint8_t* to = shared_memory + next.after(quarter).at() * kQuarterBytes +
                          threadIdx.x % kUnits / 8 * kAtomBytes + threadIdx.x % 8 * 16;
#pragma unroll 1
            for (int token = first + threadIdx.x % kWarpgroup / kUnits; token < kSpan; token += kWarpgroup / kUnits)
                *reinterpret_cast<uint4*>(to + token / 8 * kGroupBytes + token % 8 * 128) = {0, 0, 0, 0};
        }
    }
    fence_proxy_async();
}
