# SPDX-License-Identifier: Apache-2.0
"""Random sparse attention problems, on the caches of `problems.py`, for the interpreter and for a GPU."""

import dataclasses
import random

import torch
from problems import SPARSE_OUT_TOLERANCE, Problem, make_problem, poisoned

from vllm_fusedmla.kernels import sparse_reference

NO_KEY = [-1, -1, -1, -2, -123456, -(2**31)]
"""Negative entries of a list; -1 is what engines write."""
TOO_FAR = 2**31 - 1


@dataclasses.dataclass
class SparseProblem(Problem):
    indices: torch.Tensor  # [b, s_q, topk], positions of a request, or slots if `slots`
    slots: bool
    options: dict  # topk_length, attn_sink

    def arguments(self) -> tuple:
        return self.q, self.cache, self.indices

    def out_tolerance(self) -> tuple[float, float, float]:
        return SPARSE_OUT_TOLERANCE

    def keywords(self) -> dict:
        """Keyword arguments beside k_scale that the problem itself needs."""
        return self.options if self.slots else {**self.options, "block_table": self.block_table}

    def expected(self, **options) -> tuple[torch.Tensor, torch.Tensor]:
        """Reference in float64 on the same quantised inputs."""
        options = {**self.keywords(), **options, "k_scale": self.k_scale, "compute_dtype": torch.float64}
        return sparse_reference.mla_sparse_decode(self.q.double(), self.cache, self.indices, **options)


def make_sparse_problem(
    seq_lens: list[int],
    *,
    h_q: int,
    topk: int,
    s_q: int = 1,
    page_size: int = 64,
    cache_format: str = "bf16",
    device: str = "cpu",
    slots: bool = False,
    lengths: bool = False,
    sink: bool = False,
    holes: float = 0.2,
    extra_stride: int = 0,
    spread: float = 2.0,
) -> SparseProblem:
    """Lists of random keys of each request, unsorted, with a share of `holes` entries that name no key among them.

    Holes are negative, or lie outside the cache or the block table. With `lengths` every list has a topk_length,
    per request or per token, and behind it entries that look like others. Every cache row that no list names is NaN.
    """
    base = make_problem(
        seq_lens, h_q=h_q, s_q=s_q, page_size=page_size, cache_format=cache_format, device=device,
        extra_stride=extra_stride, spread=spread,
    )  # fmt: skip
    b = len(seq_lens)
    num_pages = base.cache.shape[0]
    table = base.block_table.cpu().long()
    per_request = lengths and random.random() < 0.5
    counts = torch.full((b, s_q), topk)
    if lengths:
        counts = torch.randint(0, topk + 1, (b, 1 if per_request else s_q)).expand(b, s_q)
    indices = torch.empty(b, s_q, topk, dtype=torch.int64)
    used = torch.zeros(num_pages * page_size, dtype=torch.bool)
    outside = [TOO_FAR, num_pages * page_size if slots else table.shape[1] * page_size]
    if not slots:
        outside.append(table.shape[1] * page_size - 1)  # in the table, where no page is
    for i, n in enumerate(seq_lens):
        for j in range(s_q):
            count = int(counts[i, j])
            named = torch.randperm(n)[: min(count, round(count * (1 - holes)))]
            row = torch.tensor(random.choices(NO_KEY + outside, k=topk))
            if n:
                row[count:] = torch.randint(0, n, (topk - count,))
            row[torch.randperm(count)[: len(named)]] = named
            inside = (row >= 0) & (row < n)
            position = torch.where(inside, row, 0)
            slot = table[i, position // page_size] * page_size + position % page_size
            used[slot[:count][inside[:count]]] = True
            indices[i, j] = torch.where(inside, slot, row) if slots else row
    idle = (~used).nonzero().flatten().to(device)
    poison = poisoned((len(idle), base.cache.shape[2]), cache_format).to(device)
    base.cache[idle // page_size, idle % page_size] = poison
    options = {}
    if lengths:
        options["topk_length"] = (counts[:, 0] if per_request else counts).int().contiguous().to(device)
    if sink:
        options["attn_sink"] = torch.randn(h_q, device=device) * 3
    fields = {f.name: getattr(base, f.name) for f in dataclasses.fields(base)}
    return SparseProblem(**fields, indices=indices.int().to(device), slots=slots, options=options)
