# SPDX-License-Identifier: Apache-2.0
"""Merge the partial results of split requests.

A split request has partial outputs O_j, each normalised over its own keys, with log-sum-exps L_j. The result is
``sum_j exp(L_j - L) O_j`` with ``L = log sum_j exp(L_j)``, taken in a fixed order (Flash-Decoding, and FlashMLA's
combine). Requests that were not split are skipped: the decode kernel wrote their result.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .common import dependent_launch, next_power_of_2
from .layout import D_V
from .schedule import ScheduleParams, TileSchedule

_WIDE_GRID = 1024
"""From this many output rows on there are programs enough without also dividing the columns."""


def combine(
    partial_out: torch.Tensor,
    partial_lse: torch.Tensor,
    schedule: TileSchedule,
    params: ScheduleParams,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Write the rows of `out` and `lse` that belong to split requests.

    Args:
        partial_out: ``[max_slots, s_q * h_q, 512]`` float32.
        partial_lse: ``[max_slots, s_q * h_q]`` float32, base-2 logarithm.
        schedule, params: of the decode launch that wrote the partial results.
        out: ``[b, s_q, h_q, 512]`` contiguous.
        lse: ``[b, s_q, h_q]`` float32 contiguous, natural logarithm.
    """
    b, s_q, h_q, _ = out.shape
    rows = s_q * h_q
    # Few rows with many splits each: more programs, and more loads in flight in each. Batch-invariant results must not
    # depend on b through the shape of a program.
    few_rows = params.batch_invariant or b * rows < _WIDE_GRID
    likely_splits = params.max_splits if params.batch_invariant else triton.cdiv(params.num_programs, b)
    block_d = 128 if few_rows else D_V
    step = min(max(next_power_of_2(likely_splits), 4096 // block_d // 4), 8192 // block_d)
    _combine_kernel[(rows, b, D_V // block_d)](
        partial_out,
        partial_lse,
        schedule.num_splits,
        out,
        lse,
        ROWS=rows,
        BLOCK_S=next_power_of_2(params.max_pieces()),
        BLOCK_D=block_d,
        STEP=step,
        **dependent_launch(out.device),
        num_warps=8 if step * block_d > 4096 else 4,
    )


@triton.jit
def _combine_kernel(
    partial_out,  # [max_slots, ROWS, 512]
    partial_lse,  # [max_slots, ROWS]
    num_splits,  # [b + 1]
    out,  # [b, ROWS, 512]
    lse,  # [b, ROWS]
    ROWS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEP: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0)
    request = tl.program_id(1)
    begin = tl.load(num_splits + request)
    count = tl.load(num_splits + request + 1) - begin
    if count > 0:
        split = tl.arange(0, BLOCK_S)
        parts = tl.load(partial_lse + (begin + split) * ROWS + row, mask=split < count, other=-float("inf"))
        top = tl.max(parts, 0)
        top = tl.where(top == -float("inf"), 0.0, top)  # a row without keys
        total = tl.sum(tl.exp2(parts - top), 0)
        whole = tl.where(total > 0, top + tl.log2(total), -float("inf"))
        shift = tl.where(total > 0, whole, 0.0)
        column = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
        acc = tl.zeros([STEP, BLOCK_D], tl.float32)
        for s0 in range(0, count, STEP):
            s = s0 + tl.arange(0, STEP)
            slot = (begin + s).to(tl.int64) * ROWS + row
            weight = tl.exp2(tl.load(partial_lse + slot, mask=s < count, other=-float("inf")) - shift)
            values = tl.load(partial_out + slot[:, None] * 512 + column[None, :], mask=(s < count)[:, None], other=0.0)
            acc += weight[:, None] * values
        index = request.to(tl.int64) * ROWS + row
        tl.store(out + index * 512 + column, tl.sum(acc, 0).to(out.dtype.element_ty))
        if tl.program_id(2) == 0:
            tl.store(lse + index, whole * 0.6931471805599453)
