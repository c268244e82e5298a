# SPDX-License-Identifier: Apache-2.0
"""Decode for compute capability 9.0 in CUDA C++: compiled when the wheel is built, launched through the driver.

What is here is pure Python; `decode`, `sparse` and `launch` need a CUDA build of torch.
"""

import importlib.util
import logging
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..schedule import ScheduleParams
from . import variants
from .variants import VARIANTS

CUBINS = Path(__file__).parent / "cubin"
_LIST_PARTS = (16, 12, 10, 8, 7, 6, 5, 4, 3, 2)
"""Numbers of CTAs to be considered that share a list: sizes of a cluster."""
MAX_PROGRAMS = 160
"""Most programs for a block of query rows, and so most pieces of a request."""

_refused: list[str] = []  # why the kernels are not used any more in this process


class DriverError(RuntimeError):
    """The CUDA driver refused something."""


@lru_cache
def _missing() -> str | None:
    absent = [name for name in VARIANTS if not (CUBINS / f"{name}.cubin").is_file()]
    if absent:
        others = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        return f"kernels for Hopper were not compiled: {', '.join(absent[:3])}{others}"
    try:
        found = importlib.util.find_spec("cuda.bindings")
    except ModuleNotFoundError:  # not even `cuda`
        found = None
    return None if found else "cuda.bindings, which torch's CUDA builds bring, is not installed"


def unavailable() -> str | None:
    """Why these kernels cannot be used in this process, None if they can."""
    return _refused[0] if _refused else _missing()


def available() -> bool:
    """Whether all kernels were compiled, the driver's Python interface is there, and the driver took what it was given.

    Says nothing about the GPU.
    """
    return unavailable() is None


def loads(config: Any, cache_format: str, rows: int, device: Any) -> bool:
    """Whether the driver loads a configuration's kernel on a device, which has it ready for launches then.

    Where it does not (it may be older than the compiler), a warning says so once, and nothing is `available` any more.
    """
    return available() and loads_kernel(variant_of(config, cache_format, rows), device)


def loads_kernel(name: str, device: Any) -> bool:
    """The same for a kernel by its name."""
    if not available():
        return False
    try:
        from .launch import load  # here, for it needs the driver's interface

        load(name, device)
    except (ImportError, OSError, DriverError) as error:
        _refused.append(f"the kernel {name} could not be loaded: {error}")
        logging.getLogger(__name__).warning("FUSEDMLA: %s. The portable kernels are used.", _refused[0])
        return False
    return True


def variant_of(config: Any, cache_format: str, rows: int) -> str:
    """Name of the compiled kernel for a `DecodeConfig` of this folder's kernels and `rows` query rows a request."""
    if config.kernel == "swapab":
        return variants.swapab_name(cache_format, config.block_h)
    if config.kernel == "twowg_rows":
        return variants.ROWS_NAME
    if config.kernel == "swapab_gather":
        return variants.listed_name(cache_format, config.block_h)
    if config.kernel == "twowg_gather":
        return variants.gather_name(cache_format)
    return variants.twowg_name("e4m3" if config.kernel == "twowg_e4m3" else cache_format, cluster(config, rows))


def row_blocks(config: Any, rows: int) -> int:
    """Blocks that `rows` query rows are divided into."""
    blocks = -(-rows // config.block_h)
    return blocks + blocks % 2 if cluster(config, rows) == 2 else blocks


def cluster(config: Any, rows: int) -> int:
    """CTAs that share the copies of a tile."""
    return 2 if config.kernel in ("twowg", "twowg_e4m3") and rows > config.block_h else 1


def max_slots(params: ScheduleParams, b: int) -> int:
    """Most partial results: see slot_of in work.cuh."""
    return b * params.max_splits if params.batch_invariant else 2 * params.num_programs


def partial_rows(rows: int) -> int:
    """Rows of a partial result of `rows` query rows: the 64-row kernel stores them by eight, see twowg_partial.cuh."""
    return -(-rows // 8) * 8


def list_parts(tokens: int, topk: int, params: ScheduleParams, fits: Callable[[int], int]) -> int:
    """How many CTAs of the swap-AB kernel, a cluster, share a list: as many as run at once, each with two tiles.

    In batch-invariant mode it depends on `topk` alone, otherwise on the number of tokens too.

    Args:
        tokens, topk: lists and entries of each.
        params: of the plan.
        fits: how many clusters of a size run at once.
    """
    tiles = -(-topk // params.block_n)
    most = max(-(-tiles // 2), 1)
    if params.batch_invariant:
        return min(most, params.max_splits)
    largest = next((size for size in _LIST_PARTS if size <= most and fits(size) >= tokens), 1)
    return -(-tiles // -(-tiles // largest))  # fewer with as many tiles each
