# SPDX-License-Identifier: Apache-2.0
"""Byte layouts of the MLA key-value cache, and the conversions between them and plain tensors.

MLA caches one row a token: the compressed latent (512 values, used as key and as value) followed by the
RoPE part of the key (64 values). A cache is a tensor ``[num_pages, page_size, width]`` whose rows are contiguous;
the page stride is ``cache.stride(0)`` and may exceed ``page_size * width``.

| format       | dtype          | width | row                                                              |
| ------------ | -------------- | ----- | ---------------------------------------------------------------- |
| `bf16`       | bfloat16       | 576   | 512 latent, 64 rope                                              |
| `fp16`       | float16        | 576   | 512 latent, 64 rope                                              |
| `fp32`       | float32        | 576   | 512 latent, 64 rope (CPU only)                                   |
| `fp8`        | float8_e4m3fn  | 576   | 512 latent, 64 rope, all divided by one `k_scale` of the layer   |
| `fp8_ds_mla` | uint8          | 656   | 512 e4m3 latent, 4 float32 scales (one per 128), 64 bf16 rope    |

`fp8` also arrives as uint8 of width 576, which is how vLLM stores it. The 656-byte row is the one of
DeepSeek-V3.2's FlashMLA (github.com/deepseek-ai/FlashMLA).
"""

import torch

D_V = 512
"""Width of the latent: the value, and the first part of the key."""
D_ROPE = 64
"""Width of the key's RoPE part."""
D_QK = D_V + D_ROPE
"""Width of the whole key."""

QUANT_GROUP = 128
"""Latent values that share one scale in `fp8_ds_mla`."""
DS_MLA_SCALES_OFFSET = D_V
DS_MLA_ROPE_OFFSET = DS_MLA_SCALES_OFFSET + 4 * (D_V // QUANT_GROUP)
DS_MLA_ROW_BYTES = DS_MLA_ROPE_OFFSET + 2 * D_ROPE
E4M3_MAX = 448.0
DS_MLA_LEAST_SCALE = 1e-4
"""Least scale of a group in `fp8_ds_mla` before it is rounded up to a power of two, as vLLM's writer has it."""

_FORMATS = {
    (torch.bfloat16, D_QK): "bf16",
    (torch.float16, D_QK): "fp16",
    (torch.float32, D_QK): "fp32",
    (torch.float8_e4m3fn, D_QK): "fp8",
    (torch.uint8, D_QK): "fp8",
    (torch.uint8, DS_MLA_ROW_BYTES): "fp8_ds_mla",
    (torch.float8_e4m3fn, DS_MLA_ROW_BYTES): "fp8_ds_mla",
}


def cache_format(cache: torch.Tensor) -> str:
    """Name the format of a cache ``[num_pages, page_size, width]`` from its dtype and width.

    Raises:
        ValueError: the shape, dtype, width or row stride is none of the formats in this module.
    """
    if cache.dim() != 3:
        raise ValueError(f"cache must have shape [num_pages, page_size, width], got {list(cache.shape)}")
    width = cache.shape[-1]
    try:
        name = _FORMATS[cache.dtype, width]
    except KeyError:
        known = ", ".join(f"{dtype}".removeprefix("torch.") + f" x {w}" for dtype, w in _FORMATS)
        raise ValueError(f"cache must be one of ({known}), got {cache.dtype} x {width}") from None
    if cache.stride(2) != 1 or cache.stride(1) != width:
        raise ValueError(f"cache rows must be contiguous: strides [*, {width}, 1], got {list(cache.stride())}")
    return name


def row_bytes(name: str) -> int:
    """Bytes that one token takes in the cache format `name`."""
    return {"bf16": 2 * D_QK, "fp16": 2 * D_QK, "fp32": 4 * D_QK, "fp8": D_QK, "fp8_ds_mla": DS_MLA_ROW_BYTES}[name]


def pack_rows(kv: torch.Tensor, name: str, k_scale: float | torch.Tensor = 1.0) -> torch.Tensor:
    """Quantise rows to a cache format.

    Args:
        kv: ``[T, 576]`` in any float dtype, latent first.
        name: a cache format.
        k_scale: for `fp8` the divisor of all values; other formats ignore it.

    Returns:
        ``[T, width]`` in the format's dtype (uint8 for `fp8_ds_mla`).
    """
    if name == "fp8":
        return (kv.float() / k_scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    if name != "fp8_ds_mla":
        return kv.to({"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name])
    groups = kv[:, :D_V].float().unflatten(1, (-1, QUANT_GROUP))
    # Scales are powers of two, as vLLM's writer makes them: other readers round scales to bf16 or e8m0.
    scales = torch.exp2(torch.ceil(torch.log2((groups.abs().amax(-1) / E4M3_MAX).clamp_min(DS_MLA_LEAST_SCALE))))
    latent = (groups / scales.unsqueeze(-1)).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).flatten(1)
    rope = kv[:, D_V:].to(torch.bfloat16).contiguous()
    return torch.cat([latent.view(torch.uint8), scales.contiguous().view(torch.uint8), rope.view(torch.uint8)], 1)


def unpack_rows(
    rows: torch.Tensor, name: str, k_scale: float | torch.Tensor = 1.0, dtype=torch.float32
) -> torch.Tensor:
    """Inverse of `pack_rows`: rows ``[..., width]`` of a cache to ``[..., 576]`` in `dtype`, exact for any scale."""
    if name == "fp8":
        return rows.view(torch.float8_e4m3fn).to(dtype) * k_scale
    if name != "fp8_ds_mla":
        return rows.to(dtype)
    rows = rows.view(torch.uint8)
    latent = rows[..., :DS_MLA_SCALES_OFFSET].view(torch.float8_e4m3fn).to(dtype).unflatten(-1, (-1, QUANT_GROUP))
    scales = rows[..., DS_MLA_SCALES_OFFSET:DS_MLA_ROPE_OFFSET].contiguous().view(torch.float32).to(dtype)
    rope = rows[..., DS_MLA_ROPE_OFFSET:].contiguous().view(torch.bfloat16).to(dtype)
    return torch.cat([(latent * scales.unsqueeze(-1)).flatten(-2), rope], -1)


def write_cache(kv: torch.Tensor, slot_mapping: torch.Tensor, cache: torch.Tensor, k_scale: float | torch.Tensor = 1.0):
    """Store tokens in a paged cache, in plain PyTorch (the path of CPUs and tests).

    Args:
        kv: ``[T, 576]`` in any float dtype, latent first; rows beyond ``len(slot_mapping)`` are ignored.
        slot_mapping: ``[t]`` integers, ``page * page_size + offset`` of each token; -1 skips the token.
        cache: ``[num_pages, page_size, width]``, written in place.
        k_scale: see `pack_rows`.
    """
    name = cache_format(cache)
    slots = slot_mapping.flatten().long()
    keep = slots >= 0
    slots = slots[keep]
    rows = pack_rows(kv[: keep.numel()][keep], name, k_scale)
    page_size = cache.shape[1]
    # Index bytes for fp8: CPU builds of PyTorch lack indexed stores of float8.
    target, rows = (cache.view(torch.uint8), rows.view(torch.uint8)) if rows.element_size() == 1 else (cache, rows)
    target[slots // page_size, slots % page_size] = rows


def read_cache(cache: torch.Tensor, k_scale: float | torch.Tensor = 1.0, dtype=torch.float32) -> torch.Tensor:
    """The whole cache ``[num_pages, page_size, width]`` as ``[num_pages, page_size, 576]`` in `dtype`."""
    return unpack_rows(cache, cache_format(cache), k_scale, dtype)
