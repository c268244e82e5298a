# SPDX-License-Identifier: Apache-2.0
"""`fusedmla doctor`: it always prints, finds what is wrong, and gives one line of advice for each problem."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vllm_fusedmla import __version__, doctor

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


def run_doctor(*options: str, cwd: Path, env: dict[str, str], python: tuple[str, ...] = ()) -> tuple[int, str]:
    command = [sys.executable, *python, "-m", "vllm_fusedmla", "doctor", *options]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.stdout, done.stderr
    return done.returncode, done.stdout


def problems(report: doctor.Report) -> str:
    for what, advice in report.problems:
        assert what and advice and "\n" not in what + advice
    return "; ".join(what for what, _ in report.problems)


@needs_vllm
def test_healthy_installation(repo: Path, child_env: dict[str, str]) -> None:
    code, output = run_doctor("--json", cwd=repo, env=child_env)
    report: dict[str, Any] = json.loads(output)
    assert report["problems"] == [] and report["healthy"] is True and code == 0
    facts = report["facts"]
    assert facts["versions"]["vllm-fusedmla"] == __version__
    assert facts["vLLM plugin"]["backend"].startswith("FUSEDMLA = vllm_fusedmla.backend.FusedMLABackend on ")
    assert facts["vLLM plugin"]["vllm.general_plugins"] == "vllm_fusedmla.plugin:register"
    assert len(facts["dense decode"]) == len(doctor.SHAPES)


@needs_vllm
def test_filtered_plugin(repo: Path, child_env: dict[str, str]) -> None:
    code, output = run_doctor(cwd=repo, env={**child_env, "VLLM_PLUGINS": "another"})
    assert code == 1
    assert "VLLM_PLUGINS='another' leaves fusedmla out\n    -> add fusedmla to VLLM_PLUGINS, or unset it" in output
    assert "vLLM loaded its plugins and does not know FUSEDMLA" in output


@pytest.fixture
def bare_env(repo: Path, child_env: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """Where Python finds this package, but not its metadata; with -S nothing else either."""
    (tmp_path / "vllm_fusedmla").symlink_to(repo / "vllm_fusedmla")
    return {**child_env, "PYTHONPATH": str(tmp_path)}


def test_bare_python(bare_env: dict[str, str], tmp_path: Path) -> None:
    """Without torch, vLLM or any other package the report still prints."""
    code, output = run_doctor("--json", cwd=tmp_path, env=bare_env, python=("-S",))
    report = json.loads(output)
    assert code == 1 and report["healthy"] is False
    found = "; ".join(entry["problem"] for entry in report["problems"])
    assert "torch is not installed" in found
    assert "no vLLM is installed" in found
    assert "no entry point fusedmla in vllm.general_plugins" in found
    assert "failed" not in found, "what is known to be absent needs no second message"
    assert all(entry["advice"] for entry in report["problems"])
    code, output = run_doctor(cwd=tmp_path, env=bare_env, python=("-S",))
    assert code == 1 and output.startswith("FUSEDMLA doctor\nversions\n") and "-> " in output


def test_unsupported_vllm(bare_env: dict[str, str], tmp_path: Path) -> None:
    info = tmp_path / "vllm-0.40.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.40.1\n")
    code, output = run_doctor(cwd=tmp_path, env=bare_env, python=("-S",))
    assert code == 1
    assert "FUSEDMLA supports vLLM >=0.32,<0.34, but this is vLLM 0.40.1" in output


def test_failing_probe_stops_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def probe_broken(report: doctor.Report) -> None:
        report.add("broken", "begun", True)
        raise OSError("no such device")

    monkeypatch.setattr(doctor, "PROBES", (probe_broken, doctor.probe_entry_points))
    report = doctor.examine()
    assert "probe broken failed: OSError: no such device" in problems(report)
    assert report.facts["broken"] == {"begun": True}
    assert "VLLM_PLUGINS" in report.facts["vLLM plugin"]


def test_environment_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in doctor.os.environ if name.startswith(doctor.ENV_PREFIX)]:
        monkeypatch.delenv(name)
    report = doctor.Report()
    doctor.probe_environment(report)
    assert report.problems == [] and report.facts["environment"] == {"VLLM_FUSEDMLA_*": "none set"}
    monkeypatch.setenv("VLLM_FUSEDMLA_KERNEL", "fastest")
    monkeypatch.setenv("VLLM_FUSEDMLA_KERNLE", "auto")
    report = doctor.Report()
    doctor.probe_environment(report)
    assert report.facts["environment"] == {"VLLM_FUSEDMLA_KERNEL": "fastest", "VLLM_FUSEDMLA_KERNLE": "auto"}
    assert "VLLM_FUSEDMLA_KERNLE is not a variable of this package" in problems(report)
    assert "VLLM_FUSEDMLA_KERNEL must be one of auto, portable, reference, got 'fastest'" in problems(report)


def test_driver_without_cuda_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'NVIDIA Something, 580.1, 9.0'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    report = doctor.Report()
    doctor.probe_gpu(report)
    assert report.facts["GPU"]["nvidia-smi"] == "NVIDIA Something, 580.1, 9.0"
    assert "the driver lists a GPU" in problems(report)


def probe_kernels_of(
    capability: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
    unavailable: str | None = None,
    loads: bool = True,
    **variables: Any,
) -> doctor.Report:
    torch = pytest.importorskip("torch")
    from vllm_fusedmla.kernels import hopper

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(hopper, "unavailable", lambda: unavailable)
    monkeypatch.setattr(hopper, "loads", lambda *call: loads)
    for name in ("KERNEL", "FP8_MMA"):
        monkeypatch.delenv(f"VLLM_FUSEDMLA_{name}", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(f"VLLM_FUSEDMLA_{name}", value)
    report = doctor.Report()
    doctor.probe_kernels(report)
    return report


@pytest.mark.parametrize(("capability", "healthy"), [((9, 0), True), ((12, 0), True), ((7, 5), False)])
def test_kernels_of_other_gpus(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], healthy: bool) -> None:
    report = probe_kernels_of(capability, monkeypatch, unavailable="kernels for Hopper were not compiled: a, b")
    served = [kernel for kernel in report.facts["dense decode"].values() if kernel != "none"]
    assert len(served) == (len(doctor.SHAPES) if healthy else 0)
    assert ("compute capability 7.5" in problems(report)) is not healthy
    if healthy:
        assert all(kernel.startswith("triton, ") for kernel in served)
    missing = "kernels for Hopper were not compiled: a, b; the portable kernel is used"
    assert (missing in problems(report)) is (capability == (9, 0)), "nothing is missing on another GPU"


def test_kernels_of_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    def named(**variables: Any) -> list[str]:
        report = probe_kernels_of((9, 0), monkeypatch, **variables)
        assert report.problems == [] and report.facts["Hopper kernels"] == {"compiled for sm_90a": "present"}
        return [kernel.split(",")[0] for kernel in report.facts["dense decode"].values()]

    assert named() == ["swapab", "twowg", "twowg", "swapab", "twowg"]
    assert named(FP8_MMA="1") == ["swapab", "twowg", "twowg", "swapab", "twowg_e4m3"]
    assert named(KERNEL="portable") == ["triton"] * 5
    refused = probe_kernels_of((9, 0), monkeypatch, loads=False)
    assert all(kernel.startswith("triton, ") for kernel in refused.facts["dense decode"].values())
