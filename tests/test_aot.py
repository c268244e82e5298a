# SPDX-License-Identifier: Apache-2.0
"""Kernels compile ahead of time for every architecture we name, with both Triton versions, without a GPU."""

import pytest
from aot_run import compile_cases

from vllm_fusedmla.kernels.select import select_sparse

pytest.importorskip("triton")

OPTIN_SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}

DECODE: list[dict] = [
    {"kernel": "decode", "h_q": h_q, "s_q": s_q, "cache": cache}
    for cache in ("bf16", "fp8", "fp8_ds_mla")
    for h_q, s_q in ((16, 1), (16, 2), (128, 1))
]
SPARSE: list[dict] = [
    {"kernel": "sparse", "h_q": h_q, "cache": cache, **lists}
    for cache in ("bf16", "fp8", "fp8_ds_mla")
    for h_q in (16, 32, 128)
    for lists in ({}, {"page_size": 64})
]
# Bytes of spills a thread. Two programs of 32 rows a multiprocessor are worth some, as in the dense kernel; 64 rows
# with addresses from a block table are the worst, on Triton 3.8.
SPARSE_STACK = {16: 0, 32: 256, 128: 640}
OTHERS: list[dict] = [
    {"kernel": "sink"},
    *({"kernel": "write", "cache": cache} for cache in ("bf16", "fp16", "fp8", "fp8_ds_mla")),
    {"kernel": "schedule", "batch_invariant": False},
    {"kernel": "schedule", "batch_invariant": True},
    {"kernel": "convert"},
    {"kernel": "combine", "block_d": 512},
    {"kernel": "combine", "block_d": 128},
]


@pytest.fixture(params=["own", "second"])
def compiler(request, child_env):
    """compile_cases with this environment's Triton, and with the second one."""
    alt = request.getfixturevalue("triton_alt") if request.param == "second" else None
    return lambda cases: compile_cases("aot.py", cases, child_env, alt)


@pytest.mark.parametrize("capability", [80, 89, 90, 120])
def test_every_sparse_kernel_compiles_and_fits(capability, compiler):
    sparse = SPARSE if capability == 90 else SPARSE[:: len(SPARSE) // 3]
    cases = [c | {"capability": capability} for c in [*sparse, SPARSE[0] | {"all": True}]]
    for case, report in zip(cases, compiler(cases), strict=True):
        assert report["shared"] <= OPTIN_SHARED[capability], (case, report)
        assert report["stack"] <= SPARSE_STACK[case["h_q"]], (case, report)
        if capability == 90:
            config = select_sparse((9, 0), case["h_q"], case["cache"])
            programs = config.programs_per_sm
            assert programs * (report["shared"] + 1024) <= 228 * 1024, (case, report)
            assert programs * 32 * config.num_warps * report["registers"] <= 65536, (case, report)


@pytest.mark.parametrize("capability", [80, 89, 90, 120])
def test_every_kernel_compiles_and_fits(capability, compiler):
    # h_q 128 is one more decode row block on the older architectures, the same binary otherwise
    decode = DECODE if capability == 90 else [c for c in DECODE if c["h_q"] == 16]
    cases = [c | {"capability": capability} for c in decode + OTHERS]
    for case, report in zip(cases, compiler(cases), strict=True):
        assert report["shared"] <= OPTIN_SHARED[capability], (case, report)
        assert report["registers"] <= 255, (case, report)
        if case.get("cache") == "fp8_ds_mla":  # more operands than the others: its blocks of rows are chosen for this
            assert report["stack"] <= 32, (case, report)


def test_sm100_compiles(compiler):
    cases = [c | {"capability": 100} for c in DECODE[:1] + OTHERS[:1]]
    assert all(report["shared"] <= OPTIN_SHARED[100] for report in compiler(cases))


def test_sixteen_row_kernels_on_hopper_keep_two_programs_a_multiprocessor_and_do_not_spill(compiler):
    cases = [c | {"capability": 90} for c in DECODE if c["h_q"] * c["s_q"] == 16]
    assert len(cases) == 3
    for case, report in zip(cases, compiler(cases), strict=True):
        assert report["stack"] <= (32 if case["cache"] == "fp8_ds_mla" else 0), (case, report)
        assert 2 * (report["shared"] + 1024) <= 228 * 1024, (case, report)
        assert 2 * 128 * report["registers"] <= 65536, (case, report)
