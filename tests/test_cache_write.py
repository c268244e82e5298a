# SPDX-License-Identifier: Apache-2.0
"""The Triton cache writer against `layout.write_cache`, byte by byte: in the interpreter or on a GPU."""

import random

import pytest
import torch
from problems import CACHE_DTYPE, FORMATS

pytest.importorskip("triton")
from vllm_fusedmla.kernels import cache_write, layout  # noqa: E402

SOURCES = [torch.bfloat16, torch.float16, torch.float32]


def random_tokens(count: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Rows over many decades, with the values where rounding and saturation are delicate among them."""
    kv = torch.randn(count, 576) * torch.exp(torch.randn(count, 1) * 3)
    kv[0] = 0.0
    kv[1] = torch.linspace(-500, 500, 576)
    kv[2] = 448.0 * 2.0 ** random.randint(-8, 6)  # a scale that is a power of two exactly
    kv[3, ::2] = 2.0 ** torch.randint(-30, 9, (288,))
    kv[4] = torch.arange(576) / 512 * 2.0**-6  # halfway between subnormal codes
    kv[5, :128] = 1e-6  # below the least scale
    kv[6] *= -0.0
    return kv.to(dtype).to(device)


def empty_cache(cache_format: str, page_size: int, device: str, extra_stride: int = 0) -> torch.Tensor:
    width = 656 if cache_format == "fp8_ds_mla" else 576
    store = torch.full((7, page_size * width + extra_stride), 77, dtype=torch.float32)
    return store.to(CACHE_DTYPE[cache_format]).to(device)[:, : page_size * width].unflatten(1, (page_size, width))


def as_bytes(cache: torch.Tensor) -> torch.Tensor:
    return cache.contiguous().view(torch.uint8)


@pytest.mark.parametrize("cache_format", FORMATS)
@pytest.mark.parametrize("dtype", SOURCES)
@pytest.mark.parametrize("page_size", [16, 48])
def test_bytes_are_those_of_the_plain_writer(cache_format, dtype, page_size, device):
    extra_stride = random.choice([0, 64])
    cache = empty_cache(cache_format, page_size, device, extra_stride)
    want = empty_cache(cache_format, page_size, device, extra_stride)
    kv = random_tokens(60, dtype, device)
    slots = torch.randperm(7 * page_size)[:60].to(device)
    k_scale = torch.tensor(random.uniform(0.01, 2.0), device=device)
    layout.write_cache(kv, slots, want, k_scale)
    given: float | torch.Tensor = k_scale if random.random() < 0.5 else float(k_scale)
    cache_write.write_cache(kv[:, :512], kv[:, 512:], cache, slots, given)
    assert torch.equal(as_bytes(cache), as_bytes(want))


@pytest.mark.parametrize("cache_format", FORMATS)
def test_skipped_and_impossible_slots(cache_format, device):
    cache = empty_cache(cache_format, 16, device)
    before = as_bytes(cache).clone()
    slots = torch.tensor([3, -1, 111, 112, -(2**40), 2**40], device=device)  # of 112
    kv = torch.ones(9, 576, device=device, dtype=torch.bfloat16)  # rows past the slot mapping are padding
    cache_write.write_cache(kv[:, :512], kv[:, 512:], cache, slots)
    changed = (as_bytes(cache) != before).flatten(0, 1).any(-1)
    assert changed.nonzero().flatten().tolist() == [3, 111]
    cache_write.write_cache(kv[:, :512], kv[:, 512:], cache, slots[:0])


def test_parts_may_be_strided_and_slots_int32(device):
    cache, want = empty_cache("fp8_ds_mla", 16, device), empty_cache("fp8_ds_mla", 16, device)
    kv = random_tokens(20, torch.bfloat16, device)
    latent = torch.full((20, 2048), float("nan"), dtype=kv.dtype, device=device)[:, 1536:]
    latent.copy_(kv[:, :512])
    slots = torch.randperm(112)[:20].int().to(device)
    layout.write_cache(kv, slots, want)
    cache_write.write_ds_mla(latent, kv[:, 512:].clone(), cache, slots)
    assert torch.equal(cache, want)


@pytest.mark.parametrize("cache_format", ["fp8", "fp8_ds_mla"])
def test_every_code_and_the_midpoints_between_them(cache_format, device):
    """Of both signs: each e4m3 value, halfway to the next, and a little to either side of that."""
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middle = (codes[1:] + codes[:-1]) / 2
    values = torch.cat([codes, middle, middle * (1 + 2**-10), middle * (1 - 2**-10)])
    values = torch.cat([values, -values])  # 1010
    groups = values.split(127)
    kv = torch.zeros(len(groups), 576)
    for row, group in zip(kv, groups, strict=True):
        row[: len(group)] = group
        row[127] = 448.0  # so that the scale is 1
    cache, want = empty_cache(cache_format, 16, device), empty_cache(cache_format, 16, device)
    kv, slots = kv.to(device), torch.arange(len(groups), device=device)
    layout.write_cache(kv, slots, want)
    cache_write.write_cache(kv[:, :512], kv[:, 512:], cache, slots)
    assert torch.equal(as_bytes(cache), as_bytes(want))


def test_nan_stays_nan(device):
    cache = empty_cache("fp8", 16, device)
    kv = torch.zeros(1, 576, device=device)
    kv[0, 7] = float("nan")
    cache_write.write_cache(kv[:, :512], kv[:, 512:], cache, torch.zeros(1, dtype=torch.int64, device=device))
    row = layout.read_cache(cache)[0, 0]
    assert row.isnan().nonzero().flatten().tolist() == [7]
