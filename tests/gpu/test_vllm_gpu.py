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


def test_a_sparse_model_of_64_heads(repo, child_env, tmp_path):
    """Prompts beyond index_topk on an fp8_ds_mla cache, one a step: their keys are converted to bfloat16."""
    wide = tmp_path / "wide"
    model = repo / "evals" / "models" / "demo-dsa"
    widen = [sys.executable, "-m", "evals.models.widen", "--model", model, "--out", wide, "--copies", "16"]
    subprocess.run(widen, check=True, env=child_env, cwd=repo)
    command = [
        sys.executable, repo / "evals" / "compare_backends.py", "--model", wide, "--out", tmp_path,
        "--backends", "FUSEDMLA,FLASHMLA_SPARSE", "--baseline", "FLASHMLA_SPARSE-fp8_ds_mla-eager", "--modes", "eager",
        "--kv-cache-dtypes", "fp8_ds_mla", "--prompts", "12", "--max-prompt", "8192", "--max-num-seqs", "1",
        "--parallel", "2",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=child_env, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    summary = json.loads((tmp_path / "comparison.json").read_text())
    (ours,) = [job for job in summary["jobs"] if job["backend"] == "FUSEDMLA"]
    assert ours["fusedmla"]["scheduled"] > 0 and ours["right"] == ours["prompts"], ours
    (pair,) = summary["pairs"]
    assert pair["identical"] == pair["prompts"] and pair["max_logprob_difference"] < 0.01, pair
    logs = [path.read_text() for path in tmp_path.rglob("*.log")]
    assert any("converted to bfloat16" in log for log in logs), [len(log) for log in logs]
