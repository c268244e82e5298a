# SPDX-License-Identifier: Apache-2.0
"""The indexer: scores against a float64 reference on the same quantised inputs, its key cache byte for byte."""

import dataclasses
import math
import random

import pytest
import torch
from problems import random_lengths

pytest.importorskip("triton")
from indexer_problems import (  # noqa: E402
    assert_scores,
    assert_selects_the_best,
    check_paged,
    check_ragged,
    make_problem,
    ragged_problem,
    ragged_sizes,
)

from vllm_fusedmla.kernels import indexer, indexer_layout, indexer_write, topk  # noqa: E402
from vllm_fusedmla.kernels import indexer_reference as reference  # noqa: E402

HEADS = [1, 8, 12, 32, 40, 64]


@pytest.mark.parametrize("fp8", [True, False])
@pytest.mark.parametrize("s_q", [1, 2, 5])
@pytest.mark.parametrize("page_size", [16, 48, 64, 128])
def test_paged_query_lengths_and_page_sizes(page_size, s_q, fp8, device):
    lens = [0, 1, random.randint(270, 330), *random_lengths(1, 250)]
    problem = make_problem(lens, heads=random.choice([3, 8]), s_q=s_q, page_size=page_size, device=device)
    config = indexer.IndexerConfig(fp8, min(s_q, 2), 64, 4, 3, 1)
    check_paged(problem, random.choice([200, 256, 300]), config=config)  # 200 cuts long requests off


@pytest.mark.parametrize("fp8", [True, False])
@pytest.mark.parametrize("heads", HEADS)
def test_head_counts(heads, fp8, device):
    problem = make_problem([70, 200], heads=heads, device=device)
    check_paged(problem, 201, config=indexer.IndexerConfig(fp8, 1, 64, 4, 3, 1))


@pytest.mark.parametrize("programs_per_sm", [1, 2, 7])
def test_shares_of_every_size(programs_per_sm, device):
    problem = make_problem([700, 0, 0, 65, 64, 0, 300, 0], heads=4, device=device)
    config = dataclasses.replace(indexer.select_indexer((9, 0), "paged"), programs_per_sm=programs_per_sm)
    check_paged(problem, 704, config=config)


def test_lengths_of_each_row(device):
    """As vLLM gives them for several tokens a request; rows that see nothing beside rows that do."""
    problem = make_problem([90, 200, 3], heads=8, s_q=3, device=device)
    per_row = torch.tensor([[88, 89, 90], [0, 200, 17], [0, 0, 0]], dtype=torch.int32, device=device)
    check_paged(dataclasses.replace(problem, seq_lens=per_row), 208)
    check_paged(problem, 208)
    same = problem.seq_lens.unsqueeze(1) - torch.tensor([2, 1, 0], dtype=torch.int32, device=device)
    a = indexer.index_logits_paged(*dataclasses.replace(problem, seq_lens=same).arguments(208))
    assert torch.equal(a, indexer.index_logits_paged(*problem.arguments(208)))


@pytest.mark.parametrize("s_q", [1, 2])
def test_lengths_as_a_column(s_q, device):
    problem = make_problem([90, 31, 70], heads=8, s_q=s_q, device=device)
    column = torch.stack([torch.full_like(problem.seq_lens, 5), problem.seq_lens], 1)[:, 1:]
    check_paged(dataclasses.replace(problem, seq_lens=column), 96)


def test_pages_may_lie_apart(device):
    check_paged(make_problem([150, 31], heads=6, page_size=16, device=device, extra_stride=64), 160)


def test_without_cleaning_other_columns_are_not_written(device):
    problem = make_problem([150, 0, 64], heads=6, s_q=2, device=device)
    out = torch.full((6, 192), 77.0, device=device)[:, :170]
    got = indexer.index_logits_paged(*problem.arguments(170), clean=False, out=out)
    assert got is out
    lens = reference.row_lengths(problem.seq_lens, 2)
    unseen = torch.arange(170, device=device) >= lens.unsqueeze(1)
    assert (out[unseen] == 77.0).all() and (out.as_strided((6, 192), (192, 1))[:, 170:] == 77.0).all()
    want = reference.index_logits_paged(*problem.arguments(170), compute_dtype=torch.float64)
    assert_scores(out.masked_fill(unseen, -math.inf), want, problem.sizes(170))


def test_rows_of_an_allocated_result_are_aligned(device):
    got = indexer.index_logits_paged(*make_problem([5, 70], heads=4, device=device).arguments(71))
    assert got.shape == (2, 71) and got.stride() == (128, 1)


def test_an_empty_batch(device):
    problem = make_problem([5], heads=4, device=device)
    arguments = problem.q[:0], problem.cache, problem.weights[:0], problem.seq_lens[:0], problem.block_table[:0]
    assert indexer.index_logits_paged(*arguments, 64).shape == (0, 64)


@pytest.mark.parametrize("max_len", [None, 130, 300])
@pytest.mark.parametrize("fp8", [True, False])
@pytest.mark.parametrize("block_r", [1, 3])
def test_ragged(block_r, fp8, max_len, device):
    """Two requests end to end, causal; empty ranges, and one that begins where the other ends."""
    ranges = [
        (0, 0),
        *((0, n) for n in (1, 64, 65, 100)),
        *((100, 100 + n) for n in (0, 1, 90, 150)),
        (7, 3),
        (99, 101),
    ]
    problem = ragged_problem(ranges, 250, random.choice([5, 32]), device)
    config = indexer.IndexerConfig(fp8, block_r, 64, 4, 2, 1)
    check_ragged(problem, max_len=max_len, config=config)


def test_ragged_ranges_out_of_bounds_and_without_cleaning(device):
    problem = ragged_problem([(-3, 20), (50, 9999), (80, 90)], 70, 8, device)
    out = torch.full((3, 70), 77.0, device=device)
    indexer.index_logits_ragged(*problem, clean=False, out=out)
    want = reference.index_logits_ragged(*problem, compute_dtype=torch.float64)
    assert torch.equal(out == 77.0, want == -math.inf)
    assert_scores(out.masked_fill(out == 77.0, -math.inf), want, ragged_sizes(*problem))


def test_both_kernels_agree_on_gathered_keys(device):
    lens = [70, 0, 33]
    problem = make_problem(lens, heads=16, page_size=16, device=device)
    bounds = torch.tensor([0, 70, 70, 103], dtype=torch.int32, device=device)
    k, k_scales = reference.gather_index_cache(problem.cache, problem.block_table, bounds)
    ragged = indexer.index_logits_ragged(
        problem.q.flatten(0, 1), k, k_scales, problem.weights, bounds[:-1], bounds[1:], max_len=70
    )
    # They add up in different orders, so each may be its own rounding away from the exact scores.
    assert_scores(ragged, indexer.index_logits_paged(*problem.arguments(70)).double(), 2 * problem.sizes(70))


def test_selected_keys(device):
    problem = make_problem([1500, 40], heads=32, device=device)
    got = topk.topk_indices(check_paged(problem, 1536), problem.seq_lens, 256)
    assert_selects_the_best(problem, got, 1536)


def edge_keys() -> torch.Tensor:
    """Largest values on both sides of where the scale doubles, ties in rounding, subnormal codes, zeros."""
    keys = torch.randn(60, 128) * torch.exp(torch.randn(60, 1) * 4)
    for i, top in enumerate((448.0, 449.0, 447.0, 224.0, 7 * 2.0**-20, 1e-4, 9e-5, 0.0, 1e30)):
        keys[i] = keys[i].clamp(-1, 1) * top
        keys[i, 5] = -top
    codes = torch.arange(0, 127).to(torch.uint8).view(torch.float8_e4m3fn).float()
    keys[10, :127] = codes
    keys[10, 127] = 448
    keys[11, :126] = (codes[1:] + codes[:-1]) / 2  # halfway between codes
    keys[11, 126:] = 448
    keys[12] = keys[11] * -(2.0**-9)
    return keys


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_written_bytes(dtype, device):
    keys = edge_keys().to(dtype)
    keys[keys.isinf()] = 1.0
    want = torch.full((6, 16 * 132 + 48), 0xAB, dtype=torch.uint8)
    got = want.to(device)
    caches = [store[:, : 16 * 132].unflatten(1, (16, 132)) for store in (want, got)]
    slots = torch.randperm(96)[:60]
    slots[[3, 59]] = -1
    padded = torch.cat([keys, torch.full((4, 128), math.nan, dtype=dtype)]).to(device)  # rows without a slot
    wide = torch.cat([padded, padded], 1)[:, :128]
    reference.write_index_cache(keys, caches[0], slots)
    indexer_write.write_index_cache(wide, caches[1], slots.to(device))
    assert torch.equal(got.cpu(), want)
    assert (want[:, 16 * 132 :] == 0xAB).all()
    for i in (0, 3, 8, 10, 30):  # by hand: codes first, then scales, in the page of the slot
        if slots[i] < 0:
            continue
        page = want[slots[i] // 16]
        offset = int(slots[i] % 16)
        scale = page[16 * 128 + 4 * offset :][:4].view(torch.float32).item()
        codes = page[128 * offset :][:128].view(torch.float8_e4m3fn).float()
        largest = max(keys[i].float().abs().max().item(), 1e-4)
        assert math.log2(scale).is_integer() and largest / 448 <= scale < 2 * largest / 448 * (1 + 1e-6)
        assert torch.equal(codes, (keys[i].float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float())


def test_gathered_keys_are_those_written(device):
    keys = torch.randn(50, 128, device=device)
    cache = torch.zeros(8, 16, 132, dtype=torch.uint8, device=device)
    table = torch.tensor([[5, 2, 99999], [1, 99999, 99999], [7, 0, 99999]], dtype=torch.int32, device=device)
    offset = torch.arange(32, device=device) % 16
    slots = torch.cat([table[i, :2].repeat_interleave(16)[:n] * 16 + offset[:n] for i, n in ((0, 20), (2, 30))])
    indexer_write.write_index_cache(keys, cache, slots)
    k, k_scales = reference.gather_index_cache(cache, table, torch.tensor([0, 20, 20, 50]))
    want, want_scales = indexer_layout.quantise_keys(keys)
    assert torch.equal(k.view(torch.uint8), want.view(torch.uint8)) and torch.equal(k_scales, want_scales)


def test_wrong_caches_are_refused_with_a_reason():
    with pytest.raises(ValueError, match=r"must be \[num_pages, page_size, 132\] uint8, got \[4, 64, 128\]"):
        indexer_layout.page_views(torch.zeros(4, 64, 128, dtype=torch.uint8))
    with pytest.raises(ValueError, match="pages must be contiguous"):
        indexer_layout.page_views(torch.zeros(4, 64, 264, dtype=torch.uint8)[..., :132])
    with pytest.raises(ValueError, match="multiples of 16 bytes, got stride 2116"):
        indexer.page_words(torch.zeros(4, 2116, dtype=torch.uint8)[:, :2112].unflatten(1, (16, 132)), torch.uint8)
    with pytest.raises(ValueError, match="multiples of 4 bytes"):
        indexer_layout.page_views(torch.zeros(4, 2113, dtype=torch.uint8)[:, :2112].unflatten(1, (16, 132)))
    with pytest.raises(ValueError, match="needs compute capability 8.0"):
        indexer.select_indexer((7, 5), "paged")
