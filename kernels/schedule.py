# SPDX-License-Identifier: Apache-2.0
"""The split-KV tile scheduler: from sequence lengths to work for a persistent grid, on the device, in closed form.

A decode kernel runs a fixed number of *programs*. Each takes a run of consecutive *items*; an item is a range of KV
tiles of one request. Requests are laid end to end on a line, each as `fixed_tiles` (what starting an item costs, in
tiles) followed by its tiles, and the line is divided among the programs:

* default: cut at equal distances, inside requests too. A cut in the fixed part of a request moves to its first tile.
  Program loads differ by at most one tile plus the fixed cost of one more item.
* batch-invariant: a request is cut into chunks whose size depends on its own length only, and whole chunks are dealt
  out by where they begin. Loads differ by at most one chunk; a request's result has the same bits in any batch.

Every program of the scheduling kernel recomputes the prefix sums and writes its own entries, so there is no serial
loop, no host synchronisation and no dependence on anything but `seq_lens`: safe to replay in a CUDA graph. The idea of
a cost line with a fixed overhead per request is FlashMLA's (github.com/deepseek-ai/FlashMLA), whose scheduler walks it
with one thread.
"""

from dataclasses import dataclass

import torch

from .common import dependent_launch, next_power_of_2

ITEM_FIELDS = 4
"""Fields of an item: request, first tile, one past the last tile, slot of its partial result (-1: not split)."""


@dataclass(frozen=True)
class ScheduleParams:
    """What a schedule depends on besides the sequence lengths.

    Attributes:
        num_programs: programs of the persistent grid (per block of query rows).
        block_n: KV tokens of a tile; split points are multiples of it.
        fixed_tiles: fixed cost of an item, in tiles, at least 1.
        min_tiles: smallest share of a program, so that short sequences are not split into crumbs.
        batch_invariant: whether the splits of a request depend on its own length alone.
        max_splits: most splits of a request in batch-invariant mode (the default mode needs no such bound).
    """

    num_programs: int
    block_n: int
    fixed_tiles: int = 1
    min_tiles: int = 1
    batch_invariant: bool = False
    max_splits: int = 32

    def __post_init__(self):
        for field in ("num_programs", "block_n", "fixed_tiles", "min_tiles", "max_splits"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")

    def max_items(self, b: int) -> int:
        """Most items that any sequence lengths of `b` requests can give."""
        return b * self.max_splits if self.batch_invariant else b + self.num_programs

    def max_slots(self, b: int) -> int:
        """Most partial results that any sequence lengths of `b` requests can give, at least 1."""
        if self.batch_invariant:
            return b * self.max_splits
        cuts = self.num_programs - 1
        return max(1, cuts + min(b, cuts))

    def max_pieces(self) -> int:
        """Most pieces of one request."""
        return self.max_splits if self.batch_invariant else self.num_programs


@dataclass(frozen=True)
class TileSchedule:
    """A schedule in fixed-size int32 buffers.

    Attributes:
        program_begin: ``[num_programs + 1]``, items of program p are ``program_begin[p]`` to ``program_begin[p + 1]``.
        items: ``[max_items, 4]``, see `ITEM_FIELDS`; entries past ``program_begin[-1]`` are meaningless.
        num_splits: ``[b + 1]``, request i owns the partial results ``num_splits[i]`` to ``num_splits[i + 1]``, none if
            it was not split.
    """

    program_begin: torch.Tensor
    items: torch.Tensor
    num_splits: torch.Tensor

    def narrow(self, b: int) -> "TileSchedule":
        """The same buffers for a batch of `b` requests, at the same addresses."""
        return TileSchedule(self.program_begin, self.items, self.num_splits[: b + 1])


def allocate_schedule(params: ScheduleParams, b: int, device: torch.device | str) -> TileSchedule:
    """Buffers that hold any schedule of up to `b` requests."""
    return TileSchedule(
        torch.zeros(params.num_programs + 1, dtype=torch.int32, device=device),
        torch.zeros(params.max_items(b), ITEM_FIELDS, dtype=torch.int32, device=device),
        torch.zeros(b + 1, dtype=torch.int32, device=device),
    )


def build_schedule(seq_lens: torch.Tensor, params: ScheduleParams, out: TileSchedule | None = None) -> TileSchedule:
    """Schedule a batch with one kernel launch and no host synchronisation.

    Args:
        seq_lens: ``[b]`` int32 on the device, contiguous; 0 gives an item without tiles, so that the request's output
            is still written.
        params: the same as for the decode kernel.
        out: buffers to write, from `allocate_schedule` for at least `b` requests.
    """
    from .schedule_kernel import schedule_kernel  # here, so that host-side users of this module need no Triton

    (b,) = seq_lens.shape
    out = allocate_schedule(params, b, seq_lens.device) if out is None else out.narrow(b)
    programs = max(params.num_programs + 1, b + 1)
    schedule_kernel[(programs,)](
        seq_lens,
        out.program_begin,
        out.items,
        out.num_splits,
        b,
        NUM_PROGRAMS=params.num_programs,
        BLOCK_N=params.block_n,
        FIXED=params.fixed_tiles,
        MIN_TILES=params.min_tiles,
        BATCH_INVARIANT=params.batch_invariant,
        MAX_SPLITS=params.max_splits,
        BLOCK_B=next_power_of_2(max(b, 16)),
        BLOCK_J=next_power_of_2(min(params.max_pieces(), 128)),
        **dependent_launch(seq_lens.device),
        num_warps=4 if b <= 512 else 8,
    )
    return out


def build_schedule_host(seq_lens: torch.Tensor, params: ScheduleParams) -> TileSchedule:
    """The same schedule on the host, request by request: the device kernel's twin for tests and drawings."""
    lens = [int(n) for n in seq_lens]
    tiles = [-(-n // params.block_n) for n in lens]
    fixed, invariant = params.fixed_tiles, params.batch_invariant
    chunks = [max(-(-t // params.max_splits), params.min_tiles) for t in tiles]
    counts = [max(-(-t // c), 1) for t, c in zip(tiles, chunks, strict=True)]
    costs = [n * (c + fixed) if invariant else t + fixed for t, c, n in zip(tiles, chunks, counts, strict=True)]
    share = max(-(-sum(costs) // params.num_programs), params.min_tiles + fixed)
    schedule = allocate_schedule(params, len(lens), "cpu")
    rows, programs, position = [], [], 0
    for request, (t, chunk, count, cost) in enumerate(zip(tiles, chunks, counts, costs, strict=True)):
        if invariant:
            pieces = [(j * chunk, min((j + 1) * chunk, t)) for j in range(count)]
            programs += [(position + j * (chunk + fixed)) // share for j in range(count)]
        else:
            line = position + fixed  # where the first tile lies
            owner = [(line + k) // share for k in range(t)] or [(line - 1) // share]
            used = sorted(set(owner))
            pieces = [(owner.index(p), len(owner) - owner[::-1].index(p)) if t else (0, 0) for p in used]
            programs += used
        base = int(schedule.num_splits[request])
        split = len(pieces) > 1
        rows += [(request, begin, end, base + j if split else -1) for j, (begin, end) in enumerate(pieces)]
        schedule.num_splits[request + 1] = base + (len(pieces) if split else 0)
        position += cost
    if rows:
        schedule.items[: len(rows)] = torch.tensor(rows, dtype=torch.int32)
    owners = torch.tensor(programs, dtype=torch.int64)
    schedule.program_begin[:] = (owners[None, :] < torch.arange(params.num_programs + 1)[:, None]).sum(1)
    return schedule
