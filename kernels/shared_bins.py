# SPDX-License-Identifier: Apache-2.0
"""A histogram in shared memory, for Triton kernels on a GPU.

Triton has no atomics on shared memory, and its own histogram spends a population count on every bin of every value. The
hardware adds 1 to many counters at once, so the few instructions that this takes are written out. The bins are static
shared memory, which lies beside the memory that Triton hands out. Between clearing, counting and reading, a program
needs `tl.debug_barrier`. A tensor of digits must have at least as many elements as the program has threads: a smaller
one would be held, and counted, several times.
"""

import triton
import triton.language as tl

BINS = 2048
BINS_BYTES = 4 * BINS

_BINS = tl.constexpr(BINS)


@triton.jit
def shared_bins():
    """Address of the bins. To be called once in a kernel: each call would have bins of its own."""
    return tl.inline_asm_elementwise(
        """
        {
        .shared .align 16 .b8 topk_bins[8192];
        mov.u32 $0, topk_bins;
        }
        """,
        constraints="=r",
        args=[],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def clear_bins(bins):
    address = bins + tl.arange(0, _BINS) * 4
    tl.inline_asm_elementwise(
        "{ mov.u32 $0, 0; st.shared.u32 [$1], $0; }",
        constraints="=&r,r,~{memory}",
        args=[address],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def count_in_bins(bins, digit, live):
    tl.inline_asm_elementwise(
        """
        {
        .reg .pred live;
        setp.ne.u32 live, $2, 0;
        mov.u32 $0, 0;
        @live red.shared.add.u32 [$1], 1;
        }
        """,
        constraints="=&r,r,r,~{memory}",
        args=[bins + digit * 4, live.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def read_bins(bins):
    address = bins + tl.arange(0, _BINS) * 4
    return tl.inline_asm_elementwise(
        "ld.shared.u32 $0, [$1];",
        constraints="=r,r,~{memory}",
        args=[address],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
