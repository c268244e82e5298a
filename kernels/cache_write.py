# SPDX-License-Identifier: Apache-2.0
"""Triton writer of the paged MLA cache: quantises new tokens and stores each at its slot, in one launch.

The bytes are those of `layout.pack_rows`. Quantising is done in integers: every GPU and the interpreter then give the
same bits, and compute capability 8.0, whose Triton has no e4m3, is served too.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from . import layout
from .common import dependent_launch, interpreted
from .e4m3 import round_to_bfloat16, to_e4m3

_D_V = tl.constexpr(layout.D_V)
_D_ROPE = tl.constexpr(layout.D_ROPE)
_GROUP = tl.constexpr(layout.QUANT_GROUP)
_GROUPS = tl.constexpr(layout.D_V // layout.QUANT_GROUP)
_SCALES_OFFSET = tl.constexpr(layout.DS_MLA_SCALES_OFFSET)
_ROPE_OFFSET = tl.constexpr(layout.DS_MLA_ROPE_OFFSET)
_E4M3_MAX = tl.constexpr(layout.E4M3_MAX)
_LEAST_SCALE = tl.constexpr(layout.DS_MLA_LEAST_SCALE)


def write_cache(
    kv_c: torch.Tensor,
    k_pe: torch.Tensor,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: float | torch.Tensor = 1.0,
) -> None:
    """Store tokens in a paged cache of any format but fp32. Shapes and dtypes are trusted.

    Args:
        kv_c: ``[T, 512]`` latent parts in any float dtype; k_pe: ``[T, 64]`` rope parts; contiguous last dimensions.
            Rows beyond ``len(slot_mapping)`` are ignored.
        cache: ``[num_pages, page_size, width]``, see `layout`; written in place.
        slot_mapping: ``[t]`` int64 or int32, contiguous, ``page * page_size + offset`` of each token. A token whose
            slot is negative or past the end of the cache is left out.
        k_scale: scale of an `fp8` cache, a number or a float32 tensor of one element on the device.

    The bytes are those of `layout.pack_rows` for bf16 and fp16 inputs. For float32 inputs a scale of `fp8_ds_mla` may
    be twice as large where the exact one is at most two units in the last place above a power of two: a logarithm
    in float32, which `pack_rows` takes, does not see that.
    """
    (count,) = slot_mapping.shape
    if count == 0:
        return
    name = layout.cache_format(cache)
    eight_bit = name in ("fp8", "fp8_ds_mla")
    scale_is_tensor = isinstance(k_scale, torch.Tensor)
    target = cache.view(torch.uint8) if eight_bit else cache
    if name == "bf16":  # as bits: the interpreter does not round to bfloat16
        target = cache.view(torch.uint16)
    write_kernel[(count,)](
        kv_c,
        k_pe,
        target,
        slot_mapping,
        k_scale if scale_is_tensor else slot_mapping,  # any pointer: read only if K_SCALE_POINTER
        1.0 if scale_is_tensor else float(k_scale),
        kv_c.stride(0),
        k_pe.stride(0),
        target.stride(0),
        target.shape[0],
        PAGE_SIZE=target.shape[1],
        WIDTH=target.shape[2],
        FORMAT=name,
        K_SCALE_POINTER=name == "fp8" and scale_is_tensor,
        INTERPRETED=interpreted(),
        **dependent_launch(cache.device),
        num_warps=1,
    )


def write_ds_mla(kv_c: torch.Tensor, k_pe: torch.Tensor, cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """`write_cache` for a ``[num_pages, page_size, 656]`` uint8 cache in the format `fp8_ds_mla`."""
    write_cache(kv_c, k_pe, cache, slot_mapping)


@triton.jit
def _to_bfloat16_bits(x, INTERPRETED: tl.constexpr):
    rounded = round_to_bfloat16(x.to(tl.float32), INTERPRETED).to(tl.float32)
    return (rounded.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16)


@triton.jit(do_not_specialize=["num_pages"])
def write_kernel(
    kv_c,  # [T, 512]
    k_pe,  # [T, 64]
    cache,  # [num_pages, PAGE_SIZE, WIDTH], elements as uint8 or uint16 but for fp16
    slot_mapping,  # [t]
    k_scale_pointer,
    k_scale_value,
    kv_c_stride,
    k_pe_stride,
    page_stride,
    num_pages,
    PAGE_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    FORMAT: tl.constexpr,
    K_SCALE_POINTER: tl.constexpr,
    INTERPRETED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token).to(tl.int64)
    page = slot // PAGE_SIZE
    if (slot >= 0) & (page < num_pages):
        row = cache + page * page_stride + (slot % PAGE_SIZE) * WIDTH
        group = tl.arange(0, _GROUPS)
        latent_column = group[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]
        rope_column = tl.arange(0, _D_ROPE)
        latent = tl.load(kv_c + token * kv_c_stride + latent_column)
        rope = tl.load(k_pe + token * k_pe_stride + rope_column)
        if FORMAT == "fp8_ds_mla":
            latent = latent.to(tl.float32)
            ratio = tl.maximum(tl.math.div_rn(tl.max(tl.abs(latent), 1), _E4M3_MAX), _LEAST_SCALE)
            bits = ratio.to(tl.uint32, bitcast=True) + 0x7FFFFF  # up to a power of two: one exponent more
            scale = (bits >> 23 << 23).to(tl.float32, bitcast=True)
            tl.store(row + latent_column, to_e4m3(tl.math.div_rn(latent, scale[:, None] + tl.zeros_like(latent))))
            scales = (row + _SCALES_OFFSET).to(tl.pointer_type(tl.float32), bitcast=True)
            tl.store(scales + group, scale)
            rope_row = (row + _ROPE_OFFSET).to(tl.pointer_type(tl.uint16), bitcast=True)
            tl.store(rope_row + rope_column, _to_bfloat16_bits(rope, INTERPRETED))
        elif FORMAT == "fp8":
            k_scale = k_scale_value
            if K_SCALE_POINTER:
                k_scale = tl.load(k_scale_pointer)
            latent = latent.to(tl.float32)
            rope = rope.to(tl.float32)
            tl.store(row + latent_column, to_e4m3(tl.math.div_rn(latent, tl.zeros_like(latent) + k_scale)))
            tl.store(row + _D_V + rope_column, to_e4m3(tl.math.div_rn(rope, tl.zeros_like(rope) + k_scale)))
        elif FORMAT == "bf16":
            tl.store(row + latent_column, _to_bfloat16_bits(latent, INTERPRETED))
            tl.store(row + _D_V + rope_column, _to_bfloat16_bits(rope, INTERPRETED))
        else:
            tl.store(row + latent_column, latent.to(tl.float16))
            tl.store(row + _D_V + rope_column, rope.to(tl.float16))
