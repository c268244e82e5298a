# SPDX-License-Identifier: Apache-2.0
"""vLLM's CUDA build serving the demo model with FUSEDMLA and with TRITON_MLA: eager and full CUDA graphs, bf16 and fp8
caches, one and two query tokens a request, and batch-invariant bits."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("vllm")


def test_served_answers_are_right_and_equal(repo, child_env, tmp_path):
    command = [
        sys.executable, repo / "evals" / "compare_backends.py", "--model", repo / "evals" / "models" / "demo",
        "--backends", "FUSEDMLA,TRITON_MLA", "--baseline", "TRITON_MLA-auto-eager", "--kv-cache-dtypes", "auto,fp8",
        "--modes", "eager,graph", "--spec-tokens", "1", "--batch-invariance", "--prompts", "24", "--parallel", "6",
        "--retries", "1", "--out", tmp_path,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=child_env, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    summary = json.loads((tmp_path / "comparison.json").read_text())
    ours = [job for job in summary["jobs"] if job["backend"] == "FUSEDMLA"]
    assert len(ours) == 8 + 5  # answers; bits alone and in a batch, and their control
    for job in ours:
        assert job["fusedmla"]["scheduled"] > 0, job
        assert job.get("right") == job.get("prompts"), job
    assert {length for job in ours for length in job["decode"]["steps_by_query_len"]} == {"1", "2"}
    for pair in summary["pairs"]:
        assert pair["identical"] == pair["prompts"], pair
        assert pair["max_logprob_difference"] < 0.01, pair
    for entry in summary["invariance"]:
        if entry["kind"] == "invariance":
            assert all(row["same_bits"] for row in entry["comparisons"]), entry
