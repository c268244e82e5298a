# SPDX-License-Identifier: Apache-2.0
"""Portable sparse attention against the float64 reference: in Triton's interpreter on a CPU, on a GPU for real."""

import random

import pytest
import torch
from problems import FORMATS, assert_matches, random_lengths
from sparse_problems import make_sparse_problem

pytest.importorskip("triton")
from vllm_fusedmla.kernels import sparse_decode, sparse_reference  # noqa: E402
from vllm_fusedmla.kernels.select import select_sparse  # noqa: E402
from vllm_fusedmla.kernels.sparse_plan import make_sparse_plan  # noqa: E402

HEADS = [1, 8, 12, 16, 20, 24, 32, 40, 48, 64, 96, 128]


def plan_for(problem, batch_invariant=False, num_sms=3, max_splits=4):
    """A plan for a small GPU, so that small problems are split as large ones are on a large one."""
    h_q = problem.q.shape[2]
    return make_sparse_plan(select_sparse((9, 0), h_q, problem.cache_format), h_q, num_sms, batch_invariant, max_splits)


def attend(problem, q=None, **options):
    """The kernel's result; in the interpreter with a float32 `out`, because its cast to bfloat16 truncates."""
    q = problem.q if q is None else q
    if problem.q.device.type == "cpu":
        options.setdefault("out", torch.full((*problem.q.shape[:3], 512), float("nan")))
    options = {**problem.keywords(), **options}
    return sparse_decode.mla_sparse_decode(q, *problem.arguments()[1:], k_scale=problem.k_scale, **options)


def check(problem, **options):
    out, lse = attend(problem, **options)
    assert_matches(problem, out, lse)
    return out, lse


@pytest.mark.parametrize("cache_format", FORMATS)
@pytest.mark.parametrize("slots", [False, True])
@pytest.mark.parametrize("page_size", [16, 48, 64])
def test_formats_lists_and_page_sizes(cache_format, slots, page_size, device):
    problem = make_sparse_problem(
        [0, 1, *random_lengths(2, 250)], h_q=random.choice([3, 8]), s_q=random.choice([1, 2]), topk=192,
        page_size=page_size, cache_format=cache_format, device=device, slots=slots, lengths=random.random() < 0.5,
        sink=random.random() < 0.5,
    )  # fmt: skip
    check(problem, plan=plan_for(problem, num_sms=random.choice([1, 20])))


@pytest.mark.parametrize("h_q", HEADS)
def test_head_counts(h_q, device):
    cache_format = random.choice(["bf16", "fp8", "fp8_ds_mla"])
    problem = make_sparse_problem([150, 40], h_q=h_q, topk=128, cache_format=cache_format, device=device, sink=True)
    check(problem, plan=plan_for(problem, num_sms=random.choice([1, 10])))


@pytest.mark.parametrize("topk", [64, 100, 512, 2048, 2176, 2304])
def test_lists_of_every_length(topk, device):
    problem = make_sparse_problem([300, 20], h_q=2, topk=topk, device=device, slots=random.random() < 0.5, holes=0.9)
    check(problem, plan=plan_for(problem, num_sms=random.choice([1, 8])))


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_splits_of_every_size(batch_invariant, device):
    problem = make_sparse_problem([700, 0, 65], h_q=4, topk=448, device=device, lengths=True, sink=True)
    seen = set()
    for num_sms, max_splits in ((1, 1), (3, 2), (30, 7)):
        plan = plan_for(problem, batch_invariant, num_sms, max_splits)
        seen.add(plan.pieces(3, 448)[0])
        check(problem, plan=plan)
    assert min(seen) == 1 and max(seen) == 7


def test_gaps_between_pages_and_strided_queries(device):
    problem = make_sparse_problem(
        [150, 31], h_q=6, s_q=2, topk=128, page_size=16, device=device, slots=True, extra_stride=64
    )
    nope = problem.q[..., :512].permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)  # heads outermost in memory
    wide = torch.full((2, 2, 160), -1, dtype=torch.int32, device=device)
    wide[..., :128] = problem.indices
    problem.indices = wide[..., :128]
    out, lse = attend(problem, (nope, problem.q[..., 512:].contiguous()), plan=plan_for(problem))
    assert_matches(problem, out, lse)


@pytest.mark.parametrize("num_sms", [1, 40])
def test_scratch_memory_and_outputs_of_the_caller(num_sms, device):
    problem = make_sparse_problem([100, 5], h_q=4, s_q=2, topk=192, device=device)
    plan = plan_for(problem, num_sms=num_sms)
    shapes = plan.workspace_shapes(2, 2, 4)
    workspace = tuple(torch.full(shape, float("nan"), device=device) for shape in shapes)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    out = torch.full((2, 2, 4, 512), float("nan"), dtype=dtype, device=device)
    lse = torch.full((2, 2, 4), float("nan"), device=device)
    result = check(problem, plan=plan, workspace=workspace, out=out, lse=lse)
    assert result[0] is out and result[1] is lse
    scaled = attend(problem, sm_scale=0.01)
    want = problem.expected(sm_scale=0.01)
    for got, expected in zip(scaled, want, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=2.01 / 128, atol=8e-4)


@pytest.mark.parametrize("cache_format", ["bf16", "fp8_ds_mla"])
@pytest.mark.parametrize("num_sms", [1, 40])
def test_nothing_to_attend_to(cache_format, num_sms, device):
    """All holes, no entries, or all entries outside: the cache, all NaN, is not looked at."""
    problem = make_sparse_problem([0, 0], h_q=4, topk=192, cache_format=cache_format, device=device)
    beyond = problem.cache.shape[0] * problem.cache.shape[1]
    zero = torch.zeros(2, dtype=torch.int32, device=device)
    cases: list[tuple[torch.Tensor, dict]] = [
        (torch.full_like(problem.indices, -1), {}),
        (torch.full_like(problem.indices, beyond), {"block_table": None}),
        (torch.zeros_like(problem.indices), {"topk_length": zero}),
        (torch.zeros_like(problem.indices), {"block_table": problem.block_table}),  # which names no page of the cache
        (problem.indices[..., :0], {}),
    ]
    for indices, options in cases:
        problem.indices = indices
        if random.random() < 0.5:
            options["attn_sink"] = torch.tensor([0.0, -torch.inf, torch.inf, 1.0], device=device)
        out, lse = attend(problem, plan=plan_for(problem, num_sms=num_sms), **options)
        assert (out == 0).all() and (lse == -torch.inf).all()


@pytest.mark.parametrize("num_sms", [1, 40])
def test_sinks_that_take_nothing_and_everything(num_sms, device):
    problem = make_sparse_problem([150, 3], h_q=3, topk=192, device=device)
    plan = plan_for(problem, num_sms=num_sms)
    out, lse = attend(problem, plan=plan)
    sink = torch.tensor([-torch.inf, torch.inf, -torch.inf], device=device)
    with_sink, same_lse = attend(problem, plan=plan, attn_sink=sink)
    assert torch.equal(lse, same_lse) and (with_sink[:, :, 1] == 0).all()
    torch.testing.assert_close(with_sink[:, :, ::2], out[:, :, ::2], rtol=1e-6, atol=0)


def test_where_the_holes_are_does_not_matter(device):
    """The same keys in the same order, closed up or with holes between tiles and at the end: the same bits."""
    problem = make_sparse_problem([400], h_q=4, topk=192, device=device, holes=0.0)
    plan = plan_for(problem, batch_invariant=True, max_splits=1)
    out, lse = attend(problem, plan=plan)
    spread = torch.full((1, 1, 1024), -1, dtype=torch.int32, device=device)
    for tile, place in enumerate((0, 256, 512)):
        spread[..., place : place + 64] = problem.indices[..., tile * 64 : tile * 64 + 64]
    problem.indices = spread
    again, lse_again = attend(problem, plan=plan)
    assert torch.equal(out, again) and torch.equal(lse, lse_again)


def test_a_key_named_twice_counts_twice(device):
    problem = make_sparse_problem([30], h_q=2, topk=64, device=device, holes=0.5)
    problem.indices = problem.indices.repeat(1, 1, 2)
    check(problem, plan=plan_for(problem))


def test_batch_invariant_bits(device):
    problem = make_sparse_problem([333, 70, 0, 640], h_q=4, topk=320, device=device, slots=True, lengths=True)
    plan = plan_for(problem, batch_invariant=True)
    q, cache, indices = problem.arguments()
    lengths = problem.options["topk_length"]
    whole = attend(problem, plan=plan)
    for i in range(4):
        one = slice(i, i + 1)
        out = torch.empty_like(whole[0][one])
        alone = sparse_decode.mla_sparse_decode(
            q[one], cache, indices[one], topk_length=lengths[one], plan=plan, out=out
        )
        assert torch.equal(alone[0][0], whole[0][i]) and torch.equal(alone[1][0], whole[1][i])


@pytest.mark.parametrize("cache_format", FORMATS)
@pytest.mark.parametrize("num_sms", [1, 40])
def test_prefill(cache_format, num_sms, device):
    problem = make_sparse_problem(
        [200, 0, 64, 17, 300], h_q=6, topk=192, cache_format=cache_format, device=device, slots=True, lengths=True,
        sink=True,
    )  # fmt: skip
    q, kv, indices = problem.q[:, 0], problem.cache.flatten(0, 1), problem.indices[:, 0]
    if random.random() < 0.5:  # rows further apart than they need be
        kv = torch.cat([kv.view(torch.uint8)] * 2, 1).view(kv.dtype)[:, : kv.shape[1]]
    options = {**problem.options, "k_scale": problem.k_scale}
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    out = torch.full((5, 6, 512), float("nan"), dtype=dtype, device=device)
    plan = plan_for(problem, num_sms=num_sms)
    assert (plan.pieces(5, 192)[0] > 1) == (num_sms == 40)
    out, max_logits, lse = sparse_decode.mla_sparse_prefill(q, kv, indices, plan=plan, out=out, **options)
    assert_matches(problem, out.unsqueeze(1), lse.unsqueeze(1))
    want = sparse_reference.mla_sparse_prefill(q.double(), kv, indices, compute_dtype=torch.float64, **options)[1]
    assert max_logits is not None
    torch.testing.assert_close(max_logits.double(), want, rtol=8.01 / 65536, atol=2e-5)


def test_an_empty_batch(device):
    problem = make_sparse_problem([5], h_q=4, topk=64, device=device, slots=True)
    q, cache, indices = problem.arguments()
    out, lse = sparse_decode.mla_sparse_decode(q[:0], cache, indices[:0])
    assert out.shape == (0, 1, 4, 512) and lse.shape == (0, 1, 4)
    results = sparse_decode.mla_sparse_prefill(q[:0, 0], cache.flatten(0, 1), indices[:0, 0])
    assert [r.shape for r in results if r is not None] == [(0, 4, 512), (0, 4), (0, 4)]


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_plans_cover_every_list_within_their_scratch_memory(batch_invariant):
    for _ in range(200):
        h_q, num_sms = random.choice(HEADS), random.choice([1, 4, 66, 132])
        cache_format, arch = random.choice(FORMATS), random.choice([(8, 0), (8, 9), (9, 0), (12, 0)])
        plan = make_sparse_plan(select_sparse(arch, h_q, cache_format), h_q, num_sms, batch_invariant)
        tokens, topk = random.randint(1, 500), random.choice([0, 64, 512, 2048, 2176, 2304, 16384])
        pieces, piece_tiles = plan.pieces(tokens, topk)
        tile = plan.config.block_n
        assert (pieces - 1) * piece_tiles * tile < max(topk, 1) <= max(pieces * piece_tiles * tile, 1)
        assert pieces <= plan.params.max_pieces()
        assert pieces == 1 or tokens * pieces <= plan.workspace_shapes(tokens, 1, h_q)[0][0]
        if batch_invariant:
            assert (pieces, piece_tiles) == plan.pieces(1, topk)


def test_small_batches_fill_the_gpu():
    plan = make_sparse_plan(select_sparse((9, 0), 16, "fp8_ds_mla"), 16, 132, False)
    assert plan.params.num_programs == 264
    assert plan.pieces(1, 2048) == (32, 1) and plan.pieces(8, 2048) == (32, 1)
    assert plan.pieces(128, 2048) == (2, 16) and plan.pieces(4096, 2048) == (1, 32)


def test_unknown_caches_and_gpus_are_refused():
    with pytest.raises(ValueError, match="reads bf16, fp16, fp8 and fp8_ds_mla caches, not fp32"):
        select_sparse((9, 0), 16, "fp32")
    with pytest.raises(ValueError, match="no sparse attention kernel for compute capability 7.5 and 16 query heads"):
        select_sparse((7, 5), 16, "bf16")
