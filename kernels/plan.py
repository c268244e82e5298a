# SPDX-License-Identifier: Apache-2.0
"""Plan of a decode launch: the kernel's configuration and the scheduler's parameters. Needs no Triton."""

from dataclasses import dataclass
from functools import lru_cache

import torch

from .common import device_facts
from .layout import D_V
from .schedule import ScheduleParams
from .select import DecodeConfig, select_decode


@dataclass(frozen=True)
class DecodePlan:
    """Everything about a launch that does not depend on the sequence lengths."""

    config: DecodeConfig
    params: ScheduleParams

    def workspace_shapes(self, b: int, s_q: int, h_q: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the float32 partial outputs and log-sum-exps that splitting may need."""
        slots = self.params.max_slots(b)
        return (slots, s_q * h_q, D_V), (slots, s_q * h_q)


def make_plan(config: DecodeConfig, rows: int, num_sms: int, batch_invariant: bool, max_splits: int = 32) -> DecodePlan:
    """Plan for a kernel configuration on a GPU of `num_sms` multiprocessors, `rows` = s_q * h_q."""
    row_blocks = -(-rows // config.block_h)
    programs = max(num_sms * config.programs_per_sm // row_blocks, 1)
    params = ScheduleParams(programs, config.block_n, config.fixed_tiles, config.min_tiles, batch_invariant, max_splits)
    return DecodePlan(config, params)


@lru_cache(maxsize=256)
def decode_plan(
    s_q: int, h_q: int, cache_format: str, device: torch.device, batch_invariant: bool = False
) -> DecodePlan:
    """Plan for a launch shape; the same for every batch size, so that captured graphs may share buffers."""
    arch, num_sms = device_facts(device)
    return make_plan(select_decode(arch, s_q * h_q, cache_format), s_q * h_q, num_sms, batch_invariant)
