# SPDX-License-Identifier: Apache-2.0
"""Compile the indexer's and the top-k kernels ahead of time, without a GPU; run as `aot.py` is."""

import dataclasses
import json
import sys

import aot
import triton

from vllm_fusedmla.kernels import indexer_kernel, indexer_write_kernel, topk, topk_kernel
from vllm_fusedmla.kernels.common import next_power_of_2
from vllm_fusedmla.kernels.indexer import select_indexer


def compile_logits(case: dict) -> dict:
    """Scores with the launch shape that `select_indexer` picks, or what the case overrides."""
    capability, heads, s_q = case["capability"], case["heads"], case.get("s_q", 1)
    config = select_indexer(divmod(capability, 10), case["kernel"], s_q)
    config = dataclasses.replace(config, **case.get("config", {}))
    element = "*fp8e4nv" if config.fp8 else "*u16"
    types = dict.fromkeys(("q", "cache", "k"), element)
    types |= dict.fromkeys(("weights", "logits", "k_scales"), "*fp32")
    types |= dict.fromkeys(("seq_lens", "block_table", "starts", "ends"), "*i32")
    constants = {
        "HEADS": heads, "CLEAN": case.get("clean", False), "FP8": config.fp8, "BLOCK_R": config.block_r,
        "BLOCK_HEADS": max(next_power_of_2(heads), 16), "BLOCK_N": config.block_n, "STAGES": config.num_stages,
        "INTERPRETED": False,
    }  # fmt: skip
    if case["kernel"] == "paged":
        kernel = indexer_kernel.paged_logits_kernel
        constants |= {
            "S_Q": s_q, "PAGE_SIZE": case.get("page_size", 64), "LENGTH_PER_ROW": s_q > 1, "BLOCK_B": 256,
        }  # fmt: skip
    else:
        kernel = indexer_kernel.ragged_logits_kernel
        constants["COMPRESSED"] = case.get("compressed", False)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return aot.compile_kernel(kernel, types, constants, capability, **options)


def compile_topk(case: dict) -> dict:
    types = dict.fromkeys(("starts", "ends", "out", "workspace"), "*i32") | {"logits": "*fp32"}
    parts, ranges = case["parts"], case.get("ranges", False)
    multi = parts > 1
    tile, num_warps = topk.tile_shape(case["rows"], case["n"], parts, 132)
    constants = {
        "HAS_STARTS": ranges, "VECTOR": case.get("vector", True), "MULTI": multi, "TILE": tile,
        "FIRST": 0, "LAST": topk_kernel.PHASES, "INTERPRETED": False,
    }  # fmt: skip
    options = {"num_warps": num_warps} | ({"launch_cooperative_grid": True} if multi else {})
    return aot.compile_kernel(topk_kernel.topk_kernel, types, constants, case["capability"], **options)


def compile_write(case: dict) -> dict:
    types = {"k": "*bf16", "cache": "*u8", "slot_mapping": "*i64"}
    constants = {"PAGE_SIZE": 64, "BLOCK_T": 4}
    kernel = indexer_write_kernel.write_index_kernel
    return aot.compile_kernel(kernel, types, constants, case["capability"], num_warps=4)


def main() -> None:
    compilers = {"paged": compile_logits, "ragged": compile_logits, "topk": compile_topk, "write": compile_write}
    reports = []
    for case in json.load(sys.stdin):
        reports.append({"triton": triton.__version__, **compilers[case["kernel"]](case)})
    json.dump(reports, sys.stdout)


if __name__ == "__main__":
    main()
