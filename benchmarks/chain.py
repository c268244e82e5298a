# SPDX-License-Identifier: Apache-2.0
"""What latency_floor.py measured, put together for a benchmark's case: a decode without arithmetic."""

import dataclasses
import json
import pathlib
from bisect import bisect_left

from benchmarks.cases import Case

TILE = 64
"""Tokens that one program reads at a time."""


@dataclasses.dataclass(frozen=True)
class Chain:
    """A decode's chain of steps. A measure, no bound of what other kernels can do.

    Attributes:
        steps: microseconds up to a step, by the number of programs.
        reads: bytes and the microseconds that reading so many takes, ascending.
    """

    steps: dict[int, dict[str, float]]
    reads: tuple[tuple[float, float], ...]

    @classmethod
    def load(cls, path: pathlib.Path) -> "Chain":
        """From a JSON file of latency_floor.py."""
        found = json.loads(path.read_text())
        steps: dict[int, dict[str, float]] = {}
        for row in found["rows"]:
            steps.setdefault(row["programs"], {})[row["step"]] = row["median_us"]
        return cls(steps, tuple(sorted((float(row["mib"] << 20), row["median_us"]) for row in found["reads"])))

    def read_us(self, count: float) -> float:
        """Microseconds of a kernel that only reads so many bytes; linear between sizes measured and beyond them."""
        at = min(max(bisect_left(self.reads, (count, 0.0)), 1), len(self.reads) - 1)
        (low, low_us), (high, high_us) = self.reads[at - 1 : at + 1]
        return low_us + (high_us - low_us) * (count - low) / (high - low)

    def us(self, case: Case, dtype: str, matmul_tflops: float, exchange: bool = True) -> float:
        """How long the chain takes with a case's keys, in microseconds.

        A program starts, reads a length and a page number. Then come the keys: a tile of them, or all of them as fast
        as a kernel that only reads does it, or the case's products at the matrix rate, whichever takes longest. Where
        there are fewer requests than programs, partial results are exchanged through global memory.

        Args:
            dtype: of the cache.
            matmul_tflops: rate of products.
            exchange: whether partial results are exchanged.
        """
        tiles = sum(-(-length // TILE) for length in case.seq_lens())
        programs = max((count for count in self.steps if count <= tiles), default=min(self.steps))
        steps = self.steps[programs]
        reading = self.read_us(case.min_bytes(dtype)) - steps["start"]
        keys = max(steps["keys"] - steps["page"], reading, case.flops() / matmul_tflops / 1e6)
        exchanging = steps["exchange"] - steps["keys"] if exchange and case.b < programs else 0.0
        return steps["page"] + keys + exchanging
