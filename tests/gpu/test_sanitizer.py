# SPDX-License-Identifier: Apache-2.0
"""The kernels under NVIDIA's compute-sanitizer: no access out of bounds, no race in shared memory, no bad barrier."""

import os
import pathlib
import shutil
import subprocess
import sys

import forced
import pytest

from vllm_fusedmla.kernels import hopper

HERE = pathlib.Path(__file__).parent
KERNELS = {
    "portable": ["schedule_kernel", "decode_kernel", "_combine_kernel"],
    "hopper": ["swapab", "twowg", "topk"],
}


# racecheck and synccheck do not follow the copy engine's writes and mbarriers, by which the Hopper kernels are ordered.
@pytest.mark.parametrize(
    ("tool", "kernels"),
    [("memcheck", "portable"), ("racecheck", "portable"), ("synccheck", "portable"), ("memcheck", "hopper")],
)
def test_compute_sanitizer_finds_nothing(tool, kernels, child_env):
    if kernels == "hopper" and not (forced.is_hopper() and hopper.available()):
        pytest.skip("needs a GPU of compute capability 9.0 and the kernels compiled for it")
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    path = [str(HERE.parent), str(HERE.parent.parent), child_env.get("PYTHONPATH", "")]
    filters = [f"--kernel-name=kernel_substring={name}" for name in KERNELS[kernels]]
    # Triton 3.8 sets a function attribute that the driver refuses and does not mind: an API error, not an access.
    options = [f"--tool={tool}", "--error-exitcode=9", "--report-api-errors=no", *filters]
    command = [sanitizer, *options, sys.executable, str(HERE / "sanitized_run.py"), kernels]
    env = child_env | {"PYTHONPATH": os.pathsep.join(path)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=900)
    report = done.stdout + done.stderr
    assert done.returncode == 0, report[:6000]
    assert "all launches done" in report
    summary = "RACECHECK SUMMARY: 0 hazards" if tool == "racecheck" else "ERROR SUMMARY: 0 errors"
    assert summary in report, report[-2000:]
