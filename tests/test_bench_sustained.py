# SPDX-License-Identifier: Apache-2.0
"""The benchmark of sustained load without a GPU: samples, rows and tables."""

import json

import torch

from benchmarks import bench_sustained, providers
from benchmarks.cases import Case
from benchmarks.inputs import Pool


def test_a_run_on_the_cpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_sustained, "_REST_SECONDS", 0.0)
    file = tmp_path / "rows.json"
    arguments = ["--case", "b2 h4 kv64", "--case", "b1 h4 topk64 kv128", "--seconds", "0.01", "--rounds", "1"]
    bench_sustained.main([*arguments, "--providers", "reference,fa3", "--device", "cpu", "--json", str(file)])
    rows = json.loads(file.read_text())["rows"]
    assert [(row["case"], row["provider"]) for row in rows] == [
        ("b2 h4 kv64", "reference"),
        ("b2 h4 kv64", "fa3"),
        ("b1 h4 topk64 kv128", "reference"),
        ("b1 h4 topk64 kv128", "fa3"),
    ]
    for row in rows:
        if row["provider"] == "reference":
            assert row["calls"] % bench_sustained.CALLS == 0 and row["mean_us"] * row["calls"] >= 10_000
        else:
            assert "mean_us" not in row and row["note"]
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 + 4 and len({len(line) for line in printed}) == 1


def test_a_provider_that_serves_no_sparse_attention():
    case = Case.parse("b1 h4 topk64 kv128")
    pool = Pool.for_cases([case], torch.device("cpu"))
    name = next(name for name in providers.ALL if name not in providers.SPARSE)
    assert bench_sustained.run(pool.inputs(case, "bf16"), name, 0.01)["note"] == "no sparse attention"


def test_samples():
    """The load's beginning and end are left out, and so are lines that were cut off."""
    busy = ["1650, 700.10, 0x0000000000000004", "1640, 710.30, 0x0000000000000004", "1660, 705.20, 0x0000000000000000"]
    lines = ["1980, 120.00, 0x0000000000000001", *busy, busy[0], busy[0], "1980, 300.00, 0x0000000000000001", "198"]
    assert bench_sustained.summary(lines) == {"sm_mhz": 1650, "watts": 700.1, "power_limited": True}
    assert bench_sustained.summary([]) == {}
    assert bench_sustained.summary(["1980, [N/A], 0x0"] * 8) == {}
