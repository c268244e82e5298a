# SPDX-License-Identifier: Apache-2.0
"""The kernels under NVIDIA's compute-sanitizer: no access out of bounds, no race in shared memory, no bad barrier."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent
KERNELS = ["schedule_kernel", "decode_kernel", "_combine_kernel"]


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer_finds_nothing(tool, child_env):
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    path = [str(HERE.parent), str(HERE.parent.parent), child_env.get("PYTHONPATH", "")]
    filters = [f"--kernel-name=kernel_substring={name}" for name in KERNELS]
    # Triton 3.8 sets a function attribute that the driver refuses and does not mind: an API error, not an access.
    options = [f"--tool={tool}", "--error-exitcode=9", "--report-api-errors=no", *filters]
    command = [sanitizer, *options, sys.executable, str(HERE / "sanitized_run.py")]
    env = child_env | {"PYTHONPATH": os.pathsep.join(path)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=900)
    report = done.stdout + done.stderr
    assert done.returncode == 0, report[:6000]
    assert "all launches done" in report
    summary = "RACECHECK SUMMARY: 0 hazards" if tool == "racecheck" else "ERROR SUMMARY: 0 errors"
    assert summary in report, report[-2000:]
