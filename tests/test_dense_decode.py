# SPDX-License-Identifier: Apache-2.0
"""Dense decode against the float64 reference: in Triton's interpreter on small shapes, on a GPU for real."""

import math
import random

import pytest
import torch
from problems import FORMATS, assert_matches, make_problem, random_lengths, write_ds_mla_rows

pytest.importorskip("triton")
from vllm_fusedmla.kernels import dense_decode, layout  # noqa: E402
from vllm_fusedmla.kernels.plan import make_plan  # noqa: E402
from vllm_fusedmla.kernels.select import select_decode  # noqa: E402

HEADS = [1, 8, 12, 16, 20, 24, 32, 40, 48, 64, 96, 128]


def plan_for(problem, batch_invariant=False, num_sms=3):
    """A plan with few programs, so that small problems are split as large ones are on a GPU."""
    rows = problem.q.shape[1] * problem.q.shape[2]
    config = select_decode((9, 0), rows, problem.cache_format)
    return make_plan(config, rows, num_sms, batch_invariant, max_splits=4)


def decode(problem, q=None, **options):
    """The kernel's result; in the interpreter with a float32 `out`, because its cast to bfloat16 truncates."""
    q = problem.q if q is None else q
    if problem.q.device.type == "cpu":
        shape = (*problem.q.shape[:3], 512)
        options.setdefault("out", torch.full(shape, float("nan")))
    return dense_decode.mla_decode(q, *problem.arguments()[1:], k_scale=problem.k_scale, **options)


def check(problem, causal=True, **options):
    out, lse = decode(problem, causal=causal, **options)
    assert_matches(problem, out, lse, causal=causal)
    return out, lse


@pytest.mark.parametrize("cache_format", FORMATS)
@pytest.mark.parametrize("s_q", [1, 2, 5])
@pytest.mark.parametrize("page_size", [16, 48, 64, 128])
def test_formats_query_lengths_and_page_sizes(cache_format, s_q, page_size, device):
    lengths = [0, 1, *random_lengths(2, 300)]
    problem = make_problem(
        lengths, h_q=random.choice([3, 8]), s_q=s_q, page_size=page_size, cache_format=cache_format, device=device
    )
    check(problem, plan=plan_for(problem))


@pytest.mark.parametrize("h_q", HEADS)
def test_head_counts(h_q, device):
    cache_format = random.choice(["bf16", "fp8", "fp8_ds_mla"])
    problem = make_problem(random_lengths(2, 200), h_q=h_q, cache_format=cache_format, device=device)
    check(problem, plan=plan_for(problem))


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_splits_of_every_size(batch_invariant, device):
    problem = make_problem([700, 0, 65, 256], h_q=4, device=device)
    for num_sms in (1, 2, 5):
        check(problem, plan=plan_for(problem, batch_invariant, num_sms))


def test_without_causality_every_row_sees_every_key(device):
    problem = make_problem([1, 2, 130], h_q=4, s_q=3, device=device)
    check(problem, causal=False, plan=plan_for(problem))


def test_rows_that_see_nothing_beside_rows_that_see_something(device):
    problem = make_problem([1, 2, 3, 4], h_q=2, s_q=4, device=device)
    _, lse = check(problem, plan=plan_for(problem))
    assert (lse[0, :3] == -torch.inf).all() and torch.isfinite(lse[0, 3]).all()


def test_pages_may_lie_apart_and_queries_may_be_strided(device):
    problem = make_problem([150, 31], h_q=6, page_size=16, device=device, extra_stride=64)
    nope = problem.q[..., :512].permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)  # heads outermost in memory
    out, lse = decode(problem, (nope, problem.q[..., 512:].contiguous()), plan=plan_for(problem))
    assert_matches(problem, out, lse)


def test_softmax_scale_and_outputs_of_the_caller(device):
    problem = make_problem([100, 5], h_q=4, device=device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    out = torch.full((2, 1, 4, 512), float("nan"), dtype=dtype, device=device)
    lse = torch.full((2, 1, 4), float("nan"), device=device)
    result = check(problem, plan=plan_for(problem), out=out, lse=lse)
    assert result[0] is out and result[1] is lse
    scaled, scaled_lse = decode(problem, sm_scale=0.01)
    assert_matches(problem, scaled, scaled_lse, sm_scale=0.01)


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_fp8_takes_queries_outside_the_range_of_float16(size, device):
    problem = make_problem([90], h_q=4, cache_format="fp8", device=device)
    problem.q = (problem.q.float() * size).to(torch.bfloat16)
    out, lse = decode(problem, sm_scale=576**-0.5 / size)
    assert_matches(problem, out, lse, sm_scale=576**-0.5 / size)


def test_fp8_scale_may_be_a_number(device):
    problem = make_problem([90, 3], h_q=4, cache_format="fp8", device=device)
    as_tensor = dense_decode.mla_decode(*problem.arguments(), k_scale=problem.k_scale)
    as_number = dense_decode.mla_decode(*problem.arguments(), k_scale=float(problem.k_scale))
    for a, b in zip(as_tensor, as_number, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("cache_format", ["fp8", "fp8_ds_mla"])
def test_every_e4m3_value_is_read_exactly(cache_format, device):
    """The output of a request with one key is that key's latent part: all codes, at both places of a pair."""
    problem = make_problem([1], h_q=4, cache_format=cache_format, device=device)
    codes = torch.arange(256, device=device).to(torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0  # NaN
    codes = torch.cat([codes, codes.roll(1)])
    row = problem.cache[problem.block_table[0, 0], 0].view(torch.uint8)
    row[:512] = codes
    scale = 1.0
    if cache_format == "fp8_ds_mla":
        scale = 0.125
        row[layout.DS_MLA_SCALES_OFFSET : layout.DS_MLA_ROPE_OFFSET] = torch.full((4,), scale).view(torch.uint8)
    problem.k_scale = 1.0
    out, _ = decode(problem, plan=plan_for(problem))
    assert torch.equal(out[0, 0, 0].double(), codes.view(torch.float8_e4m3fn).double() * scale)


def test_ds_mla_scales_of_any_size(device):
    """Scales over nine decades, side by side in a row and from row to row; the error is that of rounded weights."""
    lengths = [1, 90, 0, 200]
    problem = make_problem(lengths, h_q=4, page_size=32, cache_format="fp8_ds_mla", device=device)
    q, cache, table, lens = problem.arguments()
    slots = torch.cat([table[i, torch.arange(n) // 32] * 32 + torch.arange(n, device=device) % 32
                       for i, n in enumerate(lengths)]).long()  # fmt: skip
    scales = torch.exp(torch.empty(len(slots), 4, device=device).uniform_(math.log(1e-6), math.log(1e3)))
    values = torch.randn(len(slots), 576, device=device) * 100 * scales.repeat_interleave(144, 1)
    write_ds_mla_rows(cache, slots, torch.cat([values[:, :512], torch.randn_like(values[:, :64])], 1), scales)
    problem.q = (q.float() / 1e5).to(q.dtype)
    out, lse = decode(problem, plan=plan_for(problem))
    want, want_lse = problem.expected()
    torch.testing.assert_close(lse.double(), want_lse, rtol=8.01 / 65536, atol=1e-4)
    rows = layout.read_cache(cache, dtype=torch.float64).flatten(0, 1)[slots].split(lengths)
    for i, n in enumerate(lengths):
        scores = problem.q[i, 0].double() @ rows[i].T * 576**-0.5
        size = torch.softmax(scores, 1) @ rows[i][:, :512].abs() if n else torch.zeros(4, 512, device=device)
        assert ((out[i, 0] - want[i, 0]).abs() <= 2**-7 * size).all()  # out may be rounded too


def test_ds_mla_rows_without_keys_do_not_see_wild_scales(device):
    """Infinite and NaN scales in rows that nobody attends to, beside tokens in use."""
    problem = make_problem([17, 40], h_q=4, page_size=16, cache_format="fp8_ds_mla", device=device)
    _, cache, table, _ = problem.arguments()
    for page, first in ((int(table[0, 1]), 1), (int(table[1, 2]), 8)):
        scales = cache[page, first:, layout.DS_MLA_SCALES_OFFSET : layout.DS_MLA_ROPE_OFFSET]
        scales.copy_(torch.tensor([torch.inf, torch.nan, -torch.inf, 3e38], device=device).view(torch.uint8))
    check(problem, plan=plan_for(problem))


def test_large_scores_neither_overflow_nor_lose_the_largest(device):
    problem = make_problem([200, 64], h_q=4, device=device, spread=200.0)
    out, lse = decode(problem, plan=plan_for(problem))
    want, want_lse = problem.expected()
    assert torch.isfinite(out).all()
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(out.double(), want, rtol=2.01 / 128, atol=8e-4)


def test_batch_invariant_bits(device):
    problem = make_problem([333, 70, 0, 640], h_q=4, device=device)
    plan = plan_for(problem, batch_invariant=True)
    q, cache, table, lens = problem.arguments()
    whole = dense_decode.mla_decode(q, cache, table, lens, plan=plan)
    for i in range(4):
        alone = dense_decode.mla_decode(q[i : i + 1], cache, table[i : i + 1], lens[i : i + 1], plan=plan)
        assert torch.equal(alone[0][0], whole[0][i]) and torch.equal(alone[1][0], whole[1][i])


def test_an_empty_batch(device):
    problem = make_problem([5], h_q=4, device=device)
    q, cache, table, lens = problem.arguments()
    out, lse = dense_decode.mla_decode(q[:0], cache, table[:0], lens[:0])
    assert out.shape == (0, 1, 4, 512) and lse.shape == (0, 1, 4)
