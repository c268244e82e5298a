# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels for tests: compiled once a run, and only those whose cubin is not of the present sources.

Without an nvcc, tests of cubins are skipped with the reason; FUSEDMLA_REQUIRE_CUBINS=1, which `make test` sets, makes
that a failure.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import subprocess
from pathlib import Path

import pytest

from vllm_fusedmla.kernels.hopper import build
from vllm_fusedmla.kernels.hopper.variants import VARIANTS


def required() -> bool:
    return os.environ.get("FUSEDMLA_REQUIRE_CUBINS") == "1"


def nvcc() -> Path:
    """The compiler; fails or skips the test where there is none."""
    try:
        return build.find_nvcc()
    except build.NvccMissingError as error:
        if required():
            raise
        pytest.skip(str(error))


@functools.cache
def build_all() -> build.BuildError | None:
    """Compile what is not current; returns why something could not be compiled."""
    try:
        build.build()
    except build.BuildError as error:
        return error
    return None


def report(name: str) -> build.Report:
    """What the compiler said of a variant; fails or skips the test where there is no cubin of the present sources."""
    error = build_all()
    if found := build.current(VARIANTS[name]):
        return found
    if isinstance(error, build.NvccMissingError) and not required():
        pytest.skip(str(error))
    pytest.fail(str(error), pytrace=False)


@functools.cache
def _tool(name: str) -> Path:
    """The newest of the tools in the Triton packages: an older one than the compiler misreads parts of a cubin."""
    spec = importlib.util.find_spec("triton")
    packages = [Path(spec.origin).parent] if spec and spec.origin else []
    if alt := os.environ.get("FUSEDMLA_TRITON_ALT"):
        packages.append(Path(alt, "triton"))
    tools = [tool for tool in (folder / "backends" / "nvidia" / "bin" / name for folder in packages) if tool.exists()]
    if not tools:
        pytest.skip(f"no {name}: it is taken from Triton's package")

    def version(tool: Path) -> tuple[int, ...]:
        text = subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout
        found = re.search(r"V(\d+)\.(\d+)\.(\d+)", text)
        return tuple(map(int, found.groups())) if found else ()

    return max(tools, key=version)


def sass(name: str) -> str:
    """The machine code of a variant's cubin as text."""
    report(name)
    command: list[str | Path] = [_tool("nvdisasm"), "-c", build.cubin_path(name)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resources(name: str) -> dict[str, dict[str, int]]:
    """REG, STACK, SHARED ... of each kernel in a variant's cubin, read from the binary."""
    report(name)
    command: list[str | Path] = [_tool("cuobjdump"), "-res-usage", build.cubin_path(name)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kernels = re.findall(r"Function (\S+):\s*\n(.*)", text)
    return {kernel: {key: int(n) for key, n in re.findall(r"(\w+):(\d+)", line)} for kernel, line in kernels}


def threads(name: str) -> int:
    """Most threads of a CTA, read from the binary."""
    report(name)
    command: list[str | Path] = [_tool("cuobjdump"), "-elf", build.cubin_path(name)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"EIATTR_MAX_THREADS\s+Format:\s+EIFMT_SVAL\s+Value:\s+(0x[0-9a-f]+)", text)
    assert len(found) == 1, found
    return int(found[0], 16)
