# SPDX-License-Identifier: Apache-2.0
"""Every kernel by name, whichever one a shape would get: plans, shapes that suit, and the tolerance of each."""

import random

import torch
from problems import assert_matches, cosine_difference, make_problem, random_lengths

from vllm_fusedmla.kernels import hopper
from vllm_fusedmla.kernels.common import device_facts
from vllm_fusedmla.kernels.hopper.variants import ROWS_NAME, TOPK_NAME, VARIANTS
from vllm_fusedmla.kernels.plan import make_plan
from vllm_fusedmla.kernels.select import DecodeConfig, select_portable

FORMATS = ("bf16", "fp16", "fp8", "fp8_ds_mla")
PORTABLE = tuple(f"portable_{cache_format}" for cache_format in FORMATS)
GATHER = tuple(name for name in VARIANTS if "gather" in name)  # of sparse attention: test_sparse_gpu.py
KERNELS = (*(name for name in VARIANTS if name not in (*GATHER, TOPK_NAME)), *PORTABLE)
PAGE_SIZES = (16, 32, 48, 64, 128, 256)


def is_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


def format_of(name: str) -> str:
    """The cache format that a kernel reads."""
    return (
        "fp8" if rounds(name) else next(form for form in sorted(FORMATS, key=len, reverse=True) if f"_{form}" in name)
    )


def rounds(name: str) -> bool:
    """Whether a kernel rounds query and weights to e4m3."""
    return "_e4m3" in name


def config_of(name: str) -> DecodeConfig:
    """The configuration of a kernel of hopper/ that serves paged requests."""
    kernel = "twowg_e4m3" if rounds(name) else "twowg_rows" if name == ROWS_NAME else name.split("_")[0]
    block_h = int(name.rsplit("_n", 1)[1]) if kernel == "swapab" else 64
    return DecodeConfig(kernel, block_h, 64, 12, 0, 1, 3, 1, "forced")


def plan_of(name: str, rows: int, device: torch.device, batch_invariant: bool = False):
    """A plan that launches the kernel `name`."""
    arch, num_sms = device_facts(device)
    if name in PORTABLE:
        return make_plan(select_portable(arch, rows, format_of(name)), rows, num_sms, batch_invariant)
    plan = make_plan(config_of(name), rows, num_sms, batch_invariant)
    assert hopper.variant_of(plan.config, format_of(name), rows) == name
    return plan


def random_shape(name: str) -> tuple[int, int]:
    """h_q and s_q for a kernel; some of twowg's variants differ by the number of rows, the others take any."""
    while True:
        h_q, s_q = random.choice([1, 3, 8, 12, 16, 20, 32, 40, 64, 96, 128]), random.randint(1, 8)
        rows = h_q * s_q
        if not name.endswith(("_c1", "_c2")) or (rows > 64) == name.endswith("c2"):
            return h_q, s_q


def random_problem(name: str, **changes):
    """A problem of any shape that the kernel takes."""
    h_q, s_q = random_shape(name)
    b = random.choice([1, 2, 5, 33, 200])
    lengths = random_lengths(b, 400 if b == 200 else 4000)
    options = {
        "h_q": h_q, "s_q": s_q, "page_size": random.choice(PAGE_SIZES), "cache_format": format_of(name),
        "device": "cuda", "extra_stride": random.choice([0, 64, 128]), "spread": spread_of(name),
    }  # fmt: skip
    return make_problem(changes.pop("lengths", lengths), **{**options, **changes})


def spread_of(name: str) -> float:
    return 1.0 if rounds(name) else random.choice([0.5, 2.0, 4.0])


def assert_right(name: str, problem, out: torch.Tensor, lse: torch.Tensor, **options) -> None:
    """The project's tolerances; looser ones for the kernel that rounds query and weights to e4m3."""
    if not rounds(name):
        assert_matches(problem, out, lse, **options)
        return
    want, want_lse = problem.expected(**options)
    assert torch.isfinite(out).all()
    assert cosine_difference(out, want) < 2e-3
    finite = torch.isfinite(want_lse)
    assert torch.equal(torch.isfinite(lse), finite) and (lse[~finite] == -torch.inf).all()
    # Rounding each of the query's values by up to 2^-4 moves scores of standard deviation 1 by 0.03 or so.
    assert not finite.any() or (lse.double() - want_lse)[finite].abs().max() < 0.25
