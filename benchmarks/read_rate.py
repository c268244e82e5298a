# SPDX-License-Identifier: Apache-2.0
"""A kernel that only reads: the ceiling of a decode step, which writes next to nothing."""

import torch
import triton
import triton.language as tl

_BLOCK = 8192


def sum_of_blocks(source: torch.Tensor, sums: torch.Tensor | None = None) -> torch.Tensor:
    """Sum blocks of 8192 values.

    Args:
        source: ``[n]`` float32, n a multiple of 8192.
        sums: ``[n / 8192]`` float32 to write, allocated if not given.

    Raises:
        ValueError: n is no multiple of 8192.
    """
    blocks, rest = divmod(source.numel(), _BLOCK)
    if rest:
        raise ValueError(f"source must hold a multiple of {_BLOCK} values, got {source.numel()}")
    sums = source.new_empty(blocks) if sums is None else sums
    # Eight loads of 16 bytes in flight in each thread, and eight such programs on a multiprocessor.
    _sum_kernel[(blocks,)](source, sums, BLOCK=_BLOCK, num_warps=8)
    return sums


@triton.jit
def _sum_kernel(source, sums, BLOCK: tl.constexpr):  # noqa: N803 - a constexpr
    block = tl.program_id(0)
    values = tl.load(source + block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK))
    tl.store(sums + block, tl.sum(values, 0))
