# SPDX-License-Identifier: Apache-2.0
"""Shared test setup: the GPU marker, seeds, Triton's interpreter where there is no GPU, and helper fixtures.

Environment:
    FUSEDMLA_TEST_SEED   reproduces a run; without it every run draws a fresh seed, printed at the top and on failure.
    FUSEDMLA_TRITON_ALT  a folder with a second Triton, unpacked (`pip install --target`), for tests that compile with
                         two versions; `make test` installs one next to the virtual environment's own.
"""

from __future__ import annotations

import os
import random
import secrets
import sys
import zlib
from collections.abc import Generator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
RUN_SEED = int(os.environ.get("FUSEDMLA_TEST_SEED") or secrets.randbits(32))
os.environ["FUSEDMLA_TEST_SEED"] = str(RUN_SEED)  # also that of pytest-xdist's workers, which are started from here


def _count_gpus() -> int:
    # NVML, not the CUDA runtime: a process that has initialised CUDA can no longer fork vLLM's workers.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    try:
        import torch
    except ImportError:
        return 0
    return torch.cuda.device_count()


NUM_GPUS = _count_gpus()
if NUM_GPUS == 0:
    # Triton reads this when a kernel is decorated, so it must be set before any test file imports one. Child processes
    # that compile or serve for real use the `child_env` fixture, which takes it away again.
    os.environ["TRITON_INTERPRET"] = "1"

if "FUSEDMLA_TRITON_ALT" not in os.environ:
    # Where `make test` puts it, so that a bare `pytest` in the same environment runs the same tests.
    for _folder in sorted(Path(sys.prefix).glob("triton-*")):
        os.environ["FUSEDMLA_TRITON_ALT"] = str(_folder)

try:
    import hypothesis
except ImportError:
    pass
else:
    # No deadline: the first example of a test often pays for a compilation. The blob reproduces a failing example.
    hypothesis.settings.register_profile("fusedmla", deadline=None, print_blob=True)
    hypothesis.settings.load_profile("fusedmla")


def pytest_report_header(config: pytest.Config) -> list[str]:
    alt = os.environ.get("FUSEDMLA_TRITON_ALT", "none")
    kernels = "on the GPU" if NUM_GPUS else "in Triton's interpreter"
    return [f"FUSEDMLA_TEST_SEED={RUN_SEED}, GPUs: {NUM_GPUS}, kernels run {kernels}, second Triton: {alt}"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    gpu_folder = REPO / "tests" / "gpu"
    for item in items:
        if gpu_folder in item.path.parents:
            item.add_marker(pytest.mark.gpu)
        if NUM_GPUS == 0 and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        report.sections.append(("seed", f"FUSEDMLA_TEST_SEED={RUN_SEED} reproduces this run"))
    return report


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """The test's own seed: from the run's seed and the test's name, so that it does not depend on the tests before."""
    return (RUN_SEED ^ zlib.crc32(request.node.nodeid.encode())) & 0x7FFFFFFF


@pytest.fixture(autouse=True)
def _seeded(seed: int) -> None:
    random.seed(seed)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(seed)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(seed)


@pytest.fixture
def repo() -> Path:
    """The repository's root."""
    return REPO


@pytest.fixture
def device() -> str:
    """The device kernels run on in this process: "cuda", or "cpu" through Triton's interpreter."""
    return "cuda" if NUM_GPUS else "cpu"


@pytest.fixture
def child_env() -> dict[str, str]:
    """A copy of the environment for child processes, without the interpreter switch set for this process."""
    env = dict(os.environ)
    env.pop("TRITON_INTERPRET", None)
    return env


@pytest.fixture
def triton_alt() -> Path:
    """The folder of the second Triton, to be put on a child's PYTHONPATH; skips the test where there is none."""
    folder = os.environ.get("FUSEDMLA_TRITON_ALT")
    if not folder or not Path(folder, "triton").is_dir():
        pytest.skip("no second Triton (FUSEDMLA_TRITON_ALT); `make test` installs one")
    return Path(folder)
