# SPDX-License-Identifier: Apache-2.0
"""Dense decode for compute capability 9.0 in CUDA C++: compiled when the wheel is built, launched through the driver.

`available` and the sizes are pure Python; `decode` and `launch` need a CUDA build of torch.
"""

import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..schedule import ScheduleParams
from .variants import VARIANTS

CUBINS = Path(__file__).parent / "cubin"
MAX_PROGRAMS = 160
"""Most programs for a block of query rows, and so most pieces of a request: kMaxPieces in splitkv.cuh."""


@lru_cache
def available() -> bool:
    """Whether all kernels were compiled and the driver's Python interface, which torch's CUDA builds need, is there."""
    return importlib.util.find_spec("cuda.bindings") is not None and all(
        (CUBINS / f"{name}.cubin").is_file() for name in VARIANTS
    )


def row_blocks(config: Any, rows: int) -> int:
    """Blocks that `rows` query rows are divided into."""
    blocks = -(-rows // config.block_h)
    return blocks + blocks % 2 if cluster(config, rows) == 2 else blocks


def cluster(config: Any, rows: int) -> int:
    """CTAs that share the copies of a tile."""
    return 2 if config.kernel == "twowg" and rows > config.block_h else 1


def max_slots(params: ScheduleParams, b: int) -> int:
    """Most partial results: see slot_of in work.cuh."""
    return b * params.max_splits if params.batch_invariant else 2 * params.num_programs
