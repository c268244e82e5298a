# SPDX-License-Identifier: Apache-2.0
"""What is measured of the indexer of DeepSeek Sparse Attention: launch shapes, their inputs, and right results."""

import dataclasses
import re
from typing import Any

import torch

from vllm_fusedmla.kernels import indexer_layout
from vllm_fusedmla.kernels import indexer_reference as reference

PAGE_SIZE = 64
HEADS = 64
_KEYS_AT_A_TIME = 1 << 16
_CHECKED_ROWS = 4
ROUNDING = 2.0**-11
"""Allowed error of a score relative to the sum of its products' sizes: the e4m3 matrix unit keeps 13 bits below the
largest addend (DeepSeek-V3, arXiv 2412.19437, section 3.3.2)."""

_NAME = re.compile(r"(?:(paged) b|(ragged) s|topk(?P<topk>\d+) b)(?P<rows>\d+) kv(?P<kv>\d+)")


@dataclasses.dataclass(frozen=True)
class IndexerCase:
    """One launch shape.

    Attributes:
        kind: "paged" scores of a paged cache's keys (decode), "ragged" ones of contiguous keys (prefill), or "topk".
        rows: query tokens: of as many requests, or for "ragged" the last ones of one request.
        kv: keys of each request.
        topk: how many to select; 0 but for "topk".
    """

    kind: str
    rows: int
    kv: int
    topk: int = 0

    @property
    def name(self) -> str:
        head = {"paged": "paged b", "ragged": "ragged s", "topk": f"topk{self.topk} b"}[self.kind]
        return f"{head}{self.rows} kv{self.kv}"

    @classmethod
    def parse(cls, name: str) -> "IndexerCase":
        """The case called `name`, the inverse of the property `name`.

        Raises:
            ValueError: `name` is not of the form ``paged b1 kv1024``, ``ragged s64 kv1024`` or ``topk64 b1 kv1024``.
        """
        match = _NAME.fullmatch(name.strip())
        if match is None:
            raise ValueError(
                f"case must look like 'paged b1 kv1024', 'ragged s64 kv1024' or 'topk64 b1 kv1024': {name!r}"
            )
        kind = match[1] or match[2] or "topk"
        case = cls(kind, int(match["rows"]), int(match["kv"]), int(match["topk"] or 0))
        if kind == "ragged" and case.rows > case.kv:
            raise ValueError(f"the tokens of a ragged case are among its keys, got {name!r}")
        return case

    def visible(self) -> list[int]:
        """Keys that each row sees."""
        first = self.kv - self.rows + 1
        return [first + row for row in range(self.rows)] if self.kind == "ragged" else [self.kv] * self.rows

    def min_bytes(self, dtype: str) -> int:
        """Bytes that any kernel must move: keys or scores read once, queries, results."""
        scores = 4 * sum(self.visible())
        if self.kind == "topk":
            return scores + 4 * self.rows * self.topk
        keys = self.kv * (1 if self.kind == "ragged" else self.rows)
        return keys * indexer_layout.INDEX_BYTES + self.rows * HEADS * (indexer_layout.INDEX_DIM + 4) + scores

    def flops(self) -> int:
        """Operations of the products of queries and keys, two per multiply-add; none for top-k."""
        return 0 if self.kind == "topk" else 2 * sum(self.visible()) * HEADS * indexer_layout.INDEX_DIM


CASES = [
    IndexerCase.parse(name)
    for name in (
        "paged b128 kv32768",
        "paged b1 kv131072",
        "ragged s4096 kv32768",
        *(f"topk2048 b{b} kv131072" for b in (1, 8, 32)),
    )
]


@dataclasses.dataclass
class PagedInputs:
    """Tensors of a "paged" case.

    Attributes:
        lengths: ``[rows]`` int32, keys that each row sees, from the first.
        q: ``[rows, 64, 128]`` e4m3; weights ``[rows, 64]`` float32.
        cache: ``[num_pages, 64, 132]`` uint8, see `indexer_layout`; block_table ``[rows, max_pages]`` int32, shuffled.
    """

    case: IndexerCase
    lengths: torch.Tensor
    q: torch.Tensor
    weights: torch.Tensor
    cache: torch.Tensor
    block_table: torch.Tensor


@dataclasses.dataclass
class RaggedInputs:
    """Tensors of a "ragged" case: lengths, q and weights as above, k ``[kv, 128]`` e4m3, k_scales ``[kv]`` float32.

    starts is ``[rows]`` int32, zeros.
    """

    case: IndexerCase
    lengths: torch.Tensor
    q: torch.Tensor
    weights: torch.Tensor
    k: torch.Tensor
    k_scales: torch.Tensor
    starts: torch.Tensor


@dataclasses.dataclass
class TopkInputs:
    """Tensors of a "topk" case: lengths as above, logits ``[rows, kv]`` float32."""

    case: IndexerCase
    lengths: torch.Tensor
    logits: torch.Tensor


IndexerInputs = PagedInputs | RaggedInputs | TopkInputs


def make_inputs(case: IndexerCase, device: torch.device, seed: int = 0) -> IndexerInputs:
    """Random inputs: keys and scores standard normal, queries over all of e4m3's range."""
    draw: dict[str, Any] = {"device": device, "generator": torch.Generator(device).manual_seed(seed)}
    lengths = torch.tensor(case.visible(), dtype=torch.int32, device=device)
    if case.kind == "topk":
        return TopkInputs(case, lengths, torch.randn(case.rows, case.kv, **draw))
    q = torch.randn(case.rows, HEADS, indexer_layout.INDEX_DIM, **draw) * 60
    q = q.clamp(-448, 448).to(torch.float8_e4m3fn)
    weights = torch.randn(case.rows, HEADS, **draw) * 0.01
    if case.kind == "ragged":
        k, k_scales = indexer_layout.quantise_keys(torch.randn(case.kv, indexer_layout.INDEX_DIM, **draw))
        return RaggedInputs(case, lengths, q, weights, k, k_scales, torch.zeros_like(lengths))
    pages = -(-case.kv // PAGE_SIZE)
    total = case.rows * pages
    cache = torch.empty(total, PAGE_SIZE, indexer_layout.INDEX_BYTES, dtype=torch.uint8, device=device)
    codes, scales = indexer_layout.page_views(cache)
    step = _KEYS_AT_A_TIME // PAGE_SIZE
    for codes_part, scales_part in zip(codes.split(step), scales.split(step), strict=True):
        keys = torch.randn(codes_part[..., 0].numel(), indexer_layout.INDEX_DIM, **draw)
        new_codes, new_scales = indexer_layout.quantise_keys(keys)
        codes_part.copy_(new_codes.view(torch.uint8).view_as(codes_part))
        scales_part.copy_(new_scales.view_as(scales_part))
    table = torch.randperm(total, **draw).int().view(case.rows, pages)
    return PagedInputs(case, lengths, q, weights, cache, table)


def check(x: IndexerInputs, result: torch.Tensor, slack: float = 1.0) -> tuple[float, str]:
    """The largest error of a result over what is allowed, and what is wrong with it ("" if nothing).

    Args:
        x: the inputs.
        result: scores ``[rows, >= kv]``, of which the visible columns count; or indices ``[rows, topk]`` int32 in any
            order, of which the values must be the largest ones (so that equal values may be exchanged).
        slack: factor on the allowed error of scores.
    """
    if isinstance(x, TopkInputs):
        return _check_topk(x, result)
    worst = 0.0
    for row in sorted({0, x.case.rows // 3, x.case.rows // 2, x.case.rows - 1})[:_CHECKED_ROWS]:
        n = int(x.lengths[row])
        k, k_scales = _keys_of(x, row)
        bounds = torch.zeros_like(x.lengths[:1]), x.lengths[row : row + 1]
        q, weights = x.q[row : row + 1], x.weights[row : row + 1]
        want = reference.index_logits_ragged(q, k, k_scales, weights, *bounds, compute_dtype=torch.float64)
        sizes = reference.index_logits_ragged(
            _absolute(q), _absolute(k), k_scales, weights.abs(), *bounds, compute_dtype=torch.float64
        )
        error = (result[row, :n].double() - want[0, :n]).abs() / (sizes[0, :n] * ROUNDING * slack).clamp_min(1e-30)
        worst = max(worst, float(error.nan_to_num(torch.inf).max()))
    return worst, "" if worst <= 1 else f"scores are {worst:.2f} times their tolerance off"


def _keys_of(x: PagedInputs | RaggedInputs, row: int) -> tuple[torch.Tensor, torch.Tensor]:
    if isinstance(x, RaggedInputs):
        return x.k, x.k_scales
    bounds = torch.tensor([0, x.case.kv])
    return reference.gather_index_cache(x.cache, x.block_table[row : row + 1], bounds)


def _absolute(codes: torch.Tensor) -> torch.Tensor:
    return (codes.view(torch.uint8) & 0x7F).view(torch.float8_e4m3fn)


def _check_topk(x: TopkInputs, result: torch.Tensor) -> tuple[float, str]:
    chosen = result.long().sort(1).values
    if bool((chosen[:, 0] < 0).any()) or bool((chosen[:, -1] >= x.case.kv).any()):
        return float("inf"), "indices out of range"
    if bool((chosen[:, 1:] == chosen[:, :-1]).any()):
        return float("inf"), "an index is selected twice"
    got = x.logits.gather(1, chosen).sort(1, descending=True).values
    wrong = int((got != x.logits.topk(x.case.topk, 1).values).sum())
    return float(wrong), f"{wrong} of {got.numel()} selected values are not among the largest" if wrong else ""
