# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels compile for sm_90a to what they are meant to be, and the build says so when they do not.

What nvcc makes of the real sources is tested with the real nvcc; how the build reacts to what nvcc does, with a shell
script in its place.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cubins
import pytest

from vllm_fusedmla.kernels.hopper import build
from vllm_fusedmla.kernels.hopper.variants import TOPK_NAME, VARIANTS, Variant

TOY = Variant(name="toy", source="toy.cu", defines={"N": "1"})
SECTION = """ptxas info    : Compiling entry function '{}' for 'sm_90a'
ptxas info    : Function properties for {}
    {} bytes stack frame, {} bytes spill stores, 0 bytes spill loads
ptxas info    : Used {} registers, used 5 barriers
"""
OTHER = "ptxas info    : 0 bytes gmem\n" + SECTION.format("other", "other", 64, 8, 255)
LOG = OTHER + SECTION.format("toy", "toy", 0, 0, 168)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "toy.cu").write_text('#include "a.cuh"\nint toy;\n')
    (folder / "a.cuh").write_text('  #  include "b.cuh"\n#include <cstdint>\n')
    (folder / "b.cuh").write_text("// b\n")
    (folder / "unrelated.cuh").write_text("// not included by toy.cu\n")
    return folder


class FakeNvcc:
    """A script that answers --version, prints a log, writes its output file and keeps its command lines."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.path, self.log, self.calls = folder / "nvcc", folder / "log", folder / "calls"
        self.answer()

    def answer(self, log: str = LOG, version: str = "13.0.88", status: int = 0) -> None:
        self.log.write_text(log)
        self.path.write_text(
            f'#!/bin/sh\nif [ "$1" = --version ]; then echo "release, V{version}"; exit; fi\n'
            f'echo "$@" >> {self.calls}\ncat {self.log} >&2\n'
            f'while [ "$1" != -o ]; do shift; done\necho binary > "$2"\nexit {status}\n'
        )
        self.path.chmod(0o755)

    @property
    def compilations(self) -> list[str]:
        return self.calls.read_text().splitlines() if self.calls.exists() else []


@pytest.fixture
def nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeNvcc:
    """The only nvcc in this test's world."""
    fake = FakeNvcc(tmp_path / "cuda" / "bin")
    for name in ("FUSEDMLA_NVCC", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(build.shutil, "which", lambda name: str(fake.path) if fake.path.exists() else None)
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    return fake


def build_toy(folder: Path, toy: Variant = TOY, **options) -> build.Report:
    return build.build(variants={"toy": toy}, folder=folder, **options)["toy"]


# The real kernels


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_compiles_without_spills_and_with_the_registers_it_may_use(name: str) -> None:
    variant, report = VARIANTS[name], cubins.report(name)
    assert variant.name == name
    assert (report.stack, report.spill) == (0, 0)
    assert report.registers <= variant.max_registers, report
    kernels = cubins.resources(name)
    assert set(kernels) == {variant.entry}
    assert kernels[variant.entry]["REG"] == report.registers
    assert kernels[variant.entry]["STACK"] == 0
    assert cubins.threads(name) == variant.threads


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != TOPK_NAME])
def test_variant_uses_the_tensor_cores_and_asynchronous_copies(name: str) -> None:
    code = cubins.sass(name)
    assert f".text.{VARIANTS[name].entry}" in code
    # e4m3 operands have an instruction of their own
    assert ("QGMMA" if "e4m3" in name else "HGMMA") in code
    # boxes of a tensor; runs of rows; 16 bytes past the registers
    copies = "UTMALDG"
    if name.startswith("swapab_gather") or name.startswith("twowg") and name.endswith("fp8_ds_mla"):
        copies = "UBLKCP"
    elif "gather" in name:
        copies = "LDGSTS"
    assert copies in code


def test_topk_copies_in_bulk_and_counts_by_hardware() -> None:
    code = cubins.sass(TOPK_NAME)
    assert "UBLKCP" in code and "ATOMS.POPC.INC" in code
    # Code that runs once costs the time of fetching it: loops must stay rolled.
    assert len(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/", code, re.MULTILINE)) < 2000


def test_build_runs_as_a_plain_script_without_the_package(repo: Path, tmp_path: Path) -> None:
    name = next(iter(VARIANTS))
    cubins.report(name)
    # -S: no installed package can be imported, torch and triton included.
    command: list[str | Path] = [sys.executable, "-S", repo / "kernels" / "hopper" / "build.py", "--check", name]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "all cubins are current\n"), done.stderr


# The build


def test_a_cubin_is_compiled_once_and_again_when_what_it_depends_on_changes(folder: Path, nvcc: FakeNvcc) -> None:
    first = build_toy(folder)
    assert (first.registers, first.stack, first.spill, first.nvcc) == (168, 0, 0, "13.0.88")
    assert build.cubin_path("toy", folder).read_text() == "binary\n"
    assert "arch=compute_90a,code=sm_90a" in nvcc.compilations[0] and "-DN=1" in nvcc.compilations[0].split()
    (folder / "unrelated.cuh").write_text("// changed\n")
    assert build_toy(folder) == first == build.current(TOY, folder)
    assert len(nvcc.compilations) == 1

    for expected, change in enumerate(
        (
            lambda: (folder / "toy.cu").write_text('#include "a.cuh"\nint toy, other;\n'),
            lambda: (folder / "b.cuh").write_text("// included by a header\n"),
            lambda: build.cubin_path("toy", folder).unlink(),
            lambda: build.cubin_path("toy", folder).with_suffix(".json").write_text("{}"),
            lambda: nvcc.answer(version="13.1.80"),
        ),
        start=2,
    ):
        change()
        build_toy(folder)
        build_toy(folder)
        assert len(nvcc.compilations) == expected
    assert not build.current(replace(TOY, defines={"N": "2"}), folder)
    build_toy(folder, force=True)
    assert len(nvcc.compilations) == 7


@pytest.mark.parametrize(
    ("log", "status", "message"),
    [
        (LOG + "toy.cu(3): error: no such thing", 1, r"toy: nvcc failed: toy.cu\(3\): error"),
        (OTHER + SECTION.format("toy", "toy", 16, 24, 168), 0, "toy: registers are spilled .*24 bytes spilled"),
        (OTHER, 0, "toy: ptxas compiled no kernel toy"),
        (LOG + "ptxas info    : (C7510) wgmma.mma_async instructions are serialized due to x", 0, "C7510.*due to x"),
        (LOG + "ptxas info    : (C7508) setmaxnreg ignored; registers unknown", 0, "toy: .*setmaxnreg ignored"),
    ],
    ids=["error", "spill", "no-entry", "serialised", "setmaxnreg"],
)
def test_a_kernel_that_is_not_as_meant_is_refused(
    folder: Path, nvcc: FakeNvcc, log: str, status: int, message: str
) -> None:
    build_toy(folder)
    (folder / "toy.cu").write_text("// another\n")
    nvcc.answer(log, status=status)
    with pytest.raises(build.BuildError, match=message):
        build_toy(folder)
    assert list((folder / "cubin").iterdir()) == [], "neither the old cubin nor the refused one"


def test_one_failure_leaves_the_others_compiled(folder: Path, nvcc: FakeNvcc) -> None:
    nvcc.answer(SECTION.format("a", "a", 0, 0, 128) + SECTION.format("b", "b", 0, 0, 168))
    table = {name: replace(TOY, name=name) for name in ("a", "bad", "b")}
    with pytest.raises(build.BuildError, match="^bad: ptxas compiled no kernel bad"):
        build.build(variants=table, folder=folder, jobs=2)
    reports = {name: build.current(variant, folder) for name, variant in table.items()}
    assert {name: report.registers for name, report in reports.items() if report} == {"a": 128, "b": 168}
    with pytest.raises(build.BuildError, match="no variants c; there are a, bad, b"):
        build.build(["c"], variants=table, folder=folder)


def test_remarks_are_kept(folder: Path, nvcc: FakeNvcc) -> None:
    nvcc.answer(LOG + "toy.cu(2): warning #177-D: variable was declared but never referenced")
    (remark,) = build_toy(folder).remarks
    assert "#177-D" in remark
    assert json.loads(build.cubin_path("toy", folder).with_suffix(".json").read_text())["remarks"] == [remark]


def test_without_nvcc_current_cubins_serve_and_stale_ones_are_discarded(folder: Path, nvcc: FakeNvcc) -> None:
    report = build_toy(folder)
    nvcc.path.unlink()
    assert build_toy(folder) == report
    (folder / "toy.cu").write_text("// another\n")
    with pytest.raises(build.NvccMissingError, match="^no nvcc 13.0 or newer in "):
        build_toy(folder)
    assert build.cubin_path("toy", folder).exists()
    build.discard_stale({"toy": TOY}, folder)
    assert list((folder / "cubin").iterdir()) == []


def test_where_nvcc_is_looked_for(tmp_path: Path, nvcc: FakeNvcc, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site" / "nvidia"
    wheel = FakeNvcc(site / "cu13" / "bin")
    spec = type("Spec", (), {"submodule_search_locations": [str(site)]})
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: spec if name == "nvidia" else None)
    assert build.find_nvcc() == nvcc.path
    nvcc.answer(version="12.9.86")
    assert build.find_nvcc() == wheel.path
    home = FakeNvcc(tmp_path / "home" / "bin")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert build.find_nvcc() == home.path
    monkeypatch.setenv("FUSEDMLA_NVCC", str(nvcc.path))
    assert build.find_nvcc() == nvcc.path, "named, so its version does not matter"
    monkeypatch.setenv("FUSEDMLA_NVCC", str(tmp_path / "nothing"))
    with pytest.raises(build.NvccMissingError, match="nothing is not an nvcc that runs"):
        build.find_nvcc()
    monkeypatch.delenv("FUSEDMLA_NVCC")
    for old in (home, wheel):
        old.answer(version="12.8.1")
    with pytest.raises(build.NvccMissingError, match=r"nvidia-cuda-nvcc; .*home/bin/nvcc is 12\.8\.1; .*is 12\.9\.86"):
        build.find_nvcc()
