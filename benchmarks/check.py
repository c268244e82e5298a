# SPDX-License-Identifier: Apache-2.0
"""Whether a provider's result is right: against a float64 reference on the same quantised inputs, on a few requests."""

import dataclasses
from typing import Any

import torch

from benchmarks.inputs import Inputs

CHECKED_REQUESTS = 4


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """An element is right within `absolute` or `relative` of the reference; the whole within `cosine` difference."""

    absolute: float
    relative: float
    cosine: float
    lse_absolute: float
    lse_relative: float


# This project's own kernels: docs and tests use the same. FlashMLA's standard (its tests/).
STRICT = {
    "bf16": Tolerance(8e-4, 2.01 / 128, 5e-6, 1e-6, 8.01 / 65536),
    "fp8": Tolerance(1e-3, 2.01 / 128, 5e-6, 1e-6, 8.01 / 65536),
    "fp8_ds_mla": Tolerance(1e-3, 2.01 / 128, 5e-6, 1e-6, 8.01 / 65536),
}
_SPARSE_ABSOLUTE = 1e-3
# Peers are not under test: enough to prove that they computed the same thing. Some round partial results or lse to
# bf16; FlashMLA's fp8 kernel rounds the softmax weights to e4m3.
PEER = {
    "bf16": Tolerance(4e-3, 1 / 16, 1e-4, 5e-2, 1e-2),
    "fp8": Tolerance(2e-2, 1 / 4, 2e-3, 5e-2, 1e-2),
    "fp8_ds_mla": Tolerance(2e-2, 1 / 4, 2e-3, 5e-2, 1e-2),
}


def tolerance(x: Inputs, strict: bool) -> Tolerance:
    """What a result is held to; sparse attention, as in FlashMLA's tests, to the absolute one of fp8."""
    if not strict:
        return PEER[x.dtype]
    found = STRICT[x.dtype]
    return found if x.slots is None else dataclasses.replace(found, absolute=_SPARSE_ABSOLUTE)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Largest errors on the checked requests. `ok` is whether all are within tolerance; `reason` says what is not."""

    ok: bool
    max_abs_error: float
    cosine_difference: float
    max_lse_error: float
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Expected:
    """Reference results of the checked requests, float64."""

    requests: list[int]
    out: torch.Tensor
    lse: torch.Tensor


def requests_to_check(lengths: list[int], count: int = CHECKED_REQUESTS) -> list[int]:
    """First, last, longest and shortest request, then others in order, `count` in all or fewer."""
    order = [0, len(lengths) - 1, lengths.index(max(lengths)), lengths.index(min(lengths)), *range(len(lengths))]
    return list(dict.fromkeys(order))[:count]


def expected(x: Inputs, q: torch.Tensor | None = None) -> Expected:
    """Reference results for some requests of a case, all heads.

    Args:
        x: the case's inputs.
        q: the query as a kernel that quantises it sees it; x.q by default.
    """
    from vllm_fusedmla.kernels import reference, sparse_reference

    requests = requests_to_check(x.lengths)
    query = (x.q if q is None else q)[requests].double()
    options: dict[str, Any] = {"sm_scale": x.sm_scale, "k_scale": x.k_scale.double(), "compute_dtype": torch.float64}
    if x.slots is not None:
        return Expected(requests, *sparse_reference.mla_sparse_decode(query, x.cache, x.slots[requests], **options))
    lists = x.block_table[requests], x.seq_lens[requests]
    return Expected(requests, *reference.mla_decode(query, x.cache, *lists, **options))


def judge(out: torch.Tensor, lse: torch.Tensor, want: Expected, tolerance: Tolerance) -> Verdict:
    """Compare a result ``[b, s_q, h_q, 512]`` and its lse ``[b, s_q, h_q]`` with the reference."""
    out, lse = out[want.requests].double(), lse[want.requests].double()
    if not torch.equal(out.isfinite(), want.out.isfinite()) or not torch.equal(lse.isfinite(), want.lse.isfinite()):
        return Verdict(False, float("nan"), float("nan"), float("nan"), "non-finite values differ from the reference's")
    error = (out - want.out).abs()
    wrong = (error > tolerance.absolute) & (error > tolerance.relative * want.out.abs())
    cosine = cosine_difference(out, want.out)
    finite = want.lse.isfinite()
    lse_error = (lse - want.lse)[finite].abs()
    lse_wrong = (lse_error > tolerance.lse_absolute) & (lse_error > tolerance.lse_relative * want.lse[finite].abs())
    reasons = []
    if wrong.any():
        reasons.append(f"{int(wrong.sum())} of {wrong.numel()} outputs out of tolerance")
    if not cosine <= tolerance.cosine:
        reasons.append(f"cosine difference {cosine:.1e} > {tolerance.cosine:.0e}")
    if lse_wrong.any():
        reasons.append(f"{int(lse_wrong.sum())} of {lse_wrong.numel()} lse out of tolerance")
    max_lse = float(lse_error.max()) if lse_error.numel() else 0.0
    return Verdict(not reasons, float(error.max()), cosine, max_lse, "; ".join(reasons))


def cosine_difference(x: torch.Tensor, y: torch.Tensor) -> float:
    """1 - 2 <x, y> / (<x, x> + <y, y>): 0 for equal tensors, sensitive to scale as well as direction."""
    denominator = float((x * x + y * y).sum())
    return 0.0 if denominator == 0.0 else 1.0 - 2.0 * float((x * y).sum()) / denominator
