# SPDX-License-Identifier: Apache-2.0
"""`fusedmla eval` on real vLLM, on a CPU: the demo model with FUSEDMLA against CPU_MLA, and a fault that it must catch.

Eight engines, two at a time, a few minutes in all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

for module in ("vllm", "lm_eval", "scipy", "matplotlib"):
    pytest.importorskip(module)
from vllm.platforms import current_platform  # noqa: E402

REPO = Path(__file__).resolve().parents[1]
MODEL = REPO / "evals" / "models" / "demo"
PROMPTS, HOPS, TEXTS, LENGTH = 40, 20, 4, 240

if not current_platform.is_cpu():
    pytest.skip("needs vLLM's CPU build", allow_module_level=True)
if not (MODEL / "model.safetensors").is_file():
    pytest.skip("the demo model is not part of this checkout", allow_module_level=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """The command, once it has run, and its folder. The seed is the run's: other prompts each time."""
    from conftest import RUN_SEED

    out = tmp_path_factory.mktemp("eval")
    documents = {"n": PROMPTS, "seed": RUN_SEED, "lengths": [LENGTH], "links": 48, "hops": HOPS}
    command = [sys.executable, "-m", "vllm_fusedmla", "eval", "--model", str(MODEL), "--out", str(out)]
    command += ["--backends", "FUSEDMLA,CPU_MLA", "--tasks", "fusedmla_chain_recall", "--fault", "softmax_scale"]
    command += ["--task-args", json.dumps({"fusedmla_chain_recall": documents})]
    command += ["--model-args", '{"max_model_len": 512, "max_num_seqs": 20, "enforce_eager": true}']
    command += ["--teacher-texts", str(TEXTS), "--teacher-length", str(LENGTH), "--teacher-top", "-1"]
    command += ["--parallel", "2"]  # an engine's start keeps one core busy
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    return subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=900), out


def log_of(out: Path) -> str:
    return "\n".join(path.read_text(errors="replace")[-2000:] for path in sorted(out.glob("runs/*/log.txt")))


@pytest.fixture(scope="module")
def report(finished: tuple[subprocess.CompletedProcess[str], Path]) -> dict[str, Any]:
    process, out = finished
    assert process.returncode == 0, process.stdout + process.stderr + log_of(out)
    return json.loads((out / "report.json").read_text())


def test_same_answers_and_distributions(report: dict[str, Any]) -> None:
    assert report["passed"] and report["findings"] == []
    rows = {(row["kind"], row["metric"]): row for row in report["comparisons"]}
    assert rows["rerun", "exact_match"]["identical_answers"] == 1.0
    backend = rows["backend", "exact_match"]
    assert (backend["n"], backend["unpaired"]) == (PROMPTS, 0) and backend["base"] > 0.8
    assert abs(backend["difference"]) <= 0.05 and backend["verdict"] in ("same", "not enough data")
    forced = {row["kind"]: row for row in report["forced"]}
    assert forced["rerun"]["kl"] == 0.0 and forced["rerun"]["top1_agreement"] == 1.0
    assert 0 < forced["backend"]["kl"] < 2e-4 and forced["backend"]["top1_agreement"] > 0.98
    assert forced["backend"]["whole_vocabulary"] and forced["backend"]["verdict"] == "same"


def test_all_decoded_tokens_are_counted(report: dict[str, Any]) -> None:
    """An answer's first token comes from its prompt's prefill; of a text all but the last token go in."""
    by_name = {run["configuration"]: run for run in report["runs"]}
    expected = {"dense reference": PROMPTS * (HOPS - 1) + TEXTS * (LENGTH - 1)}
    for name in ("FUSEDMLA-auto", "FUSEDMLA-auto-rerun", "FUSEDMLA-auto+softmax_scale"):
        assert by_name[name]["decoded"] == expected and by_name[name]["prefill_only"] == []
    assert by_name["CPU_MLA-auto"]["decoded"] == {}


def test_the_fault_is_caught(report: dict[str, Any]) -> None:
    (fault,) = report["faults"]
    assert fault["fault"] == "softmax_scale" and fault["caught"] and fault["measures"]["teacher-forced: KL"]
    assert fault["measures"]["teacher-forced: top-1 agreement"] and not fault["measures"]["the run itself"]


def test_the_report_is_written(finished: tuple[subprocess.CompletedProcess[str], Path], report: dict[str, Any]) -> None:
    _, out = finished
    text = (out / "report.md").read_text()
    assert "**No difference found**" in text and "| FUSEDMLA-auto+softmax_scale | yes |" in text
    assert str(REPO) not in text and str(REPO) not in (out / "report.json").read_text()
    assert (out / "divergence.png").stat().st_size > 5000
