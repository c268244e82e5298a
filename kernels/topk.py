# SPDX-License-Identifier: Apache-2.0
"""Exact top-k of rows of float32 values, for the indexer of DeepSeek Sparse Attention: one launch a call on a GPU."""

import torch

from . import topk_kernel as kernels
from .common import dependent_launch, device_facts, interpreted
from .hopper import topk as hopper_topk

_LEAST_PART = 1024
"""Values of a row for which one more program is worth its wait for the others."""


def topk_workspace(rows: int, device: torch.device | str) -> torch.Tensor:
    """Workspace for launches of up to `rows` rows: zeros, which a launch leaves zero again.

    Launches that may run at the same time, those of two streams say, must not share one.
    """
    return torch.zeros(rows, kernels.WORKSPACE_ROW, dtype=torch.int32, device=device)


def programs_per_row(rows: int, n: int, device: torch.device) -> int:
    """Programs that share a row: as many as run at the same time, one a multiprocessor, and as the row can feed."""
    _, num_sms = device_facts(device)
    return max(min(num_sms // max(rows, 1), -(-n // _LEAST_PART), kernels.MAX_PARTS), 1)


def tile_shape(rows: int, n: int, parts: int, num_sms: int) -> tuple[int, int]:
    """Values of a tile, and warps of a program: large tiles where a multiprocessor has one program. Not timed."""
    if parts > 1:
        return (2048 if n <= 4096 * parts else 8192), 16
    return (2048, 8) if rows > num_sms or n <= 4096 else (8192, 16)


def _whole_vectors(logits: torch.Tensor) -> bool:
    """Whether every row may be read in vectors of four values, the last of which may begin before the row's end."""
    rows, n = logits.shape
    end = logits.storage_offset() + (rows - 1) * logits.stride(0) + (n + 3) // 4 * 4
    return logits.stride(0) % 4 == 0 and end * logits.element_size() <= logits.untyped_storage().nbytes()


def topk_indices(
    logits: torch.Tensor,
    visible: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    k: int,
    *,
    out: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
    parts: int | None = None,
) -> torch.Tensor:
    """Indices of the `k` largest values of each row. Inputs are trusted.

    Args:
        logits: ``[rows, n]`` float32, contiguous rows with any stride between them. Values outside the visible part
            are not used. -inf and NaN are never selected; -0.0 equals 0.0.
        visible: the row's columns to choose from, int32 and contiguous. Either lengths: ``[rows]``, or ``[rows / s]``
            for s rows a request, of which row i sees ``length - s + 1 + i`` columns, from the first. Or (starts, ends),
            each ``[rows]``. Out of range is cut off, empty is allowed.
        k: at least 1; may exceed n.
        out: ``[rows, k]`` int32, contiguous rows with any stride between them.
        workspace: from `topk_workspace`, for at least `rows` rows; allocated (one more launch) if not given and needed,
            which it is where `programs_per_row` is over 1.
        parts: programs a row of the portable kernel, chosen if not given. With more than one, all programs of the
            launch must fit on the GPU at the same time, or the driver refuses. On Hopper a CUDA kernel without
            workspace serves if it is not given, unless there are starts.

    Returns:
        ``[rows, k]`` int32: indices relative to the row's start, ascending, then -1 where fewer values than `k` are
        there to select. Of equal values the ones with the lower indices are selected. The same bits on every run.

    Raises:
        ValueError: more programs a row than there is workspace for.
    """
    rows, n = logits.shape
    device = logits.device
    starts, ends = visible if isinstance(visible, tuple) else (None, visible)
    out = torch.empty(rows, k, dtype=torch.int32, device=device) if out is None else out
    if rows == 0:
        return out
    if parts is None and starts is None and _whole_vectors(logits) and hopper_topk.takes(logits, k):
        hopper_topk.topk_indices(logits, ends, out)
        return out
    parts = programs_per_row(rows, n, device) if parts is None else parts
    multi = parts > 1
    if multi and workspace is None:
        workspace = topk_workspace(rows, device)
    if workspace is not None and multi and (workspace.shape[0] < rows or parts > kernels.MAX_PARTS):
        most = f"{workspace.shape[0]} rows of up to {kernels.MAX_PARTS} programs"
        raise ValueError(f"workspace is for {most}, got {rows} rows of {parts}")
    # The interpreter runs programs one after the other, so they cannot wait for each other.
    single = not (multi and interpreted())
    launches = [(0, kernels.PHASES)] if single else [(phase, phase + 1) for phase in range(kernels.PHASES)]
    tile, num_warps = tile_shape(rows, n, parts, device_facts(device)[1])
    options = {"launch_cooperative_grid": True} if multi and device.type == "cuda" else {}
    for first, last in launches:
        kernels.topk_kernel[(parts, rows)](
            logits,
            ends if starts is None else starts,
            ends,
            out,
            out if workspace is None else workspace,
            n,
            k,
            rows // ends.numel(),
            _LEAST_PART,
            logits.stride(0),
            out.stride(0),
            HAS_STARTS=starts is not None,
            VECTOR=_whole_vectors(logits),
            MULTI=multi,
            TILE=tile,
            FIRST=first,
            LAST=last,
            INTERPRETED=interpreted(),
            **dependent_launch(device),
            **options,
            num_warps=num_warps,
        )
    return out
