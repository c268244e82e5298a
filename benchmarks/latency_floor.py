# SPDX-License-Identifier: Apache-2.0
"""How long a decode step takes without any arithmetic: its chain of reads, its keys and its exchange.

    python benchmarks/latency_floor.py --json floor.json

Programs of a kernel each do, step after step: start; read the request's length; read a page number; read that page's
tile of 64 fp8 keys; publish 16 x 512 float32 results, wait until all programs have, and add up an equal share of
everybody's. Each line has the time of all steps up to that one, timed as `bench_decode.py` times kernels.

Then, for sizes from 1 MiB on, how long a kernel takes that only reads so much. With the flush that overwrites L2 it
includes writing back what that left there, as every kernel of a benchmark has to.
"""

import argparse
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import torch
import triton
import triton.language as tl

from benchmarks import timing
from benchmarks.read_rate import sum_of_blocks

STEPS = ("start", "length", "page", "keys", "exchange")
TILE_WORDS = 64 * 576 // 4
RESULTS = 16 * 512


@triton.jit
def _chain_kernel(
    lengths, table, cache, partial, counters, out,
    STEP: tl.constexpr, PROGRAMS: tl.constexpr, TILE: tl.constexpr, RESULTS: tl.constexpr, SHARE: tl.constexpr,  # noqa: N803
):  # fmt: skip
    program = tl.program_id(0)
    value = program
    if STEP >= 1:
        value = tl.load(lengths)
    if STEP >= 2:
        value = tl.load(table + tl.minimum(program, value - 1))
    if STEP >= 3:
        word = tl.arange(0, 16384)
        keys = tl.load(cache + value.to(tl.int64) * TILE + word, mask=word < TILE, other=0)
        value = tl.sum(keys, 0)
    if STEP < 4:
        tl.store(out + program * SHARE, value.to(tl.float32))
    else:
        column = tl.arange(0, RESULTS)
        tl.store(partial + program * RESULTS + column, tl.zeros([RESULTS], tl.float32) + value.to(tl.float32))
        tl.debug_barrier()
        tl.atomic_add(counters, 1, sem="release")
        while tl.atomic_add(counters, 0, sem="acquire") < PROGRAMS:
            pass
        tl.debug_barrier()
        share = tl.arange(0, SHARE)
        total = tl.zeros([SHARE], tl.float32)
        for other in tl.static_range(PROGRAMS):
            total += tl.load(partial + other * RESULTS + program * SHARE + share, cache_modifier=".cg")
        tl.store(out + program * SHARE + share, total)
        if tl.atomic_add(counters + 1, 1, sem="acq_rel") == PROGRAMS - 1:  # the last one leaves zeros
            tl.store(counters, 0)
            tl.store(counters + 1, 0)


class Chain:
    """The kernel and what it reads: one request of `programs` tiles, a power of two.

    Args:
        pages: pages of the cache, in which the request's lie anywhere.
    """

    def __init__(self, programs: int, pages: int, device: torch.device) -> None:
        self.programs = programs
        self.lengths = torch.full((1,), programs, dtype=torch.int32, device=device)
        self.table = torch.randperm(pages, device=device)[:programs].int()
        self.cache = torch.randint(-1000, 1000, (pages, TILE_WORDS), dtype=torch.int32, device=device)
        self.partial = torch.empty(programs, RESULTS, device=device)
        self.counters = torch.zeros(2, dtype=torch.int32, device=device)
        self.out = torch.empty(RESULTS, device=device)

    def run(self, step: int) -> torch.Tensor:
        """Do all steps up to `STEPS[step]`; what each program found, the first value of its share of `out`."""
        _chain_kernel[(self.programs,)](
            self.lengths, self.table, self.cache, self.partial, self.counters, self.out,
            STEP=step, PROGRAMS=self.programs, TILE=TILE_WORDS, RESULTS=RESULTS, SHARE=RESULTS // self.programs,
            num_warps=8,
        )  # fmt: skip
        return self.out.view(self.programs, -1)[:, 0]

    def expected(self, step: int) -> torch.Tensor:
        """What `run` must return."""
        sums = self.cache[self.table.long()].sum(1).float()
        found = [torch.arange(self.programs).to(sums), self.lengths.float().expand_as(sums), self.table.float(), sums]
        return found[step] if step < 4 else sums.sum().expand_as(sums)


def read_us(timer: timing.Timer, mib: int, source: torch.Tensor) -> timing.Timing:
    """Time reading the first so many MiB of `source`, float32: by the faster of two kernels."""
    values = source[: mib << 18]
    sums = sum_of_blocks(values)
    ways = (lambda: sum_of_blocks(values, sums), lambda: values.sum())
    return min((timer.measure(timing.capture(way, timer.device)) for way in ways), key=lambda t: t.median_us)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, nargs="+", default=[1, 16, 128])
    parser.add_argument("--pages", type=int, default=16384)
    parser.add_argument("--mib", type=int, nargs="+", default=[1 << i for i in range(12)])
    parser.add_argument("--reps", type=int, default=25)
    parser.add_argument("--flush", choices=["write", "read"], default="write")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    device = torch.device("cuda")
    timer = timing.Timer(device, reps=args.reps, flush=args.flush)
    rows = []
    for programs in args.programs:
        chain = Chain(programs, args.pages, device)
        for step, name in enumerate(STEPS):
            torch.testing.assert_close(chain.run(step), chain.expected(step))
            measured = timer.measure(timing.capture(lambda: chain.run(step), device))  # noqa: B023 - called in this turn
            rows.append(
                {"programs": programs, "step": name, "median_us": measured.median_us, "p20_us": measured.p20_us}
            )
            print(f"{programs:4} programs, {name:9} {measured.median_us:6.2f} us", flush=True)
    source = torch.rand(max(args.mib) << 18, device=device)
    reads = []
    for mib in args.mib:
        measured = read_us(timer, mib, source)
        reads.append({"mib": mib, "median_us": measured.median_us, "p20_us": measured.p20_us})
        gbs = (mib << 20) / measured.median_us / 1e3
        print(f"{mib:5} MiB read {measured.median_us:7.2f} us, {gbs:5.0f} GB/s", flush=True)
    if args.json:
        found = {"rows": rows, "reads": reads, "flush": args.flush} | timing.environment(device)
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
