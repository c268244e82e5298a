# SPDX-License-Identifier: Apache-2.0
"""Plan of a sparse attention launch: the kernel's configuration and how lists of keys are split. Needs no Triton.

All lists of a launch are equally long, so a few integers are a whole schedule and no kernel has to compute one.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

from . import hopper
from .common import device_facts
from .layout import D_V
from .schedule import ScheduleParams
from .select import FEW_TOKENS, HOPPER_KERNELS, DecodeConfig, select_sparse

_MAX_WAVES = 3
"""Pieces, where there is more than one a token, are at most this many times the programs that run at once."""
_MERGE_TILES = 2
"""What writing, reading and merging partial results costs, in tiles of a program."""
_INVARIANT_PIECES = 8
"""Most pieces of a list in batch-invariant mode: every token of any batch takes that many partial results."""
CONVERTED_ROWS_OF_TOKEN = 64
"""Rows that a prefill converts to bfloat16 for each of its tokens, at most: converting one takes 0.6 ns, and a token
of 64 heads gains 80 ns by it, one of 128 heads 220."""
_CONVERTING_TOKENS = 512
"""Fewest tokens of such a prefill: it is two launches, and one of its own for each request."""


@lru_cache(maxsize=4096)
def _pieces(params: ScheduleParams, tokens: int, topk: int) -> tuple[int, int]:
    tiles = max(-(-topk // params.block_n), 1)
    most = params.max_pieces()
    if not params.batch_invariant:
        most = min(most, max(_MAX_WAVES * params.num_programs // max(tokens, 1), 1))

    def cost(chunk: int) -> int:
        count = -(-tiles // chunk)
        waves = -(-tokens * count // params.num_programs)
        return waves * (chunk + params.fixed_tiles) + (_MERGE_TILES if count > 1 else 0)

    least = min(max(-(-tiles // most), params.min_tiles), tiles)
    chunk = least if params.batch_invariant else min(range(least, tiles + 1), key=cost)
    return -(-tiles // chunk), chunk


@dataclass(frozen=True)
class SparsePlan:
    """Everything about a launch that is the same for any number of tokens, but few: see `sparse_plan`.

    Attributes:
        config: kernel and tile sizes.
        params: `num_programs` that run at once for each block of heads, and the mode. In batch-invariant mode the
            pieces of a list depend on its length `topk` alone, otherwise on the number of tokens too.
    """

    config: DecodeConfig
    params: ScheduleParams

    @property
    def on_hopper(self) -> bool:
        """Whether a CUDA kernel of hopper/ serves the launch: it schedules itself and merges split lists by itself."""
        return self.config.kernel in HOPPER_KERNELS

    def converts(self, cache_format: str, tokens: int, rows: int) -> bool:
        """Whether a prefill of one request is faster if its keys are converted to bfloat16 first: `sparse_convert`.

        Args:
            cache_format: of the cache, for which this plan is.
            tokens: query tokens of the launch. Their number must not matter in batch-invariant mode.
            rows: of the cache that would be converted.
        """
        many_heads = self.config.kernel == "twowg_gather" and cache_format == "fp8_ds_mla"
        enough = tokens >= _CONVERTING_TOKENS and rows <= CONVERTED_ROWS_OF_TOKEN * tokens
        return many_heads and not self.params.batch_invariant and enough

    def gives_max_logits(self, cache_format: str) -> bool:
        """Whether the kernel returns the largest score of each row, too."""
        return not self.on_hopper or self.config.kernel == "twowg_gather" and cache_format != "fp8_ds_mla"

    def pieces(self, tokens: int, topk: int) -> tuple[int, int]:
        """How many pieces a list of `topk` entries is cut into when there are `tokens` lists, and tiles of a piece."""
        return _pieces(self.params, tokens, topk)

    def workspace_shapes(self, b: int, s_q: int, h_q: int) -> tuple[tuple[int, ...], ...]:
        """Shapes of the float32 scratch tensors that up to `b` requests may need: partial outputs, log-sum-exps, ends.

        The last one holds integers.
        """
        params = self.params
        if self.on_hopper:
            return self.shapes_for(hopper.max_slots(params, b * s_q), b * s_q, h_q)
        slots = b * s_q * params.max_splits if params.batch_invariant else _MAX_WAVES * params.num_programs
        return self.shapes_for(slots, b * s_q, h_q)

    def launch_shapes(self, tokens: int, topk: int, h_q: int) -> tuple[tuple[int, ...], ...]:
        """What a launch for `tokens` lists of `topk` entries needs of them."""
        if self.on_hopper:
            return self.shapes_for(hopper.max_slots(self.params, tokens), tokens, h_q)
        pieces, _ = self.pieces(tokens, topk)
        return self.shapes_for(tokens * pieces if pieces > 1 else 1, tokens, h_q)

    @staticmethod
    def shapes_for(slots: int, tokens: int, h_q: int) -> tuple[tuple[int, ...], ...]:
        """The same for an exact number of partial results, whatever the kernel."""
        rows = hopper.partial_rows(h_q)
        return (slots, rows, D_V), (slots, rows), (tokens + 1,)


def make_sparse_plan(
    config: DecodeConfig, h_q: int, num_sms: int, batch_invariant: bool, max_splits: int = _INVARIANT_PIECES
) -> SparsePlan:
    """Plan for a kernel configuration on a GPU of `num_sms` multiprocessors."""
    programs = max(num_sms * config.programs_per_sm // -(-h_q // config.block_h), 1)
    if config.kernel in HOPPER_KERNELS:
        programs = min(programs, hopper.MAX_PROGRAMS)
    params = ScheduleParams(programs, config.block_n, config.fixed_tiles, config.min_tiles, batch_invariant, max_splits)
    return SparsePlan(config, params)


def sparse_plan(
    h_q: int,
    cache_format: str,
    device: torch.device,
    batch_invariant: bool = False,
    prefill: bool = False,
    portable: bool = False,
    tokens: int | None = None,
) -> SparsePlan:
    """Plan for a launch shape, the same for any number of tokens but few: captured graphs may share buffers.

    Makes a Hopper kernel ready for launches, or plans for the portable one where that fails.

    Args:
        h_q, cache_format: of the launches to come.
        device: theirs; a CPU with Triton's interpreter poses as a small Hopper.
        batch_invariant: the same bits for a token whatever else is in the launch.
        prefill: many tokens are to be expected, so batch-invariant launches do not split at all.
        portable: take the portable kernel, whether or not another is preferred.
        tokens: query tokens of the launch: for up to FEW_TOKENS another kernel may be faster. Not looked at with
            batch_invariant or prefill.
    """
    few = tokens if tokens is not None and tokens <= FEW_TOKENS and not (batch_invariant or prefill) else None
    return _sparse_plan(h_q, cache_format, device, batch_invariant, prefill, portable, few)


@lru_cache(maxsize=256)
def _sparse_plan(
    h_q: int,
    cache_format: str,
    device: torch.device,
    batch_invariant: bool,
    prefill: bool,
    portable: bool,
    tokens: int | None,
) -> SparsePlan:
    arch, num_sms = device_facts(device)
    max_splits = 1 if prefill else _INVARIANT_PIECES
    compiled = device.type == "cuda" and not portable and hopper.available()
    config = select_sparse(arch, h_q, cache_format, compiled, tokens, prefill)
    if config.kernel in HOPPER_KERNELS and not hopper.loads(config, cache_format, h_q, device):
        config = select_sparse(arch, h_q, cache_format)
    return make_sparse_plan(config, h_q, num_sms, batch_invariant, max_splits)
