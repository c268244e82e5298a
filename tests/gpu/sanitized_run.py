# SPDX-License-Identifier: Apache-2.0
"""A few launches of every kernel, small, to be run under compute-sanitizer (test_sanitizer.py).

Of the portable kernels, or with the argument `hopper` of those compiled for compute capability 9.0.
"""

import itertools
import random
import sys

import forced
import torch
from indexer_problems import check_topk
from problems import assert_matches, make_problem
from sparse_problems import make_sparse_problem

from vllm_fusedmla.kernels import dense_decode, sparse_decode
from vllm_fusedmla.kernels.common import device_facts
from vllm_fusedmla.kernels.select import DecodeConfig
from vllm_fusedmla.kernels.sparse_plan import make_sparse_plan

# kernel, h_q, s_q, page size
PORTABLE = [("portable_bf16", 16, 1, 64), ("portable_fp8", 16, 2, 64), ("portable_bf16", 40, 1, 16)]
PORTABLE += [("portable_fp8", 64, 1, 32), ("portable_fp8_ds_mla", 16, 2, 64), ("portable_fp8_ds_mla", 40, 1, 16)]
HOPPER = [("swapab_bf16_n16", 16, 1, 64), ("swapab_fp8_n8", 4, 2, 16), ("swapab_fp8_n32", 16, 2, 64)]
HOPPER += [("swapab_fp8_ds_mla_n24", 40, 1, 16), ("twowg_fp8_c1", 64, 1, 32)]
HOPPER += [("twowg_fp8_c2", 96, 1, 64), ("twowg_fp8_ds_mla", 40, 1, 16)]
HOPPER += [("twowg_e4m3_c1", 40, 1, 48), ("twowg_e4m3_c2", 128, 1, 64)]
HOPPER += [("twowg_bf16_c1", 40, 1, 16), ("twowg_bf16_c2", 128, 1, 64)]


def main(cases: list[tuple[str, int, int, int]]) -> None:
    random.seed(1)
    torch.manual_seed(1)
    for name, h_q, s_q, page_size in cases:
        for batch_invariant in (False, True):
            problem = make_problem(
                [0, 1, 200, 700], h_q=h_q, s_q=s_q, page_size=page_size, cache_format=forced.format_of(name),
                device="cuda", spread=1.0,
            )  # fmt: skip
            plan = forced.plan_of(name, s_q * h_q, problem.q.device, batch_invariant)
            out, lse = dense_decode.mla_decode(*problem.arguments(), k_scale=problem.k_scale, plan=plan)
            torch.cuda.synchronize()
            forced.assert_right(name, problem, out, lse)


def gather() -> None:
    """Listed keys on Hopper, at the end of a cache that ends where its memory does."""
    for kernel, h_q, block in (("twowg_gather", 40, 64), ("swapab_gather", 12, 16), ("swapab_gather", 20, 24)):
        config = DecodeConfig(kernel, block, 64, 12, 0, 1, 1, 1, "forced")
        for cache_format, slots in itertools.product(("bf16", "fp8_ds_mla"), (False, True)):
            problem = make_sparse_problem(
                [0, 1, 200, 700], h_q=h_q, s_q=2, topk=192, page_size=16, cache_format=cache_format, device="cuda",
                slots=slots, lengths=slots,
            )  # fmt: skip
            plan = make_sparse_plan(config, h_q, device_facts(problem.q.device)[1], False)
            results = sparse_decode.mla_sparse_decode(*problem.arguments(), plan=plan, **problem.keywords())
            torch.cuda.synchronize()
            assert_matches(problem, *results)


def select_keys() -> None:
    """The indexer's top-k, of rows that end where their memory does."""
    for rows, n in ((1, 70_001), (5, 9_000), (40, 3_000)):
        x = torch.randn(rows, n, device="cuda")
        ends = torch.tensor([n, *(random.randint(0, n) for _ in range(rows - 1))], dtype=torch.int32, device="cuda")
        check_topk(x, ends, 2048)


if __name__ == "__main__":
    if sys.argv[1:] == ["hopper"]:
        gather()
        select_keys()
        main(HOPPER)
    else:
        main(PORTABLE)
    print("all launches done")
