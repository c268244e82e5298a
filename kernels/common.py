# SPDX-License-Identifier: Apache-2.0
"""Small pieces that several kernels share."""

import os
from functools import lru_cache

import torch

LOG2_E = 1.4426950408889634


def next_power_of_2(n: int) -> int:
    """Smallest power of two that is at least `n` (n >= 1)."""
    return 1 << (n - 1).bit_length()


def interpreted() -> bool:
    """Whether Triton kernels run in its CPU interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@lru_cache
def device_facts(device: torch.device) -> tuple[tuple[int, int], int]:
    """Compute capability and number of multiprocessors of a GPU; a CPU (the interpreter) poses as a small Hopper."""
    if device.type != "cuda":
        return (9, 0), 4
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor), properties.multi_processor_count


def dependent_launch(device: torch.device) -> dict[str, bool]:
    """Launch options of a kernel that may start while the one before it in the stream still runs.

    Programmatic dependent launch, compute capability 9.0 and later: the kernel's prologue overlaps its predecessor's
    end, and `gdc_wait` holds it until everything before it has finished and is visible.
    """
    on = device.type == "cuda" and device_facts(device)[0] >= (9, 0)
    return {"DEPENDENT": True, "launch_pdl": True} if on else {"DEPENDENT": False}
