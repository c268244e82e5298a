# SPDX-License-Identifier: Apache-2.0
"""The indexer's and the top-k kernels compile ahead of time with both Triton versions, within each GPU's limits."""

import pytest
from aot_run import compile_cases

pytest.importorskip("triton")
from vllm_fusedmla.kernels.shared_bins import BINS_BYTES  # noqa: E402

OPTIN_SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
HOPPER: list[dict] = [
    *({"kernel": "paged", "heads": heads, "s_q": s_q} for heads in (32, 64) for s_q in (1, 2, 4)),
    {"kernel": "paged", "heads": 64, "page_size": 48, "clean": True},
    *({"kernel": "ragged", "heads": heads, "compressed": heads == 64} for heads in (32, 64)),
    {"kernel": "ragged", "heads": 64, "clean": True},
    {"kernel": "topk", "rows": 1, "n": 131072, "parts": 64},
    {"kernel": "topk", "rows": 32, "n": 131072, "parts": 4},
    {"kernel": "topk", "rows": 100, "n": 131072, "parts": 1},
    *({"kernel": "topk", "rows": 4000, "n": 32768, "parts": 1, "ranges": ranges} for ranges in (False, True)),
    {"kernel": "write"},
]
OTHERS: list[dict] = [
    {"kernel": "paged", "heads": 64},
    {"kernel": "ragged", "heads": 64},
    {"kernel": "topk", "rows": 4000, "n": 32768, "parts": 1},
    {"kernel": "write"},
]
LEAST_PROGRAMS = {1: 4, 2: 3, 4: 2}
"""Programs of the paged kernel with 64 heads that a Hopper multiprocessor must hold, by query rows a request."""


@pytest.mark.parametrize("triton_version", ["own", "second"])
def test_every_kernel_compiles_fits_and_does_not_spill(triton_version, child_env, request):
    alt = request.getfixturevalue("triton_alt") if triton_version == "second" else None
    cases = [c | {"capability": 90} for c in HOPPER]
    cases += [c | {"capability": capability} for capability in (80, 89) for c in OTHERS]
    cases += [c | {"capability": capability} for capability in (100, 120) for c in OTHERS[:2]]
    for case, report in zip(cases, compile_cases("aot_indexer.py", cases, child_env, alt), strict=True):
        shared = report["shared"] + (BINS_BYTES if case["kernel"] == "topk" else 0)
        assert shared <= OPTIN_SHARED[case["capability"]], (case, report)
        assert report["registers"] <= 255 and report["stack"] == 0, (case, report)
        if case["kernel"] == "topk":  # programs of 512 threads that wait for each other, one a multiprocessor
            assert report["registers"] <= 128, (case, report)
        if case["kernel"] == "paged" and case["heads"] == 64 and case["capability"] == 90 and "clean" not in case:
            programs = LEAST_PROGRAMS[case["s_q"]]
            assert programs * (report["shared"] + 1024) <= 228 * 1024, (case, report)
            assert programs * 128 * report["registers"] <= 65536, (case, report)
