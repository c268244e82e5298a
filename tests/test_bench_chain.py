# SPDX-License-Identifier: Apache-2.0
"""benchmarks/chain.py: what latency_floor.py measured, with a case's keys."""

import json
import random

import pytest

from benchmarks.cases import Case
from benchmarks.chain import Chain

MIB = 1 << 20


def steps(start: float, page: float, keys: float, exchange: float) -> dict[str, float]:
    return {"start": start, "length": start, "page": page, "keys": keys, "exchange": exchange}


def test_reading_is_interpolated(tmp_path) -> None:
    reads = {1: 5.0, 4: 8.0, 16: 12.0}
    rows = [{"mib": mib, "median_us": us} for mib, us in random.sample(list(reads.items()), 3)]
    path = tmp_path / "floor.json"
    path.write_text(json.dumps({"rows": [{"programs": 1, "step": "start", "median_us": 3.0}], "reads": rows}))
    chain = Chain.load(path)
    assert chain.steps == {1: {"start": 3.0}}
    for mib, us in ({2: 6.0, 10: 10.0, 0: 4.0, 28: 16.0} | reads).items():
        assert chain.read_us(mib * MIB) == pytest.approx(us)


def test_a_case_s_keys() -> None:
    measured = {1: steps(3, 4, 6, 9), 16: steps(4, 5, 7, 11), 128: steps(4, 6, 9, 13)}
    for name, reading, rate, least in (
        ("b1 h16 kv64", 0.5, 700.0, 4 + 2),  # one program: nothing to exchange
        ("b1 h16 kv1000", 0.5, 700.0, 5 + 2 + 4),  # 16 tiles
        ("b2 h16 kv4096", 20.0, 700.0, 6 + (20 - 4) + 4),
        ("b128 h16 kv64", 20.0, 700.0, 6 + (20 - 4)),  # a request for each
        ("b1 h16 kv1000", 0.5, Case.parse("b1 h16 kv1000").flops() / 9e6, 5 + 9 + 4),
    ):
        case = Case.parse(name)
        chain = Chain(measured, ((0.0, reading), (1e12, reading)))
        assert chain.us(case, "bf16", rate) == pytest.approx(least)
        exchange = 4 if case.b < 16 and name != "b1 h16 kv64" else 0
        assert chain.us(case, "bf16", rate, exchange=False) == pytest.approx(least - exchange)
