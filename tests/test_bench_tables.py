# SPDX-License-Identifier: Apache-2.0
"""benchmarks/tables.py: ratios, targets and summaries of a saved run."""

import json
import random
import sys

import pytest

from benchmarks import tables, targets
from benchmarks.cases import Case

CEILINGS = {"copy_gbs": 4000.0, "read_gbs": 4500.0, "matmul_tflops": 700.0}
AIMED, OTHER = "b1 h16 kv1024", "b2 h24 kv1000"


def run(times: dict[tuple[str, str], float], dtype: str = "bf16", status: str = "ok") -> dict:
    about = {"gpu": "GPU", "torch": "1", "cuda": "2", "triton": "3", "version": "v 4", "dtype": dtype, "status": status}
    rows = [
        about | {"case": case, "provider": provider, "median_us": us, "gbs": 4300.0, "tflops": 2.0}
        for (case, provider), us in times.items()
    ]
    return {"rows": rows, "ceilings": CEILINGS, "command": "python benchmarks/bench_decode.py"}


def cells(text: str, case: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {case} "))
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_a_ratio_is_of_the_best_peer_and_judged_by_the_target():
    peer = random.uniform(20, 30)
    for share, verdict in ((1.01, "yes"), (0.75, "no, 25 % short")):
        ours = peer / (targets.RATIOS[AIMED, "bf16"] * share)
        times = {(AIMED, "fusedmla"): ours, (AIMED, "fusedmla-portable"): 1.0, (AIMED, "fa3"): peer, (AIMED, "x"): 90.0}
        line = cells(tables.Table(run(times), "bf16").text(), AIMED)
        assert line[2:6] == [f"**{ours:.1f}**", "1.0", f"{peer:.1f}", "90.0"]
        assert line[6:] == [f"{peer / ours:.2f}", "1.8", verdict]
        assert line[1] == f"{Case.parse(AIMED).min_bytes('bf16') / 4500e3:.1f}"


def test_summaries_name_what_is_slower():
    times = {
        (AIMED, "fusedmla"): 10.0, (AIMED, "fa3"): 20.0, (OTHER, "fusedmla"): 10.0, (OTHER, "fa3"): 9.4,
        (OTHER, "fusedmla-portable"): 9.0,
    }  # fmt: skip
    text = tables.Table(run(times), "bf16").text()
    assert "1 of 1 targets met." in text
    assert f"best peer: 1 of 2 cases that one serves.\n- {OTHER}: 0.94" in text
    assert f"portable kernel: 1 of 1 cases.\n- {OTHER}" in text
    assert cells(text, OTHER)[2:] == ["10.0", "9.0", "**9.4**", "0.94"]


def test_absolute_targets():
    text = tables.Table(run({("b128 h16 kv8192", "fusedmla"): 100.0, (AIMED, "fusedmla"): 9.5}), "bf16").text()
    lines = [line for line in text.splitlines() if line.endswith(("| yes |", "|  no |"))]
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines] == [
        ["b128 h16 kv8192", "4.2 TB/s", "4.3 TB/s", "yes"], [AIMED, "9 us", "9.5 us", "no"],
    ]  # fmt: skip
    assert "targets met" not in text  # nothing to compare with


def steps(start: float, page: float, keys: float, exchange: float) -> dict[str, float]:
    return {"start": start, "length": start, "page": page, "keys": keys, "exchange": exchange}


def test_targets_below_the_chain_are_named(tmp_path, monkeypatch: pytest.MonkeyPatch, capsys):
    rows = [{"programs": 16, "step": step, "median_us": us} for step, us in steps(4, 5, 7, 11).items()]
    reads = [{"mib": mib, "median_us": 4 + mib / 8} for mib in (1, 4)]
    (tmp_path / "chain.json").write_text(json.dumps({"rows": rows, "reads": reads}))
    target = targets.RATIOS[AIMED, "bf16"]
    for asked, found in ((10.9, True), (11.1, False)):
        times = {
            (AIMED, "fusedmla"): 12.0,
            (AIMED, "fa3"): asked * target,
        }
        (tmp_path / "run.json").write_text(json.dumps(run(times)))
        arguments = ["tables.py", str(tmp_path / "run.json"), "--chain", str(tmp_path / "chain.json")]
        monkeypatch.setattr(sys, "argv", arguments)
        tables.main()
        text = capsys.readouterr().out
        assert ("keys: 1 of 1; without its exchange through global memory: 0." in text) == found
        if found:
            assert cells(text[text.index("keys: 1") :], AIMED) == [AIMED, "10.9", "11.0", "7.0", "12.0"]


def test_failed_rows_do_not_count():
    assert tables.Table(run({(AIMED, "fusedmla"): 10.0}, status="FAIL"), "bf16").cases == []


def test_command_line(tmp_path, monkeypatch: pytest.MonkeyPatch, capsys):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(run({(OTHER, "fusedmla"): 10.0, (OTHER, "fa3"): 20.0}, "fp8")))
    monkeypatch.setattr(sys, "argv", ["tables.py", str(path)])
    tables.main()
    text = capsys.readouterr().out
    assert "# run.json" in text and "## fp8 cache" in text and "    python benchmarks/bench_decode.py\n" in text
    assert "GPU, torch 1, cuda 2, triton 3, v 4. copy_gbs 4000, read_gbs 4500, matmul_tflops 700." in text
    assert cells(text, OTHER)[2:] == ["**10.0**", "20.0", "2.00"]
