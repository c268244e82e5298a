// SPDX-License-Identifier: Apache-2.0
// Split-KV MLA decode for 64 query rows a CTA: one launch, from sequence lengths to merged results.
//
// O of 64 x 512 float32 takes half of the register file, so two warpgroups share its columns ("two-wg"); a third one
// scores and a warp of the fourth copies. With 16-bit operands, per tile of 64 tokens:
//
//   scorer         S = Q K^T | softmax -> P | next S ...         | its softmax ...
//   multiplier A             |              | O[:, :256] += P V  |
//   multiplier B             |              |                    | O[:, 256:] += P V
//
// In clusters, and with listed keys, the second multiplier waits until the next S is there, so that the tensor cores have
// work during its softmax. As the scorer has no part of O, there is room for most of the query in its registers, and with
// that out of shared memory almost three tiles fit there. It runs ahead into the next item while the multipliers write
// their results.
//
// With more than 64 rows two CTAs form a cluster: both work on the same tiles for different rows, each copies half of a
// tile and multicasts it to both, which halves the traffic out of L2.
//
// Of 8-bit caches K and V are widened to fp16 in registers, so they take the side of the operands that comes from there:
// S^T = K Q^T (twowg_turned_product.cuh), O^T += V^T P^T (Multiplier::multiply_widened). Of fp8_ds_mla caches all of PV is
// held back (twowg_turned.cuh). Of fp8 caches the scorer hands over scores, and the multipliers weigh them
// (twowg_raw.cuh, twowg_weigh.cuh), for scoring takes it as long as weighing and PV together take them.
//
// With e4m3 operands, for fp8 caches, the same roles work on spans of 128 tokens: twowg_e4m3.cuh has what differs for the
// scorer, Multiplier::multiply_e4m3 for the multipliers. Nothing is held back: registers are full of other things.
//
// Who copies: Copier (boxes of a page), RowCopier (fp8_ds_mla), Gatherer (listed keys, for sparse attention). The
// copying warp's neighbours bring the query (twowg_query.cuh).
//
// Compiled once for each: FUSEDMLA_TYPE (bf16, fp16, widened, scaled, e4m3), FUSEDMLA_CLUSTER (1, 2), FUSEDMLA_GATHER (0, 1),
// FUSEDMLA_ENTRY.

#include "twowg_copy.cuh"
#include "twowg_gather.cuh"
#include "twowg_multiply.cuh"
#include "twowg_query.cuh"
#include "twowg_rows.cuh"
#include "twowg_score.cuh"
#include "twowg_raw.cuh"
#include "twowg_turned.cuh"

using Copying = std::conditional_t<kGather, Gatherer, std::conditional_t<kScaled, RowCopier, Copier>>;

extern "C" __global__ void __launch_bounds__(kThreads, 1) FUSEDMLA_ENTRY(const __grid_constant__ Params p) {
    const int warpgroup = threadIdx.x / kWarpgroup;
    if (thread_anew() % kWarp == 0) Shared::init_barriers();
    if (threadIdx.x == 3 * kWarpgroup && !kScaled && !kGather) {
        tma_prefetch(&p.latent);
        tma_prefetch(&p.rope);
    }
    if constexpr (kCluster == 1)
        __syncthreads();
    else
        cluster_sync();
    launch_dependents();
    wait_for_predecessor();
    if (warpgroup == 0) {
        if constexpr (kScorerRegisters < kLaunchRegisters)
            lower_registers<kScorerRegisters>();
        else if constexpr (kScorerRegisters > kLaunchRegisters)
            raise_registers<kScorerRegisters>();
        std::conditional_t<kMultipliersWeigh, RawScorer, std::conditional_t<kWidens, TurnedScorer, Scorer<Element>>>(p).run();
    } else if (warpgroup < 3) {
        raise_registers<kMultiplierRegisters>();
        if (multiplier_thread() < kWarp && !Feeder::feed_even(p)) Feeder(p).save();
        Multiplier<Element>(p).run();
        merge_split(p);
    } else {
        lower_registers<kCopierRegisters>();
        if (threadIdx.x < 3 * kWarpgroup + kCopiers * kWarp) Copying(p).run();
        else if (!kGather) std::conditional_t<kE4m3, RowLoader, QueryLoader>(p).run();
    }
    if constexpr (kCluster > 1) {
        __syncwarp();
        cluster_sync();  // the other CTA may still arrive at barriers of this one
    }
}
