# SPDX-License-Identifier: Apache-2.0
"""Random problems for the indexer and for top-k, and the comparisons with the reference, for interpreter and GPU."""

import dataclasses
import math
import random

import torch

from vllm_fusedmla.kernels import indexer, indexer_layout, topk, topk_kernel
from vllm_fusedmla.kernels import indexer_reference as reference

# Of the sum of the sizes of all products: float32 sums in the interpreter; on a GPU those of the e4m3 matrix unit,
# which keeps 13 bits below the largest addend (DeepSeek-V3, arXiv 2412.19437, 3.3.2).
ROUNDING = {"cpu": 2.0**-20, "cuda": 2.0**-11}


@dataclasses.dataclass
class Problem:
    q: torch.Tensor  # [b, s_q, heads, 128] e4m3
    cache: torch.Tensor  # [num_pages, page_size, 132], NaN codes and scales wherever no request's token lies
    weights: torch.Tensor  # [b * s_q, heads]
    seq_lens: torch.Tensor  # [b]
    block_table: torch.Tensor  # an absurd page number past each request's end

    def arguments(self, max_len: int) -> tuple:
        return self.q, self.cache, self.weights, self.seq_lens, self.block_table, max_len

    def sizes(self, max_len: int) -> torch.Tensor:
        """What rounding errors are relative to: the scores with everything taken positive."""
        codes, _ = indexer_layout.page_views(self.cache)
        positive = self.cache.clone()
        indexer_layout.page_views(positive)[0].copy_(codes & 0x7F)
        q = (self.q.view(torch.uint8) & 0x7F).view(torch.float8_e4m3fn)
        arguments = (q, positive, self.weights.abs(), self.seq_lens, self.block_table, max_len)
        return reference.index_logits_paged(*arguments, compute_dtype=torch.float64)


def make_problem(lens, *, heads=32, s_q=1, page_size=64, device="cpu", extra_stride=0) -> Problem:
    b = len(lens)
    pages = [-(-n // page_size) for n in lens]
    num_pages = sum(pages) + 2
    order = torch.randperm(num_pages)[: sum(pages)]
    table = torch.full((b, max([*pages, 1]) + 2), 2_147_480_000, dtype=torch.int32)
    slots = [torch.empty(0, dtype=torch.int64)]
    for i, n in enumerate(lens):
        own, order = order[: pages[i]], order[pages[i] :]
        table[i, : pages[i]] = own
        slots.append(own[torch.arange(n) // page_size] * page_size + torch.arange(n) % page_size)
    store = torch.full((num_pages, page_size * 132 + extra_stride), 0xFF, dtype=torch.uint8, device=device)
    cache = store[:, : page_size * 132].unflatten(1, (page_size, 132))
    slot_mapping = torch.cat(slots).to(device)
    keys = torch.randn(slot_mapping.numel(), 128, device=device) * torch.exp(
        torch.randn(slot_mapping.numel(), 1, device=device)
    )
    reference.write_index_cache(keys, cache, slot_mapping)
    q = (torch.randn(b, s_q, heads, 128, device=device) * 60).clamp(-448, 448).to(torch.float8_e4m3fn)
    weights = torch.randn(b * s_q, heads, device=device) * 0.01
    return Problem(q, cache, weights, torch.tensor(lens, dtype=torch.int32, device=device), table.to(device))


def assert_scores(got, want, sizes) -> None:
    """Fail unless scores are right to rounding and -inf exactly where no key is seen."""
    seen = torch.isfinite(want)
    assert torch.equal(got > -math.inf, seen) and not got.isnan().any()
    error = (got.double() - want)[seen].abs()
    assert (error <= ROUNDING[got.device.type] * sizes[seen]).all(), f"largest error {error.max().item():.2e}"


def check_paged(problem, max_len, **options):
    rows = problem.weights.shape[0]
    out = torch.full((rows, max_len + 200), 77.0, device=problem.q.device)
    got = indexer.index_logits_paged(*problem.arguments(max_len), out=out[:, :max_len], **options)
    assert (out[:, max_len:] == 77.0).all()
    want = reference.index_logits_paged(*problem.arguments(max_len), compute_dtype=torch.float64)
    assert_scores(got, want, problem.sizes(max_len))
    return got


def ragged_problem(ranges, total, heads, device):
    tokens = len(ranges)
    keys, k_scales = indexer_layout.quantise_keys(torch.randn(total, 128, device=device))
    q = (torch.randn(tokens, heads, 128, device=device) * 60).clamp(-448, 448).to(torch.float8_e4m3fn)
    weights = torch.randn(tokens, heads, device=device) * 0.01
    starts, ends = (torch.tensor(t, dtype=torch.int32, device=device) for t in zip(*ranges, strict=True))
    return q, keys, k_scales, weights, starts, ends


def ragged_sizes(q, k, k_scales, weights, starts, ends, **options):
    q, k = ((t.view(torch.uint8) & 0x7F).view(torch.float8_e4m3fn) for t in (q, k))
    return reference.index_logits_ragged(
        q, k, k_scales, weights.abs(), starts, ends, compute_dtype=torch.float64, **options
    )


def check_ragged(problem: tuple, **options) -> torch.Tensor:
    columns = options.get("max_len") or problem[1].shape[0]
    out = torch.full((problem[0].shape[0], columns + 200), 77.0, device=problem[0].device)
    got = indexer.index_logits_ragged(*problem, out=out[:, :columns], **options)
    assert (out[:, columns:] == 77.0).all()
    options.pop("config", None)
    want = reference.index_logits_ragged(*problem, **options, compute_dtype=torch.float64)
    assert_scores(got, want, ragged_sizes(*problem, **options))
    return got


VALUES = ["normal", "ties", "constant", "relu", "wide", "bits", "special", "descending"]


def make_values(kind: str, rows: int, n: int) -> torch.Tensor:
    x = torch.randn(rows, n)
    if kind == "ties":
        x = (x * 3).round() / 4
    elif kind == "constant":
        x = torch.full((rows, n), random.choice([0.0, -1.5, 3e38]))
    elif kind == "relu":  # most of them 0, of either sign
        x = torch.where(x > 1.5, x, torch.where(torch.rand(rows, n) < 0.5, 0.0, -0.0))
    elif kind == "wide":  # subnormal to almost infinite
        x = torch.sign(x) * torch.exp(torch.empty(rows, n).uniform_(-103.0, 88.0))
    elif kind == "bits":  # any float32 at all, NaN and infinities too
        x = torch.randint(-(2**31), 2**31, (rows, n)).int().view(torch.float32)
    elif kind == "special":
        x = torch.tensor([math.nan, -math.inf, math.inf, 0.0, -0.0, 1e-45, -1e-45, 1.0])[torch.randint(8, (rows, n))]
    elif kind == "descending":
        x = torch.linspace(1.0, -1.0, n).expand(rows, n).clone()
    return x


def check_topk(x, visible, k, **options):
    workspace = topk.topk_workspace(x.shape[0], x.device)
    got = topk.topk_indices(x, visible, k, workspace=workspace, **options)
    want = reference.topk_indices(x, visible, k)
    assert torch.equal(got, want)
    # State and counts are written before they are read; what is added up must be zero again.
    assert not workspace[:, : topk_kernel.STATE_OFFSET].any()
    assert not workspace[:, topk_kernel.COUNTER_OFFSET :].any()
    return got


def assert_selects_the_best(problem: Problem, indices: torch.Tensor, max_len: int) -> None:
    """Fail unless no key that was left out is better than one selected, by more than rounding."""
    exact = reference.index_logits_paged(*problem.arguments(max_len), compute_dtype=torch.float64)
    margin = ROUNDING[indices.device.type] * problem.sizes(max_len)
    for row, seen in enumerate(reference.row_lengths(problem.seq_lens, problem.q.shape[1]).tolist()):
        chosen = indices[row][indices[row] >= 0].long()
        others = torch.ones(max_len, dtype=torch.bool, device=indices.device).index_fill_(0, chosen, False)
        others &= exact[row] > -math.inf
        assert len(chosen) == min(indices.shape[1], seen, max_len)
        if len(chosen) and others.any():
            assert (exact[row] + margin[row])[chosen].min() >= (exact[row] - margin[row])[others].max()


def run_topk_program(part: int, parts: int, launches: list[tuple], workspace: torch.Tensor, k: int, start) -> None:
    """Body of a process that is one program of every row, in launches of all phases at once, in the interpreter.

    The processes share the memory that programs share on a GPU, and `start` keeps launches apart.
    """
    from triton.runtime.interpreter import interpreter_builder

    torch.set_num_threads(1)
    set_index, set_size = interpreter_builder.set_grid_idx, interpreter_builder.set_grid_dim
    interpreter_builder.set_grid_idx = lambda _, y, z: set_index(part, y, z)
    interpreter_builder.set_grid_dim = lambda _, y, z: set_size(parts, y, z)
    for x, ends, out in launches:
        start.wait()
        topk_kernel.topk_kernel[(1, x.shape[0])](
            x, ends, ends, out, workspace, x.shape[1], k, 1, 256, x.stride(0), out.stride(0),
            HAS_STARTS=False, VECTOR=False, MULTI=True, TILE=512, FIRST=0, LAST=topk_kernel.PHASES, INTERPRETED=True,
            DEPENDENT=False,
        )  # fmt: skip
