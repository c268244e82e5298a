# SPDX-License-Identifier: Apache-2.0
"""Compile the Triton kernels ahead of time, without a GPU, and report what the compiler made of them.

Run as a program, in a process of its own: a kernel that Triton's compiler rejects may abort it. Reads a JSON list of
cases from standard input and prints a JSON list of reports.
"""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vllm_fusedmla.kernels import (
    cache_write,
    combine,
    dense_decode_kernel,
    schedule_kernel,
    sparse_convert,
    sparse_decode,
    sparse_decode_kernel,
)
from vllm_fusedmla.kernels.select import select_decode, select_sparse

TOOLS = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ELEMENT = {"bf16": "bf16", "fp16": "fp16", "fp8": "u16", "fp8_ds_mla": "u16"}


def signature_of(kernel, types: dict[str, str], constants: dict) -> dict[str, str]:
    return {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and bytes of stack (spills live there), as cuobjdump reads them from the binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    return {"registers": int(found[1]), "stack": int(found[2])} if found else {}


def sass(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True).stdout


def compile_kernel(kernel, types, constants, capability: int, **options) -> dict:
    if "DEPENDENT" in kernel.arg_names:
        dependent = capability >= 90
        constants = {**constants, "DEPENDENT": dependent}
        options |= {"launch_pdl": True} if dependent else {}
    signature = signature_of(kernel, types, constants)
    # What a launch finds out by itself: tensors are 16-byte aligned, strides multiples of 16.
    aligned = [i for i, (n, t) in enumerate(signature.items()) if t.startswith("*") or (t == "i32" and "stride" in n)]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    report = {"capability": capability, "shared": binary.metadata.shared, **resources(binary.asm["cubin"])}
    if dump := os.environ.get("FUSEDMLA_AOT_DUMP"):
        pathlib.Path(dump).write_text(sass(binary.asm["cubin"]))
    return report


def compile_decode(case: dict) -> dict:
    """Compile what `select` picks, or the tile sizes that the case overrides."""
    capability, h_q, s_q, cache = case["capability"], case["h_q"], case.get("s_q", 1), case["cache"]
    config = select_decode(divmod(capability, 10), s_q * h_q, cache)
    config = dataclasses.replace(config, **case.get("config", {}))
    kernel = dense_decode_kernel.decode_kernel
    pointer = {"q_nope": "bf16", "q_rope": "bf16", "out": "bf16", "cache": ELEMENT[cache]}
    types = {n: f"*{pointer[n]}" for n in pointer}
    types |= dict.fromkeys(("block_table", "seq_lens", "program_begin", "items"), "*i32")
    types |= dict.fromkeys(("lse", "partial_out", "partial_lse", "k_scale_pointer"), "*fp32")
    types |= {"k_scale_value": "fp32", "scale_log2": "fp32"}
    constants = {
        "S_Q": s_q, "H_Q": h_q, "PAGE_SIZE": case.get("page_size", 64), "CAUSAL": s_q > 1,
        "EIGHT_BIT": cache.startswith("fp8"), "DS_MLA": cache == "fp8_ds_mla", "K_SCALE_POINTER": cache == "fp8",
        "BLOCK_H": config.block_h, "BLOCK_N": config.block_n, "INTERPRETED": False,
    }  # fmt: skip
    return compile_kernel(
        kernel, types, constants, capability, num_warps=config.num_warps, num_stages=config.num_stages
    )


def compile_sparse(case: dict) -> dict:
    """Compile what `select` picks, or the case overrides, for lists of slots or, with a page size, of positions."""
    capability, h_q, cache, table = case["capability"], case["h_q"], case["cache"], "page_size" in case
    config = select_sparse(divmod(capability, 10), h_q, cache)
    config = dataclasses.replace(config, **case.get("config", {}))
    pointer = {"q_nope": "bf16", "q_rope": "bf16", "out": "bf16", "cache": ELEMENT[cache]}
    types = {n: f"*{pointer[n]}" for n in pointer}
    types |= dict.fromkeys(("indices", "topk_length", "block_table", "num_splits"), "*i32")
    types |= dict.fromkeys(("attn_sink", "lse", "max_logits", "partial_out", "partial_lse", "k_scale_pointer"), "*fp32")
    types |= {"k_scale_value": "fp32", "scale_log2": "fp32"}
    constants = {
        "H_Q": h_q, "PAGE_SIZE": case.get("page_size", 1), "STRIDE_UNIT": 8, "HAS_TABLE": table,
        **{name: case.get("all", False) for name in ("HAS_LENGTH", "HAS_SINK", "HAS_MAX")},
        "EIGHT_BIT": cache.startswith("fp8"), "DS_MLA": cache == "fp8_ds_mla", "K_SCALE_POINTER": cache == "fp8",
        "BLOCK_H": config.block_h, "BLOCK_N": config.block_n, "GROUPS": config.groups, "INTERPRETED": False,
    }  # fmt: skip
    stages = sparse_decode.pipeline_stages(config, table)
    kernel = sparse_decode_kernel.sparse_kernel
    return compile_kernel(kernel, types, constants, capability, num_warps=config.num_warps, num_stages=stages)


def compile_sink(case: dict) -> dict:
    types = {"out": "*bf16", "lse": "*fp32", "attn_sink": "*fp32"}
    kernel = sparse_decode_kernel.apply_sink_kernel
    return compile_kernel(kernel, types, {"H_Q": 16}, case["capability"], num_warps=1)


def compile_write(case: dict) -> dict:
    cache = case["cache"]
    element = {"bf16": "u16", "fp16": "fp16"}.get(cache, "u8")
    types = {"kv_c": "*bf16", "k_pe": "*bf16", "cache": f"*{element}", "slot_mapping": "*i64"}
    types |= {"k_scale_pointer": "*fp32", "k_scale_value": "fp32"}
    constants = {
        "PAGE_SIZE": 64, "WIDTH": 656 if cache == "fp8_ds_mla" else 576, "FORMAT": cache,
        "K_SCALE_POINTER": cache == "fp8", "INTERPRETED": False,
    }  # fmt: skip
    return compile_kernel(cache_write.write_kernel, types, constants, case["capability"], num_warps=1)


def compile_convert(case: dict) -> dict:
    types = {"cache": "*u16", "pages": "*i32", "out": "*u16"}
    constants = {"PAGE_SIZE": 64, "HAS_PAGES": True, "ROWS": 8, "INTERPRETED": False}
    return compile_kernel(sparse_convert.convert_kernel, types, constants, case["capability"], num_warps=4)


def compile_schedule(case: dict) -> dict:
    constants = {
        "NUM_PROGRAMS": 264, "BLOCK_N": 64, "FIXED": 1, "MIN_TILES": 2, "BATCH_INVARIANT": case["batch_invariant"],
        "MAX_SPLITS": 32, "BLOCK_B": 256, "BLOCK_J": 128,
    }  # fmt: skip
    types = dict.fromkeys(("seq_lens", "program_begin", "items", "num_splits"), "*i32")
    return compile_kernel(schedule_kernel.schedule_kernel, types, constants, case["capability"], num_warps=4)


def compile_combine(case: dict) -> dict:
    types = {"partial_out": "*fp32", "partial_lse": "*fp32", "num_splits": "*i32", "out": "*bf16", "lse": "*fp32"}
    constants = {"ROWS": 16, "BLOCK_S": 512, "BLOCK_D": case["block_d"], "STEP": 4096 // case["block_d"]}
    return compile_kernel(combine._combine_kernel, types, constants, case["capability"], num_warps=4)


def main() -> None:
    compilers = {
        "decode": compile_decode, "sparse": compile_sparse, "sink": compile_sink, "write": compile_write,
        "schedule": compile_schedule, "combine": compile_combine, "convert": compile_convert,
    }  # fmt: skip
    reports = []
    for case in json.load(sys.stdin):
        reports.append({"triton": triton.__version__, **compilers[case["kernel"]](case)})
    json.dump(reports, sys.stdout)


if __name__ == "__main__":
    main()
