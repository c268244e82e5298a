# SPDX-License-Identifier: Apache-2.0
"""Random decode problems and the comparison with the reference, for the interpreter and for a GPU."""

import dataclasses
import random

import torch

from vllm_fusedmla.kernels import layout, reference

FORMATS = ["bf16", "fp16", "fp8", "fp8_ds_mla"]
CACHE_DTYPE = {
    "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.float8_e4m3fn, "fp8_ds_mla": torch.uint8,
}  # fmt: skip
QUERY_DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16, "fp8_ds_mla": torch.bfloat16}

# design: absolute, relative and cosine tolerance of out; absolute and relative tolerance of lse.
OUT_TOLERANCE = {
    "bf16": (8e-4, 2.01 / 128, 5e-6), "fp16": (8e-4, 2.01 / 128, 5e-6), "fp8": (1e-3, 2.01 / 128, 5e-6),
    "fp8_ds_mla": (1e-3, 2.01 / 128, 5e-6),
}  # fmt: skip
SPARSE_OUT_TOLERANCE = (1e-3, 2.01 / 128, 5e-6)  # whatever the cache
LSE_TOLERANCE = (1e-6, 8.01 / 65536)
# A score is a float32 sum of 576 products: its error is relative to |q||k|, not to the sum, which may cancel to 0.
# So lse may also be off by this times |q||k| sm_scale, which matters only for rows whose lse is close to 0.
SCORE_ROUNDING = 2.0**-22


@dataclasses.dataclass
class Problem:
    q: torch.Tensor  # [b, s_q, h_q, 576]
    cache: torch.Tensor  # [num_pages, page_size, width], NaN wherever no request's token lies
    block_table: torch.Tensor  # [b, max_pages], an absurd page number past each request's end
    seq_lens: torch.Tensor  # [b]
    k_scale: torch.Tensor | float
    cache_format: str
    score_size: float  # |q||k| sm_scale

    def arguments(self) -> tuple:
        return self.q, self.cache, self.block_table, self.seq_lens

    def out_tolerance(self) -> tuple[float, float, float]:
        return OUT_TOLERANCE[self.cache_format]

    def expected(self, **options) -> tuple[torch.Tensor, torch.Tensor]:
        """Reference in float64 on the same quantised inputs."""
        arguments = (self.q.double(), *self.arguments()[1:])
        return reference.mla_decode(*arguments, k_scale=self.k_scale, compute_dtype=torch.float64, **options)


def make_problem(
    seq_lens: list[int],
    *,
    h_q: int,
    s_q: int = 1,
    page_size: int = 64,
    cache_format: str = "bf16",
    device: str = "cpu",
    extra_stride: int = 0,
    spread: float = 2.0,
    rise: float = 0.0,
    wide_scales: bool = False,
) -> Problem:
    """A problem with shuffled pages. Values have standard deviation 0.1, scores `spread`.

    Scores rise by `rise` besides, from a request's first key to its last.

    Everything a kernel must not read is poison: unattended cache rows are NaN, unused block table entries point
    outside the cache, and pages are `extra_stride` elements further apart than they need be, filled with NaN.
    `fp8_ds_mla` rows get scales that are no powers of two; with `wide_scales` some are far smaller than others, or 0.
    """
    b = len(seq_lens)
    pages = [-(-n // page_size) for n in seq_lens]
    num_pages, max_pages = sum(pages) + 3, max([*pages, 1]) + 2
    order = torch.randperm(num_pages)[: sum(pages)]
    table = torch.full((b, max_pages), 2_147_480_000, dtype=torch.int32)
    slots = []
    for i, n in enumerate(seq_lens):
        own, order = order[: pages[i]], order[pages[i] :]
        table[i, : pages[i]] = own
        position = torch.arange(n)
        slots.append(own[position // page_size] * page_size + position % page_size)
    width = layout.row_bytes(cache_format) // CACHE_DTYPE[cache_format].itemsize
    store = poisoned((num_pages, page_size * width + extra_stride), cache_format).to(device)
    cache = store[:, : page_size * width].unflatten(1, (page_size, width))
    k_scale = torch.tensor(random.uniform(0.0005, 0.002), device=device) if cache_format == "fp8" else 1.0
    slot_mapping = torch.cat(slots).to(device)
    values = torch.randn(slot_mapping.numel(), layout.D_QK, device=device) * 0.1
    if rise:
        values[:, -1] = torch.cat([torch.linspace(-0.2, 0.2, n, device=device) for n in seq_lens])
    if cache_format == "fp8_ds_mla":
        largest = values[:, : layout.D_V].unflatten(1, (-1, layout.QUANT_GROUP)).abs().amax(-1)
        scales = largest / layout.E4M3_MAX * (1 + 3 * torch.rand_like(largest))
        if wide_scales:
            scales *= 2.0 ** torch.randint_like(scales, -120, 60).clamp(max=0)
            scales[torch.rand_like(scales) < 0.1] = 0
        write_ds_mla_rows(cache, slot_mapping, values, scales)
    else:
        layout.write_cache(values, slot_mapping, cache, k_scale)
    # sm_scale is 576 ** -0.5, so the standard deviation of a score is that of q times that of the keys
    q = (torch.randn(b, s_q, h_q, layout.D_QK, device=device) * spread / 0.1).to(QUERY_DTYPE[cache_format])
    if rise:
        q[..., -1] = rise / 0.4 * layout.D_QK**0.5
    lens = torch.tensor(seq_lens, dtype=torch.int32, device=device)
    return Problem(q, cache, table.to(device), lens, k_scale, cache_format, spread * layout.D_QK**0.5)


def poisoned(shape: tuple[int, ...], cache_format: str) -> torch.Tensor:
    """Cache memory whose every value is NaN, scales too."""
    if cache_format == "fp8_ds_mla":
        return torch.full(shape, 0xFF, dtype=torch.uint8)  # NaN as e4m3, float32 and bfloat16
    return torch.full(shape, float("nan")).to(CACHE_DTYPE[cache_format])


def write_ds_mla_rows(cache: torch.Tensor, slots: torch.Tensor, values: torch.Tensor, scales: torch.Tensor) -> None:
    """Store `values` ``[T, 576]`` with the given float32 scales ``[T, 4]``, which `layout.write_cache` would choose."""
    groups = values[:, : layout.D_V].unflatten(1, (-1, layout.QUANT_GROUP)) / scales.unsqueeze(-1)
    groups = groups.nan_to_num(0.0)  # 0 / 0
    codes = groups.clamp(-layout.E4M3_MAX, layout.E4M3_MAX).to(torch.float8_e4m3fn).flatten(1)
    rope = values[:, layout.D_V :].to(torch.bfloat16).contiguous()
    rows = torch.cat([part.view(torch.uint8) for part in (codes, scales.contiguous(), rope)], 1)
    cache[slots // cache.shape[1], slots % cache.shape[1]] = rows


def cosine_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """1 - cosine of the angle between the two tensors taken as vectors, in FlashMLA's symmetric form."""
    a, b = a.double(), b.double()
    norm = (a * a + b * b).sum().item()
    return 0.0 if norm == 0 else 1 - 2 * (a * b).sum().item() / norm


def assert_matches(problem: Problem, out: torch.Tensor, lse: torch.Tensor, **options) -> None:
    """Fail unless out and lse meet the project's tolerances against the float64 reference."""
    want, want_lse = problem.expected(**options)
    absolute, relative, cosine = problem.out_tolerance()
    assert torch.isfinite(out).all(), "out is not finite: something unattended leaked in"
    error = (out.double() - want).abs()
    excess = (error / torch.clamp(want.abs() * relative, min=absolute)).max().item()
    assert excess <= 1, f"out is {excess:.2f} times its tolerance off (largest absolute error {error.max().item():.2e})"
    difference = cosine_difference(out, want)
    assert difference < cosine, f"cosine difference of out is {difference:.2e}"
    finite = torch.isfinite(want_lse)
    assert torch.equal(torch.isfinite(lse), finite), "lse must be -inf exactly where there is no key"
    assert (lse[~finite] == -torch.inf).all()
    if finite.any():
        lse_error = (lse.double() - want_lse)[finite].abs()
        absolute = max(LSE_TOLERANCE[0], SCORE_ROUNDING * problem.score_size)
        allowed = torch.clamp(want_lse[finite].abs() * LSE_TOLERANCE[1], min=absolute)
        assert (lse_error <= allowed).all(), f"lse is off by {lse_error.max().item():.2e}"


def random_lengths(b: int, longest: int) -> list[int]:
    """Ragged lengths with the edges well represented: empty, one token, and either side of tile and page ends."""
    edges = [0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 129]
    return [
        min(random.choice(edges), longest) if random.random() < 0.4 else random.randint(0, longest) for _ in range(b)
    ]
