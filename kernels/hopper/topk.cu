// SPDX-License-Identifier: Apache-2.0
// Exact top-k of rows of float32 values: a cluster of CTAs for each row, the row's values in their shared memory.
//
// A float32 becomes an unsigned integer of the same order, its key, 0 for what is never selected. With the place in the
// row below it, lower places first, all are different, and the result is what is not below the k-th largest. That one is
// found from histograms of up to 2048 equal steps of what it lies in, the next time the one step (radix select).
//
// Two things make this cheap. Every thread's largest key is looked at first: if k of these have some upper digit or a
// larger one, so have k keys of the row, and the rest enters no histogram. With random values some 2 % remain for k =
// 2048 of 131072. And what remains goes to the shared memory of the cluster's first CTA, which finishes alone, without
// barriers of the cluster. Where too much remains for that (values nearly all equal, say), all go on together.
//
// Indices are written in ascending order: a bit for each place that is selected, and a sum over the bits before it.
//
// Loops are rolled: most of this code runs once, and then it is fetching instructions that takes the time.
//
// The grid is cluster x rows. Compiled as FUSEDMLA_ENTRY.

#include <cooperative_groups.h>

#include "ptx_copy.cuh"

namespace cg = cooperative_groups;

namespace {

constexpr int kThreads = 1024;
constexpr int kBins = 2048, kBits = 11;  // a thread has two bins
constexpr int kMaxCtas = 16;
constexpr int kChunk = 32768;    // values of a CTA, LARGEST_CHUNK in topk.py
constexpr int kCapacity = 8192;  // of the first CTA's list, LARGEST_K in topk.py
constexpr int kPlaceBits = 19;
constexpr int kUpperShift = 32 + kPlaceBits - kBits;
constexpr int kPiece = 4 * kThreads;  // values of a copy: what the threads take in one turn
constexpr unsigned kAll = 0xFFFFFFFF;
static_assert(kMaxCtas * kChunk == 1 << kPlaceBits && kBins == 2 * kThreads);

struct Params {
    const float* values;  // [rows, row_stride], 16-byte aligned, a multiple of 4 apart, of which n rounded up to 4 exist
    const int* lengths;   // [rows / repeat]: of `repeat` rows, row i sees length - repeat + 1 + i values
    int* out;             // [rows, out_stride]
    int64_t row_stride, out_stride;
    int n, k, repeat;
};

struct Found {
    int digit;    // -1: there are fewer than wanted
    int above;    // how many have larger digits
    int reached;  // the same and those of this digit
    int largest;  // digit
};

struct Shared {
    uint32_t chunk[kChunk];       // values, then keys; of the first CTA at the end: bits of places
    uint64_t list[kCapacity];     // this CTA's candidates; in the first CTA: of all
    unsigned bins[kBins];
    unsigned all_bins[2][kBins];  // of all CTAs, in turns
    unsigned warps[kThreads / kWarp];
    int listed[2];      // of this CTA, for each time that candidates are gathered
    int all_listed[2];  // of all CTAs
    int taken[2];       // in the first CTA: places of its list
    int base;
    Found found;
    uint64_t copied[kChunk / kPiece];  // mbarriers
};

extern __shared__ __align__(128) uint8_t shared_memory[];

__device__ inline Shared& shared() { return *reinterpret_cast<Shared*>(shared_memory); }

__device__ inline uint32_t key_of(float x) {
    x = x == 0.0f ? 0.0f : x;  // -0.0 equals 0.0
    const int bits = __float_as_int(x);
    return x > -INFINITY ? uint32_t(bits ^ ((bits >> 31) | 0x80000000)) : 0;
}
constexpr uint64_t kLeast = uint64_t{1} << kPlaceBits;  // not above anything that may be selected

__device__ inline uint64_t composite(uint32_t key, int place) {
    return (uint64_t{key} << kPlaceBits) | uint32_t((1 << kPlaceBits) - 1 - place);
}
__device__ inline int place_of(uint64_t whole) { return (1 << kPlaceBits) - 1 - int(whole & ((1 << kPlaceBits) - 1)); }

__device__ inline unsigned warp_scan(unsigned x) {  // sum over the lanes up to this one
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
        const unsigned other = __shfl_up_sync(kAll, x, step);
        x += int(threadIdx.x % kWarp) >= step ? other : 0;
    }
    return x;
}

// Sum over the CTA's threads up to this one; `whole` is that over all. Between two calls there must be a barrier.
__device__ unsigned block_scan(unsigned x, unsigned& whole) {
    const int warp = threadIdx.x / kWarp;
    x = warp_scan(x);
    if (threadIdx.x % kWarp == kWarp - 1) shared().warps[warp] = x;
    __syncthreads();
    const unsigned sums = warp_scan(shared().warps[threadIdx.x % kWarp]);
    whole = __shfl_sync(kAll, sums, kWarp - 1);
    const unsigned before = __shfl_sync(kAll, sums, warp ? warp - 1 : 0);
    return x + (warp ? before : 0);
}

class Selection {
  public:
    __device__ explicit Selection(const Params& p)
        : p_(p), cluster_(cg::this_cluster()), rank_(cluster_.block_rank()), ctas_(cluster_.num_blocks()) {}

    __device__ void run() {
        begin();
        uint32_t most = make_keys();
        cluster_wait();  // all CTAs have begun
        uint64_t least = kLeast;
        if (length_ > p_.k) {
            if (most) atomicAdd(&shared().bins[most >> (32 - kBits)], 1u);
            const Found found = find(p_.k);
            least = max(least, uint64_t(max(found.digit, 0)) << kUpperShift);
            const uint64_t end = uint64_t(found.largest + 1) << kUpperShift;
            const int candidates = gather(0, least);
            alone_ = candidates <= kCapacity;
            if (alone_ && rank_ != 0) return;
            count_ = alone_ ? candidates : count_;
            least = kth_largest(least, end);
        }
        const int time = alone_ ? 0 : 1;
        if (!alone_) {
            count_ = gather(time, least);  // no more than k
            if (rank_ != 0) return;
        }
        write(time, least);
    }

  private:
    const Params& p_;
    cg::cluster_group cluster_;
    const int rank_, ctas_;
    bool alone_ = false;  // what counts is the list
    int length_ = 0, begin_ = 0, count_ = 0;
    int turn_ = 0;

    template <typename T>
    __device__ T* of(int rank, T* mine) const {
        return cluster_.map_shared_rank(mine, rank);
    }

    // Has this CTA's part of the row copied.
    __device__ void begin() {
        Shared& s = shared();
        const int t = threadIdx.x;
#pragma unroll 1
        for (int bin = t; bin < kBins; bin += kThreads) s.bins[bin] = s.all_bins[0][bin] = s.all_bins[1][bin] = 0;
        if (t < 2) s.listed[t] = s.all_listed[t] = s.taken[t] = 0;
        if (t < kChunk / kPiece) mbarrier_init(smem_address(s.copied + t), 1);
        if (t < kWarp) fence_mbarrier_init();
        __syncthreads();
        cluster_arrive();
        wait_for_predecessor();
        launch_dependents();
        const int row = blockIdx.y;
        length_ = min(max(p_.lengths[row / p_.repeat] - (p_.repeat - 1) + row % p_.repeat, 0), p_.n);
        const int share = (length_ + 4 * ctas_ - 1) / (4 * ctas_) * 4;
        begin_ = rank_ * share;
        count_ = max(min(length_ - begin_, share), 0);
        const int bytes = min((count_ + 3) / 4 * 4 - t * kPiece, kPiece) * 4;
        if (bytes > 0) {
            const uint32_t barrier = smem_address(s.copied + t);
            mbarrier_expect_tx(barrier, bytes);
            bulk_load(smem_address(s.chunk + t * kPiece), p_.values + row * p_.row_stride + begin_ + t * kPiece, bytes, barrier);
        }
    }

    // Turns values into keys; the largest of this thread's.
    __device__ uint32_t make_keys() const {
        Shared& s = shared();
        uint32_t most = 0;
#pragma unroll 1
        for (int i = 4 * threadIdx.x; i < count_; i += kPiece) {
            mbarrier_wait(smem_address(s.copied + i / kPiece), 0);
            const float4 x = *reinterpret_cast<const float4*>(s.chunk + i);
            uint4 keys = {key_of(x.x), key_of(x.y), key_of(x.z), key_of(x.w)};
            if (i + 1 >= count_) keys.y = 0;
            if (i + 2 >= count_) keys.z = 0;
            if (i + 3 >= count_) keys.w = 0;
            *reinterpret_cast<uint4*>(s.chunk + i) = keys;
            most = max(most, max(max(keys.x, keys.y), max(keys.z, keys.w)));
        }
        return most;
    }

    // Counts into `bins` the steps, of 2^shift each, in which the candidates from `least` on lie, up to 2^bits.
    __device__ void count_steps(uint64_t least, int bits, int shift) const {
        Shared& s = shared();
        const auto add = [&](uint64_t whole) {
            if (whole >= least && (whole - least) >> bits == 0) atomicAdd(&s.bins[(whole - least) >> shift], 1u);
        };
        if (alone_) {
#pragma unroll 1
            for (int i = threadIdx.x; i < count_; i += kThreads) add(candidate(0, i));
        } else {
#pragma unroll 1
            for (int i = threadIdx.x; i < count_; i += kThreads) add(composite(s.chunk[i], begin_ + i));
        }
    }

    // The digit of the `wanted`-th largest of what was counted in `bins` (with the other CTAs', unless this one is
    // alone), which are zero afterwards.
    __device__ Found find(int wanted) {
        Shared& s = shared();
        const int bin = kBins - 2 - 2 * int(threadIdx.x);  // larger digits first
        unsigned* bins = s.bins;
        __syncthreads();
        if (!alone_) {
            bins = s.all_bins[turn_];
            turn_ ^= 1;
#pragma unroll 1
            for (int i = bin; i < bin + 2; ++i) {
                const unsigned count = s.bins[i];
                if (!count) continue;
                s.bins[i] = 0;
#pragma unroll 1
                for (int rank = 0; rank < ctas_; ++rank) atomicAdd(of(rank, bins + i), count);
            }
            cluster_sync();
        }
        const int high = bins[bin + 1], low = bins[bin];
        bins[bin + 1] = bins[bin] = 0;
        unsigned whole;
        const int after = block_scan(high + low, whole), middle = after - low, before = middle - high;
        if (before == 0 && after > 0) s.found.largest = high ? bin + 1 : bin;
        if (before < wanted && wanted <= after) {
            s.found.digit = wanted <= middle ? bin + 1 : bin;
            s.found.above = wanted <= middle ? before : middle;
            s.found.reached = wanted <= middle ? middle : after;
        }
        __syncthreads();
        Found found = s.found;
        if (int(whole) < wanted) found.digit = -1;
        if (whole == 0) found.largest = 0;
        return found;
    }

    // Puts what is not below `least` on the first CTA's list, in any order, if there is room. How much it is.
    __device__ int gather(int time, uint64_t least) {
        Shared& s = shared();
        const uint32_t least_key = uint32_t(least >> kPlaceBits);
#pragma unroll 1
        for (int i = 4 * threadIdx.x; i < count_; i += kPiece) {
            const uint4 keys = *reinterpret_cast<const uint4*>(s.chunk + i);
            if (max(max(keys.x, keys.y), max(keys.z, keys.w)) < least_key) continue;
            const uint64_t whole[4] = {composite(keys.x, begin_ + i), composite(keys.y, begin_ + i + 1),
                                       composite(keys.z, begin_ + i + 2), composite(keys.w, begin_ + i + 3)};
            int many = 0;
#pragma unroll
            for (int c = 0; c < 4; ++c) many += whole[c] >= least;
            int at = atomicAdd(&s.listed[time], many);
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                if (whole[c] >= least && at < kCapacity) s.list[at++] = whole[c];
            }
        }
        __syncthreads();
        const int listed = s.listed[time];
        if (threadIdx.x < kWarp) {
            if (int(threadIdx.x) < ctas_) atomicAdd(of(threadIdx.x, s.all_listed + time), listed);
            if (threadIdx.x == 0) s.base = rank_ == 0 ? 0 : atomicAdd(of(0, s.taken + time), listed);
        }
        if (ctas_ > 1) {
            __syncthreads();
            if (rank_ != 0) {
                // The first CTA's own are at the start of its list, the others' therefore at its end.
                uint64_t* list = of(0, s.list) + kCapacity - 1 - s.base;
#pragma unroll 1
                for (int i = threadIdx.x; i < listed && s.base + i < kCapacity; i += kThreads) list[-i] = s.list[i];
            }
        }
        cluster_sync();
        return s.all_listed[time];
    }

    // The i-th candidate of the list: see `gather` for the gap in it.
    __device__ uint64_t candidate(int time, int i) const {
        const Shared& s = shared();
        return s.list[i < s.listed[time] ? i : i + kCapacity - count_];
    }

    // The k-th largest of what lies from `least` to before `end`, or something below it and above the next.
    __device__ uint64_t kth_largest(uint64_t least, uint64_t end) {
        uint64_t low = least;
        int wanted = p_.k, bits = 64 - __clzll(end - least - 1);
        while (true) {
            const int shift = max(bits - kBits, 0);
            count_steps(low, bits, shift);
            const Found found = find(wanted);
            if (found.digit < 0) return least;  // fewer than k may be selected
            low += uint64_t(found.digit) << shift;
            if (found.reached == wanted) return low;
            wanted -= found.above;
            bits = shift;
        }
    }

    // Writes the places of the listed candidates that are not below `least`, ascending, and then -1.
    __device__ void write(int time, uint64_t least) {
        Shared& s = shared();
        int* out = p_.out + blockIdx.y * p_.out_stride;
        const int words = (length_ + 31) / 32, each = (words + kThreads - 1) / kThreads;
        uint32_t* bits = s.chunk;  // which is not needed any more
        uint32_t* sums = bits + words;
#pragma unroll 1
        for (int i = threadIdx.x; i < words; i += kThreads) bits[i] = 0;
        __syncthreads();
#pragma unroll 1
        for (int i = threadIdx.x; i < count_; i += kThreads) {
            const uint64_t whole = candidate(time, i);
            const int place = place_of(whole);
            if (whole >= least) atomicOr(bits + place / 32, 1u << place % 32);
        }
        __syncthreads();
        const int first = min(int(threadIdx.x) * each, words), end = min(first + each, words);
        unsigned mine = 0, whole;
#pragma unroll 1
        for (int i = first; i < end; ++i) mine += __popc(bits[i]);
        unsigned sum = block_scan(mine, whole) - mine;
#pragma unroll 1
        for (int i = first; i < end; ++i) {
            sums[i] = sum;
            sum += __popc(bits[i]);
        }
        __syncthreads();
#pragma unroll 1
        for (int i = threadIdx.x; i < count_; i += kThreads) {
            const uint64_t whole = candidate(time, i);
            const int place = place_of(whole), word = place / 32;
            if (whole >= least) out[sums[word] + __popc(bits[word] & ((1u << place % 32) - 1))] = place;
        }
        for (int at = whole + threadIdx.x; at < p_.k; at += kThreads) out[at] = -1;
    }
};

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, 1) FUSEDMLA_ENTRY(const __grid_constant__ Params p) {
    Selection(p).run();
}
