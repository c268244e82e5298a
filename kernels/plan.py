# SPDX-License-Identifier: Apache-2.0
"""Plan of a decode launch: the kernel's configuration and the scheduler's parameters. Needs no Triton."""

from dataclasses import dataclass
from functools import lru_cache

import torch

from . import hopper
from .common import device_facts
from .layout import D_V
from .schedule import ScheduleParams
from .select import HOPPER_KERNELS, HOPPER_TILE, DecodeConfig, few_blocks, few_rows, select_decode, select_portable


@dataclass(frozen=True)
class DecodePlan:
    """Everything about a launch that does not depend on the sequence lengths."""

    config: DecodeConfig
    params: ScheduleParams

    @property
    def on_hopper(self) -> bool:
        """Whether a CUDA kernel of hopper/ decodes: it schedules itself and merges split requests by itself."""
        return self.config.kernel in HOPPER_KERNELS

    def workspace_shapes(self, b: int, s_q: int, h_q: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the float32 partial outputs and log-sum-exps that splitting may need."""
        rows = s_q * h_q
        if self.on_hopper:
            slots, rows = hopper.max_slots(self.params, b), hopper.partial_rows(rows)
        else:
            slots = self.params.max_slots(b)
        return (slots, rows, D_V), (slots, rows)


def make_plan(config: DecodeConfig, rows: int, num_sms: int, batch_invariant: bool, max_splits: int = 32) -> DecodePlan:
    """Plan for a kernel configuration on a GPU of `num_sms` multiprocessors, `rows` = s_q * h_q."""
    row_blocks = hopper.row_blocks(config, rows) if config.kernel in HOPPER_KERNELS else -(-rows // config.block_h)
    programs = max(num_sms * config.programs_per_sm // row_blocks, 1)
    if config.kernel in HOPPER_KERNELS:
        programs = min(programs, hopper.MAX_PROGRAMS)
    params = ScheduleParams(programs, config.block_n, config.fixed_tiles, config.min_tiles, batch_invariant, max_splits)
    return DecodePlan(config, params)


def decode_plan(
    s_q: int,
    h_q: int,
    cache_format: str,
    device: torch.device,
    batch_invariant: bool = False,
    fp8_mma: bool = False,
    portable: bool = False,
    tiles: int | None = None,
) -> DecodePlan:
    """Plan for a launch shape; without `tiles` the same for every batch, so that captured graphs may share buffers.

    Makes a Hopper kernel ready for launches, or plans for the portable one where that fails.

    Args:
        s_q, h_q, cache_format: of the launches to come.
        device: theirs; a CPU with Triton's interpreter has the portable kernel only.
        batch_invariant: see `schedule.ScheduleParams`.
        fp8_mma: see `select.select_decode`.
        portable: take the portable kernel, whether or not another is preferred.
        tiles: most KV tiles of the batch where that is known (`batch_tiles`): for a small one another kernel may be
            faster. Not looked at with batch_invariant.
    """
    few = None
    if tiles is not None and not batch_invariant:
        few = few_rows(s_q * h_q, cache_format, tiles, device_facts(device)[1], fp8_mma)
    return _decode_plan(s_q, h_q, cache_format, device, batch_invariant, fp8_mma, portable, few)


def decode_plans(
    s_q: int,
    h_q: int,
    cache_format: str,
    device: torch.device,
    batch_invariant: bool = False,
    fp8_mma: bool = False,
    portable: bool = False,
) -> set[DecodePlan]:
    """Every plan that `decode_plan` gives for some number of tiles."""
    blocks = () if batch_invariant else few_blocks(s_q * h_q, cache_format, fp8_mma)
    shape = s_q, h_q, cache_format, device, batch_invariant, fp8_mma, portable
    return {_decode_plan(*shape, few) for few in (None, *blocks)}


def batch_tiles(b: int, max_seq_len: int) -> int:
    """Most KV tiles of a batch of `b` requests of up to `max_seq_len` tokens."""
    return b * -(-max_seq_len // HOPPER_TILE)


@lru_cache(maxsize=256)
def _decode_plan(
    s_q: int,
    h_q: int,
    cache_format: str,
    device: torch.device,
    batch_invariant: bool,
    fp8_mma: bool,
    portable: bool,
    few: int | None,
) -> DecodePlan:
    arch, num_sms = device_facts(device)
    rows = s_q * h_q
    compiled = device.type == "cuda" and not portable and hopper.available()
    config = select_decode(arch, rows, cache_format, compiled, fp8_mma, few)
    if config.kernel in HOPPER_KERNELS and not hopper.loads(config, cache_format, rows, device):
        config = select_portable(arch, rows, cache_format)
    return make_plan(config, rows, num_sms, batch_invariant)
