# SPDX-License-Identifier: Apache-2.0
"""Counts of decoded tokens: in a file at any time, whatever ends the process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_fusedmla import counts, envs

COUNTING = """
import os, sys
from vllm_fusedmla.counts import DecodeCounter

dense, sparse = DecodeCounter("dense"), DecodeCounter("sparse")
dense.record("twowg", 1000)
child = os.fork()
if child == 0:
    sparse.record("triton", 7)
    os._exit(1)
os.waitpid(child, 0)
for _ in range(100):
    dense.record("twowg", 1)
dense.record("swapab", 5)
dense.record("reference", 0)
print("counted", flush=True)
sys.stdin.read()
"""


def test_counts_survive_a_kill(tmp_path: Path, child_env: dict[str, str]) -> None:
    folder = tmp_path / "counts"
    process = subprocess.Popen(
        [sys.executable, "-c", COUNTING],
        env=child_env | {"FUSEDMLA_COUNT_DIR": str(folder)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdin is not None
    assert process.stdout.readline() == "counted\n"
    expected = {"dense twowg": 1100, "dense swapab": 5, "sparse triton": 7}
    assert counts.read_counts(folder) == expected
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdin.close()
    process.stdout.close()
    assert counts.read_counts(folder) == expected
    files = sorted(folder.iterdir())
    assert len(files) == 2 and json.loads(files[0].read_text()) != json.loads(files[1].read_text())


def test_nothing_is_written_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FUSEDMLA_COUNT_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    counter = counts.DecodeCounter("dense")
    counter.record("swapab", 3)
    assert counter.by_kernel == {"swapab": 3} and envs.count_dir() is None and not list(tmp_path.iterdir())
    assert counts.read_counts(tmp_path / "missing") == {}


def test_the_folder_is_no_variable_of_vllms() -> None:
    """Those are part of the key of its compilation cache."""
    assert "FUSEDMLA_COUNT_DIR" not in envs.VARIABLES
    assert os.environ.get("FUSEDMLA_COUNT_DIR") is None
