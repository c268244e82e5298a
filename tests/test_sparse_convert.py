# SPDX-License-Identifier: Apache-2.0
"""Rows of fp8_ds_mla caches as bfloat16, and prefill by way of them: in Triton's interpreter, on a GPU for real."""

import random

import pytest
import torch
from problems import cosine_difference

pytest.importorskip("triton")
from vllm_fusedmla.kernels import layout, select, sparse_decode, sparse_plan, sparse_reference  # noqa: E402
from vllm_fusedmla.kernels.sparse_convert import rows_to_bfloat16  # noqa: E402

HOPPER = 9, 0


def random_rows(count: int) -> torch.Tensor:
    """``[count, 656]`` uint8: any finite codes, scales that are no powers of two, some of them tiny."""
    codes = torch.randint(0, 255, (count, layout.D_V), dtype=torch.uint8)
    codes[codes & 0x7F == 0x7F] = 0
    scales = torch.rand(count, 4) * 10.0 ** torch.randint(-6, 2, (count, 4))
    rope = torch.randn(count, layout.D_ROPE).bfloat16()
    return torch.cat([codes, scales.view(torch.uint8), rope.view(torch.uint8)], 1)


def as_bfloat16(rows: torch.Tensor) -> torch.Tensor:
    return layout.unpack_rows(rows, "fp8_ds_mla", 1.0, torch.float32).bfloat16()


@pytest.mark.parametrize("page_size", [1, 64, 80])
def test_rows_of_a_request(page_size, device):
    count = random.randrange(1, 300)
    needed = -(-count // page_size)
    cache = torch.full((needed + 3, 2, page_size, layout.DS_MLA_ROW_BYTES), 0xFF, dtype=torch.uint8)[:, 1]
    pages = torch.randperm(needed + 3, dtype=torch.int32)[:needed]
    rows = random_rows(count)
    position = torch.arange(count)
    cache[pages.long()[position // page_size], position % page_size] = rows
    got = rows_to_bfloat16(cache.to(device), pages.to(device), count)
    assert torch.equal(got.cpu(), as_bfloat16(rows))


def test_rows_of_a_whole_cache(device):
    rows = random_rows(50)
    apart = torch.cat([rows, rows], 1)[:, : layout.DS_MLA_ROW_BYTES]
    for kv in (rows, apart):
        out = torch.full((50, layout.D_QK), float("nan"), dtype=torch.bfloat16, device=device)
        assert rows_to_bfloat16(kv.to(device).unsqueeze(1), None, 50, out) is out
        assert torch.equal(out.cpu(), as_bfloat16(rows))
    assert rows_to_bfloat16(rows.to(device).unsqueeze(1), None, 0).shape == (0, layout.D_QK)


def test_pages_that_are_not_there(device):
    """A table may be shorter than asked for, and its entries past a request's end may be anything."""
    rows = random_rows(3 * 64)
    cache = rows.view(3, 64, -1).to(device)
    pages = torch.tensor([2, -1, 3, 0], dtype=torch.int32, device=device)
    got = rows_to_bfloat16(cache, pages, 5 * 64).cpu().view(5, 64, -1)
    assert torch.equal(got[0], as_bfloat16(rows[128:])) and torch.equal(got[3], as_bfloat16(rows[:64]))
    assert not got[[1, 2, 4]].any()


@pytest.mark.parametrize(
    ("h_q", "cache_format", "tokens", "rows", "invariant", "converts"),
    [
        (128, "fp8_ds_mla", 1000, 64000, False, True),
        (33, "fp8_ds_mla", 1000, 64000, False, True),
        (32, "fp8_ds_mla", 1000, 64000, False, False),  # another kernel, which is as fast on the codes
        (128, "fp8_ds_mla", 1000, 64001, False, False),
        (128, "fp8_ds_mla", 511, 511, False, False),
        (128, "fp8_ds_mla", 1000, 64000, True, False),  # depends on the number of tokens
        (128, "bf16", 1000, 64000, False, False),
    ],
)
def test_when_it_pays(h_q, cache_format, tokens, rows, invariant, converts):
    config = select.select_sparse(HOPPER, h_q, cache_format, True, prefill=True)
    plan = sparse_plan.make_sparse_plan(config, h_q, 132, invariant)
    assert plan.converts(cache_format, tokens, rows) == converts


def test_a_prompt_by_way_of_converted_rows(device):
    """With scales that are powers of two nothing is rounded: the same results as on the codes, but for the kernels."""
    kv = torch.randn(300, layout.D_QK, device=device) / 4
    rows = layout.pack_rows(kv, "fp8_ds_mla")
    pages = torch.randperm(7, dtype=torch.int32, device=device)[:5]
    cache = torch.full((7, 64, rows.shape[1]), 0xFF, dtype=torch.uint8, device=device)
    position = torch.arange(300, device=device)
    cache[pages.long()[position // 64], position % 64] = rows
    q = torch.randn(9, 1, 6, layout.D_QK, dtype=torch.bfloat16, device=device)
    positions = torch.randint(-20, 300, (9, 1, 128), dtype=torch.int32, device=device)
    converted = rows_to_bfloat16(cache, pages, 300)
    assert torch.equal(converted.float(), layout.unpack_rows(rows, "fp8_ds_mla"))
    out = torch.empty(9, 1, 6, 512, dtype=torch.float32 if device == "cpu" else torch.bfloat16, device=device)
    got = sparse_decode.mla_sparse_decode(q, converted.unsqueeze(1), positions, out=out)
    table = pages.expand(9, -1)
    want = sparse_reference.mla_sparse_decode(
        q.double(), cache, positions, block_table=table, compute_dtype=torch.float64
    )
    assert cosine_difference(got[0], want[0]) < (3e-5 if device == "cpu" else 5e-6)  # the interpreter truncates weights
    torch.testing.assert_close(got[1].double(), want[1], rtol=8.01 / 65536, atol=2e-5)
