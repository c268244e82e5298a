// SPDX-License-Identifier: Apache-2.0
// Split-KV MLA decode for few query rows: one launch, from sequence lengths to merged results.
//
// With 16 heads a 64-row matrix instruction is three quarters padding, so the operands are swapped: tokens take the M
// side of wgmma, query rows (s_q x h_q, padded to a multiple of 8) the N side (ETAP, arXiv 2506.01969, does so on
// Hopper). A warp copies tiles of 64 tokens with TMA through a ring of stages. Of an item of many tiles two or three
// warpgroups take turns at them, each with its own reference, sum and accumulators, so that one computes scores while
// another multiplies by V, and nothing but the ring connects them until its end (swapab_turns.cuh). Where there is
// but a pair of tiles two work at it together (swapab_pairs.cuh).
//
// 8-bit tiles stay 8 bits in shared memory. Their fragments are widened to fp16 in registers on the way to wgmma, the
// transposed ones too, so the tile is neither written a second time nor multiplied by its scale: `k_scale`, or the four
// scales of an fp8_ds_mla token, are applied to the scores and to the weights.
//
// Where keys are listed (sparse attention, FUSEDMLA_GATHER=1) four warps gather rows, every operand from a cache goes
// through registers, and a cluster shares a list: swapab_listed.cuh, swapab_gather.cuh, swapab_cluster.cuh. Otherwise
// the grid is row blocks x programs.
//
// Compiled once for each format and number of rows: FUSEDMLA_FORMAT, FUSEDMLA_TYPE, FUSEDMLA_ROWS, FUSEDMLA_ENTRY.

#include <type_traits>

#include "swapab_plan.cuh"

#ifndef FUSEDMLA_GATHER
#define FUSEDMLA_GATHER 0
#endif

namespace {

constexpr Format FORMAT = Format::FUSEDMLA_FORMAT;
using Element = FUSEDMLA_TYPE;  // of a 16-bit cache; fp16 otherwise
constexpr int N = FUSEDMLA_ROWS;
constexpr bool kGather = FUSEDMLA_GATHER;
using Layout = std::conditional_t<kGather, ListedPlan<FORMAT, N>, Plan<FORMAT, N>>;

}  // namespace

#if FUSEDMLA_GATHER
#include "swapab_listed_kernel.cuh"
#else
#include "swapab_kernel.cuh"
#endif
