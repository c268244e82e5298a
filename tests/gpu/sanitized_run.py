# SPDX-License-Identifier: Apache-2.0
"""A few launches of every kernel, small, to be run under compute-sanitizer (test_sanitizer.py)."""

import torch
from problems import assert_matches, make_problem

from vllm_fusedmla.kernels import dense_decode
from vllm_fusedmla.kernels.plan import decode_plan


def main() -> None:
    cases = [("bf16", 16, 1, 64), ("fp8", 16, 2, 64), ("bf16", 40, 1, 16), ("fp8", 64, 1, 32)]
    cases += [("fp8_ds_mla", 16, 2, 64), ("fp8_ds_mla", 40, 1, 16)]
    for cache_format, h_q, s_q, page_size in cases:
        for batch_invariant in (False, True):
            problem = make_problem(
                [0, 1, 200, 700], h_q=h_q, s_q=s_q, page_size=page_size, cache_format=cache_format, device="cuda"
            )  # fmt: skip
            q = problem.q
            plan = decode_plan(s_q, h_q, cache_format, q.device, batch_invariant)
            out, lse = dense_decode.mla_decode(*problem.arguments(), k_scale=problem.k_scale, plan=plan)
            torch.cuda.synchronize()
            assert_matches(problem, out, lse)
    print("all launches done")


if __name__ == "__main__":
    main()
