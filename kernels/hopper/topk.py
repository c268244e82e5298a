# SPDX-License-Identifier: Apache-2.0
"""Exact top-k on Hopper: one launch of a CUDA kernel in which a cluster of blocks selects from a row."""

import ctypes
from collections.abc import Callable
from functools import cache

import torch

from ..common import device_facts
from . import loads_kernel
from .variants import TOPK_NAME

LARGEST_CLUSTER = 16
LARGEST_CHUNK = 32768
"""Values of a row that a block may have: kChunk in topk.cu."""
LARGEST_K = 8192
"""kCapacity in topk.cu."""
_LEAST_CHUNK = 2048
"""Values of a row for which another block is worth its wait for the others."""


class Params(ctypes.Structure):
    """Mirror of `Params` in topk.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("values", "lengths", "out")),
        *((name, ctypes.c_int64) for name in ("row_stride", "out_stride")),
        *((name, ctypes.c_int) for name in ("n", "k", "repeat")),
    ]


def cluster_size(rows: int, n: int, most_clusters: Callable[[int], int]) -> int:
    """Blocks that share a row: what holds it, and more as long as all rows still run at once and have enough for each.

    Args:
        rows, n: of the values.
        most_clusters: how many clusters of so many blocks the GPU runs at once.
    """
    size = 1
    while size * LARGEST_CHUNK < n:
        size *= 2
    while 2 * size <= LARGEST_CLUSTER and 2 * size * _LEAST_CHUNK <= n and rows <= most_clusters(2 * size):
        size *= 2
    return size


@cache
def _ready(device: torch.device) -> bool:
    return device.type == "cuda" and device_facts(device)[0] == (9, 0) and loads_kernel(TOPK_NAME, device)


def takes(logits: torch.Tensor, k: int) -> bool:
    """Whether the kernel is there and serves such rows, which must lie in whole vectors of 16 bytes."""
    rows, n = logits.shape
    fits = n <= LARGEST_CLUSTER * LARGEST_CHUNK and rows < 1 << 16 and k <= LARGEST_K
    return fits and logits.data_ptr() % 16 == 0 and _ready(logits.device)


def topk_indices(logits: torch.Tensor, lengths: torch.Tensor, out: torch.Tensor) -> None:
    """Launch on the current device and stream.

    Args:
        logits: ``[rows, n]`` float32, see `takes`.
        lengths: ``[rows / s]`` int32, as in `topk.topk_indices`.
        out: ``[rows, k]`` int32.
    """
    from . import launch  # here, because it needs the driver's interface

    rows, n = logits.shape
    device = torch.cuda.current_device()
    size = cluster_size(rows, n, lambda size: launch.most_clusters(TOPK_NAME, size, device))
    strides = logits.stride(0), out.stride(0)
    p = Params(
        logits.data_ptr(), lengths.data_ptr(), out.data_ptr(), *strides, n, out.shape[1], rows // lengths.numel()
    )
    launch.launch(TOPK_NAME, p, (size, rows), size, together=False)
