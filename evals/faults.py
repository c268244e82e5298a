# SPDX-License-Identifier: Apache-2.0
"""Mistakes on purpose, to see whether the evaluation would notice them.

`inject(NAME)`, called in the engine's process before the model loads, makes FUSEDMLA compute what a kernel with that
mistake would. A fault is made of real calls with changed inputs, or of changes to their results, around the functions
through which every decode goes: Hopper's kernels, the portable ones and the PyTorch reference are then wrong alike, in
eager mode and, because nothing waits for the device, in CUDA graphs. vLLM's own prefill is untouched.

    from evals import faults
    undo = faults.inject("rope_dropped")

`FAULTS` is the table of what there is.
"""

from __future__ import annotations

import copy
import functools
import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_fusedmla.kernels import layout
from vllm_fusedmla.kernels.reference import split_query

logger = logging.getLogger(__name__)

Results = tuple[Tensor, Tensor]
Operator = Callable[..., Results]
"""``mla_decode(q, cache, block_table, seq_lens, **options)`` or ``mla_sparse_decode(q, cache, indices, **options)``."""

DENSE = (("vllm_fusedmla.kernels.reference", "mla_decode"), ("vllm_fusedmla.kernels.dense_decode", "mla_decode"))
SPARSE = (
    ("vllm_fusedmla.kernels.sparse_reference", "mla_sparse_decode"),
    ("vllm_fusedmla.kernels.sparse_decode", "mla_sparse_decode"),
)
SPARSE_LAYER = ("vllm_fusedmla.sparse_backend", "FusedMLASparseImpl", "forward_mqa")


def softmax_scale(operator: Operator, q: Any, *inputs: Tensor, **options: Any) -> Results:
    return operator(q, *inputs, **options | {"sm_scale": layout.D_QK**-0.5})


def rope_dropped(operator: Operator, q: Any, *inputs: Tensor, **options: Any) -> Results:
    latent, rope = split_query(q)
    return operator((latent, torch.zeros_like(rope)), *inputs, **options)


def tile_scale(operator: Operator, q: Any, *inputs: Tensor, **options: Any) -> Results:
    """Keys whose values are 1.5 times as large in the first group: so is that part of the query's product with them."""
    latent, rope = split_query(q)
    factor = torch.ones(layout.D_V, dtype=latent.dtype, device=latent.device)
    factor[: layout.QUANT_GROUP] = 1.5
    out, lse = operator((latent * factor, rope), *inputs, **options)
    return out.mul_(factor), lse


def k_scale_doubled(operator: Operator, q: Any, cache: Tensor, *inputs: Tensor, **options: Any) -> Results:
    """The scale itself where the cache has one, else all its values: scores and results are twice as large then."""
    if layout.cache_format(cache) == "fp8":
        return operator(q, cache, *inputs, **options | {"k_scale": 2 * options.get("k_scale", 1.0)})
    out, lse = operator(q, cache, *inputs, **options | {"sm_scale": 2 * _sm_scale(options)})
    return out.mul_(2), lse


def merge_without_lse(
    operator: Operator, q: Any, cache: Tensor, block_table: Tensor, seq_lens: Tensor, **options: Any
) -> Results:
    """Two parts of the pages, averaged; requests of three pages and more."""
    page_size, last = cache.shape[1], block_table.shape[1] - 1
    given, options = _without_schedule(options)
    pages = -(-seq_lens // page_size)
    first_pages = torch.div((pages - 1).clamp_min(0), 2, rounding_mode="floor").to(seq_lens.dtype)
    first_lens = first_pages * page_size
    column = torch.arange(last + 1, device=block_table.device) + first_pages.unsqueeze(1)
    second_table = block_table.gather(1, column.clamp_max(last))
    one = operator(q, cache, block_table, first_lens, **options | {"causal": False})
    two = operator(q, cache, second_table, seq_lens - first_lens, **options)
    return _average(one, two, given)


def merge_without_lse_sparse(operator: Operator, q: Any, cache: Tensor, indices: Tensor, **options: Any) -> Results:
    """Two halves of each list of keys, averaged."""
    given, options = _without_schedule(options)
    first = torch.arange(indices.shape[-1], device=indices.device) < indices.shape[-1] // 2
    one = operator(q, cache, torch.where(first, indices, -1), **options)
    two = operator(q, cache, torch.where(first, -1, indices), **options)
    return _average(one, two, given)


def lost_page(
    operator: Operator, q: Any, cache: Tensor, block_table: Tensor, seq_lens: Tensor, **options: Any
) -> Results:
    """The second page of requests of three pages and more. Keys carry their positions, so nothing else changes."""
    page_size, last = cache.shape[1], block_table.shape[1] - 1
    long = seq_lens > 2 * page_size
    column = torch.arange(last + 1, device=block_table.device)
    shifted = block_table[:, torch.where(column >= 1, column + 1, column).clamp_max(last)]
    table = torch.where(long.unsqueeze(1), shifted, block_table)
    return _rescheduled(operator, q, cache, table, torch.where(long, seq_lens - page_size, seq_lens), options)


def stale_block_table(
    operator: Operator, q: Any, cache: Tensor, block_table: Tensor, seq_lens: Tensor, **options: Any
) -> Results:
    return operator(q, cache, _without_newest(block_table, seq_lens, cache.shape[1]), seq_lens, **options)


def causal_off_by_one(
    operator: Operator, q: Any, cache: Tensor, block_table: Tensor, seq_lens: Tensor, **options: Any
) -> Results:
    """With two query rows and more, each row sees one key less: all but its own."""
    if split_query(q)[0].shape[1] == 1:
        return operator(q, cache, block_table, seq_lens, **options)
    return _rescheduled(operator, q, cache, block_table, (seq_lens - 1).clamp_min(0), options)


def lost_page_of_list(indices: Tensor, metadata: Any, page_size: int) -> tuple[Tensor, Any]:
    """Positions of the second page are left out of the lists."""
    return torch.where((indices >= page_size) & (indices < 2 * page_size), -1, indices), metadata


def stale_metadata(indices: Tensor, metadata: Any, page_size: int) -> tuple[Tensor, Any]:
    changed = copy.copy(metadata)
    requests = len(metadata.block_table)
    changed.block_table = _without_newest(metadata.block_table, metadata.seq_lens[:requests], page_size)
    return indices, changed


def topk_off_by_one(indices: Tensor, metadata: Any, page_size: int) -> tuple[Tensor, Any]:
    return torch.where(indices > 0, indices - 1, indices), metadata


@dataclass(frozen=True)
class Fault:
    """A mistake.

    does: what it makes of the computation. applies: where it can show. dense, sparse: wrap the operators; layer: from a
    sparse step's lists of positions [T, topk], metadata and page size to changed lists and metadata.
    """

    does: str
    applies: str
    dense: Callable[..., Results] | None = None
    sparse: Callable[..., Results] | None = None
    layer: Callable[[Tensor, Any, int], tuple[Tensor, Any]] | None = None


FAULTS: dict[str, Fault] = {
    "merge_without_lse": Fault(
        "partial results of a split request are averaged, not weighted by their log-sum-exps",
        "dense: requests over two pages; sparse: lists with keys in both halves",
        merge_without_lse,
        merge_without_lse_sparse,
    ),
    "lost_page": Fault(
        "the second page of a request is not attended to",
        "dense: requests over two pages; sparse: picked keys of that page",
        lost_page,
        layer=lost_page_of_list,
    ),
    "tile_scale": Fault(
        "the first of four scales of a cache row is read as 1.5 times what it is",
        "all; for caches without such scales, the values it would scale",
        tile_scale,
        tile_scale,
    ),
    "k_scale_doubled": Fault(
        "the cache's scale is read as twice what it is",
        "all; for caches without one scale, the values it would scale",
        k_scale_doubled,
        k_scale_doubled,
    ),
    "softmax_scale": Fault(
        "scores are divided by the root of the latent key's size, 576, not of the head's",
        "all",
        softmax_scale,
        softmax_scale,
    ),
    "rope_dropped": Fault("scores lack the rope part", "all", rope_dropped, rope_dropped),
    "stale_block_table": Fault(
        "the newest page's entry is that of the page before",
        "requests over one page; sparse: picked keys of the newest page",
        stale_block_table,
        layer=stale_metadata,
    ),
    "topk_off_by_one": Fault("for each picked key the one before it is read", "sparse", layer=topk_off_by_one),
    "causal_off_by_one": Fault(
        "each query row sees all keys before its own, and not its own",
        "dense, two and more tokens a request: speculative decoding, short prompts",
        causal_off_by_one,
    ),
}


def inject(name: str) -> Callable[[], None]:
    """Make FUSEDMLA in this process compute with a fault. Call it before vLLM captures CUDA graphs.

    Returns:
        a function that takes the fault away again (not from graphs that were captured with it).

    Raises:
        ValueError: there is no such fault.
    """
    if name not in FAULTS:
        raise ValueError(f"fault must be one of {', '.join(FAULTS)}, got {name!r}")
    fault = FAULTS[name]
    undo: list[tuple[Any, str, Any]] = []

    def replace(owner: Any, attribute: str, wrapper: Callable[..., Any]) -> None:
        original = getattr(owner, attribute)
        setattr(owner, attribute, functools.wraps(original)(functools.partial(wrapper, original)))
        undo.append((owner, attribute, original))

    for places, wrapper in ((DENSE, fault.dense), (SPARSE, fault.sparse)):
        for module, attribute in places if wrapper else ():
            owner = _module(module)
            if owner is not None and wrapper is not None:
                replace(owner, attribute, wrapper)
    if fault.layer is not None:
        backend = _module(SPARSE_LAYER[0])
        if backend is not None:
            _wrap_layer(getattr(backend, SPARSE_LAYER[1]), fault.layer, undo)
    logger.warning("FUSEDMLA computes with the fault %s: %s", name, fault.does)

    def take_away() -> None:
        for owner, attribute, original in reversed(undo):
            setattr(owner, attribute, original)

    return take_away


def _module(name: str) -> Any:
    """The module, or None where it cannot be imported: without Triton there is no portable kernel to be wrong."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name in ("triton", "vllm"):
            return None
        raise


def _wrap_layer(
    owner: Any, change: Callable[[Tensor, Any, int], tuple[Tensor, Any]], undo: list[tuple[Any, str, Any]]
) -> None:
    attribute = SPARSE_LAYER[2]
    original = getattr(owner, attribute)

    @functools.wraps(original)
    def forward(self: Any, q: Any, cache: Tensor, metadata: Any, layer: Any) -> Any:
        tokens = split_query(q)[0].shape[0]
        buffer = self.topk_indices_buffer
        changed, metadata = change(buffer[:tokens], metadata, cache.shape[1])
        self.topk_indices_buffer = changed
        try:
            return original(self, q, cache, metadata, layer)
        finally:
            self.topk_indices_buffer = buffer

    setattr(owner, attribute, forward)
    undo.append((owner, attribute, original))


def _sm_scale(options: dict[str, Any]) -> float:
    scale = options.get("sm_scale")
    return layout.D_QK**-0.5 if scale is None else scale


def _without_schedule(options: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors for the results, and the other options without a schedule, which is of other lengths."""
    given = {name: options[name] for name in ("out", "lse") if options.get(name) is not None}
    return given, {name: value for name, value in options.items() if name not in ("out", "lse", "schedule")}


def _rescheduled(
    operator: Operator, q: Any, cache: Tensor, table: Tensor, seq_lens: Tensor, options: dict[str, Any]
) -> Results:
    given, options = _without_schedule(options)
    return operator(q, cache, table, seq_lens, **options | given)


def _without_newest(table: Tensor, seq_lens: Tensor, page_size: int) -> Tensor:
    """Block tables in which each request's last page is the one before it."""
    column = torch.arange(table.shape[1], device=table.device)
    newest = torch.div(seq_lens - 1, page_size, rounding_mode="floor").unsqueeze(1)
    return torch.where((column == newest) & (column > 0), table[:, (column - 1).clamp_min(0)], table)


def _average(one: Results, two: Results, given: dict[str, Tensor]) -> Results:
    """The mean of two results, where both saw keys."""
    seen = [part[1].isfinite().unsqueeze(-1) for part in (one, two)]
    mean = ((one[0].float() + two[0].float()) / 2).to(one[0].dtype)
    out = torch.where(seen[0] & seen[1], mean, torch.where(seen[0], one[0], two[0]))
    lse = torch.logaddexp(one[1], two[1])
    return (given["out"].copy_(out) if "out" in given else out), (given["lse"].copy_(lse) if "lse" in given else lse)
