# SPDX-License-Identifier: Apache-2.0
"""benchmarks/latency_floor.py: each step does what it says, in the interpreter one program at a time."""

import random

import pytest
import torch

pytest.importorskip("triton")
from benchmarks import latency_floor, timing  # noqa: E402


@pytest.mark.parametrize("step", range(len(latency_floor.STEPS)))
def test_steps(step: int, device: str) -> None:
    # Programs of the interpreter run one after the other: there, the exchange is with itself.
    programs = 16 if step < 4 or device == "cuda" else 1
    chain = latency_floor.Chain(programs, random.randint(16, 40), torch.device(device))
    for _ in range(2):
        torch.testing.assert_close(chain.run(step), chain.expected(step))
    assert not chain.counters.any()


def test_reading_takes_time(device: str) -> None:
    timer = timing.Timer(torch.device(device), reps=3)
    assert latency_floor.read_us(timer, 1, torch.rand(1 << 18, device=device)).median_us > 0
