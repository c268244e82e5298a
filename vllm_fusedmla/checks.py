# SPDX-License-Identifier: Apache-2.0
"""What the public functions refuse. Shapes, strides and dtypes only: no check reads a tensor's contents or waits."""

import torch

from .kernels import layout
from .kernels.select import MAX_H_Q

_PAGE_ALIGNMENT = 16
"""Pages begin at multiples of this many elements."""


def require(
    name: str, tensor: torch.Tensor, shape: tuple[int, ...], meaning: str, dtype: torch.dtype, device: torch.device
) -> None:
    """Raise a ValueError unless `tensor` has this shape (`meaning` is its form in words), dtype and device."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {meaning} = {list(shape)}, got {list(tensor.shape)}")
    if tensor.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on q's device {device}, got {tensor.device}")


def require_contiguous(**tensors: torch.Tensor) -> None:
    """The same for tensors that must be contiguous."""
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {list(tensor.stride())}")


def require_last_contiguous(name: str, tensor: torch.Tensor, of: str) -> None:
    """The same for a tensor whose last dimension must be contiguous; `of` says what it holds."""
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(f"{name} must have contiguous {of}, got strides {list(tensor.stride())}")


def check_query(q: torch.Tensor, meaning: str) -> None:
    """Shape (`meaning` is its form in words, h_q before the width), head count, dtype and last stride of a query."""
    dims = meaning.count(",") + 1
    if q.dim() != dims or q.shape[-1] != layout.D_QK:
        raise ValueError(f"q must have shape {meaning}, got {list(q.shape)}")
    h_q = q.shape[-2]
    if not 1 <= h_q <= MAX_H_Q:
        raise ValueError(f"q must have 1 <= h_q <= {MAX_H_Q}, got h_q = {h_q} in shape {list(q.shape)}")
    on_gpu = q.device.type == "cuda"
    dtypes = (torch.bfloat16, torch.float16) + (() if on_gpu else (torch.float32, torch.float64))
    if q.dtype not in dtypes:
        raise ValueError(f"q must be {' or '.join(map(str, dtypes))}, got {q.dtype}")
    if q.stride(-1) != 1:
        raise ValueError(f"q must be contiguous in its last dimension, got strides {list(q.stride())}")


def check_cache(
    cache: torch.Tensor, q: torch.Tensor, k_scale: float | torch.Tensor | None, name: str = "cache", unit: str = "page"
) -> None:
    """Format, strides, device and scale of a cache ``[num_pages, page_size, width]``, which callers know as `name`."""
    cache_format = layout.cache_format(cache)
    on_gpu = q.device.type == "cuda"
    if on_gpu and cache_format not in ("bf16", "fp16", "fp8", "fp8_ds_mla"):
        raise ValueError(f"{name} must be bf16, fp16, fp8 or fp8_ds_mla on a GPU, got {cache_format}")
    if on_gpu and not cache_format.startswith("fp8") and cache.dtype != q.dtype:
        raise ValueError(f"{name} must be fp8 or have q's dtype {q.dtype}, got {cache.dtype}")
    if on_gpu and cache_format == "fp8_ds_mla" and q.dtype != torch.bfloat16:
        raise ValueError(f"q must be torch.bfloat16 for an fp8_ds_mla cache, whose rope part is, got {q.dtype}")
    if cache.stride(0) % _PAGE_ALIGNMENT:
        expected = f"a {unit} stride that is a multiple of {_PAGE_ALIGNMENT} elements"
        raise ValueError(f"{name} must have {expected}, got {cache.stride(0)}")
    if cache.device != q.device:
        raise ValueError(f"{name} must be on q's device {q.device}, got {cache.device}")
    if isinstance(k_scale, torch.Tensor) and (
        k_scale.numel() != 1 or k_scale.dtype != torch.float32 or k_scale.device != q.device
    ):
        raise ValueError(
            f"k_scale must be one float32 on q's device {q.device}, got {list(k_scale.shape)} {k_scale.dtype} "
            f"on {k_scale.device}"
        )


def check_block_table(block_table: torch.Tensor, b: int, device: torch.device) -> None:
    """``[b, max_pages]`` int32 with contiguous rows."""
    if block_table.dim() != 2 or block_table.shape[0] != b:
        raise ValueError(f"block_table must have shape [b, max_pages] = [{b}, *], got {list(block_table.shape)}")
    require_last_contiguous("block_table", block_table, "rows")
    require("block_table", block_table, tuple(block_table.shape), "[b, max_pages]", torch.int32, device)


def scale_parts(k_scale: float | torch.Tensor | None) -> tuple[torch.Tensor | None, float]:
    """A scale as an operator's two arguments: a tensor or None, and the number that counts if it is None."""
    if isinstance(k_scale, torch.Tensor):
        return k_scale, 1.0
    return None, 1.0 if k_scale is None else float(k_scale)
