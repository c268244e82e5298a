# SPDX-License-Identifier: Apache-2.0
"""Cache formats: what is written is what is read, slots are honoured, and wrong tensors are refused."""

import pytest
import torch

from vllm_fusedmla.kernels import layout


def empty_cache(name: str, num_pages: int = 5, page_size: int = 16) -> torch.Tensor:
    dtype, width = {
        "bf16": (torch.bfloat16, 576),
        "fp16": (torch.float16, 576),
        "fp32": (torch.float32, 576),
        "fp8": (torch.float8_e4m3fn, 576),
        "fp8_ds_mla": (torch.uint8, 656),
    }[name]
    return torch.zeros(num_pages, page_size, width).to(dtype)


@pytest.mark.parametrize(
    ("name", "worst"), [("bf16", 2**-8), ("fp16", 2**-11), ("fp32", 0.0), ("fp8", 2**-4), ("fp8_ds_mla", 2**-4)]
)
def test_written_rows_are_read_back(name, worst):
    cache = empty_cache(name)
    kv = torch.randn(30, 576) * 3
    slots = torch.randperm(80)[:30]
    layout.write_cache(kv, slots, cache, k_scale=0.05)
    read = layout.read_cache(cache, k_scale=0.05).flatten(0, 1)[slots]
    smallest = {"fp8": 0.05 * 2**-10, "fp8_ds_mla": 0.05 * 2**-10, "fp16": 2**-25}.get(name, 0.0)  # half a subnormal
    assert ((read - kv).abs() <= kv.abs() * worst + smallest).all()
    assert layout.cache_format(cache) == name
    assert layout.row_bytes(name) == cache.element_size() * cache.shape[-1]


@pytest.mark.parametrize("name", ["bf16", "fp8", "fp8_ds_mla"])
def test_skipped_slots_and_other_rows_stay(name):
    cache = empty_cache(name)
    before = cache.clone()
    slots = torch.tensor([3, -1, 79, -1])
    layout.write_cache(torch.ones(6, 576), slots, cache)  # rows past the slot mapping are padding
    changed = (cache.view(torch.uint8) != before.view(torch.uint8)).flatten(0, 1).any(-1)
    assert changed.nonzero().flatten().tolist() == [3, 79]


def test_ds_mla_reader_is_exact_for_any_scale():
    rows = torch.zeros(1, 656, dtype=torch.uint8)
    codes = torch.randint(0, 0x7F, (512,), dtype=torch.uint8)
    scales = torch.tensor([0.1, 3.7, 1e-5, 250.0])
    rows[0, :512] = codes
    rows[0, 512:528] = scales.view(torch.uint8)
    read = layout.unpack_rows(rows, "fp8_ds_mla", dtype=torch.float64)[0, :512]
    want = codes.view(torch.float8_e4m3fn).double() * scales.double().repeat_interleave(128)
    assert torch.equal(read, want)


def test_fp8_saturates_instead_of_overflowing():
    rows = layout.pack_rows(torch.full((1, 576), 1e6), "fp8", 1.0)
    assert (rows.float() == 448).all()


def test_wrong_caches_are_refused_with_a_reason():
    with pytest.raises(ValueError, match=r"cache must have shape \[num_pages, page_size, width\], got \[4, 576\]"):
        layout.cache_format(torch.zeros(4, 576))
    with pytest.raises(ValueError, match=r"got torch.bfloat16 x 320"):
        layout.cache_format(torch.zeros(4, 16, 320, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="rows must be contiguous"):
        layout.cache_format(torch.zeros(4, 16, 1152, dtype=torch.bfloat16)[..., :576])
