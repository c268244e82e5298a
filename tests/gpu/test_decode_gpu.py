# SPDX-License-Identifier: Apache-2.0
"""Dense decode at real sizes on a GPU, by the kernels that are chosen for it.

A soak of random batches, CUDA graphs, batch invariance, addresses over 2^31.
"""

import os
import random
import time

import pytest
import torch
from problems import FORMATS, assert_matches, make_problem, random_lengths

from vllm_fusedmla import ops
from vllm_fusedmla.kernels import dense_decode
from vllm_fusedmla.kernels.plan import decode_plan
from vllm_fusedmla.kernels.schedule import allocate_schedule, build_schedule

HEADS = [1, 8, 12, 16, 20, 24, 32, 40, 48, 64, 96, 128]
SERVED = ["bf16", "fp8", "fp8_ds_mla"]
SOAK_SECONDS = float(os.environ.get("FUSEDMLA_SOAK_SECONDS", "20"))


def decode(problem, batch_invariant=False, **options):
    q = problem.q
    plan = decode_plan(q.shape[1], q.shape[2], problem.cache_format, q.device, batch_invariant)
    return dense_decode.mla_decode(*problem.arguments(), k_scale=problem.k_scale, plan=plan, **options)


@pytest.mark.parametrize("cache_format", FORMATS)
@pytest.mark.parametrize("h_q", HEADS)
def test_head_counts_at_full_size(h_q, cache_format):
    problem = make_problem(
        [0, 1, 64, 5000, *random_lengths(6, 3000)], h_q=h_q, s_q=random.choice([1, 2]), cache_format=cache_format,
        device="cuda",
    )  # fmt: skip
    assert_matches(problem, *decode(problem, random.random() < 0.5))


@pytest.mark.parametrize("s_q", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("page_size", [16, 32, 48, 64, 128, 256])
def test_query_lengths_and_page_sizes(s_q, page_size):
    problem = make_problem(
        random_lengths(9, 2500), h_q=random.choice([8, 16]), s_q=s_q, page_size=page_size,
        cache_format=random.choice(SERVED), device="cuda", extra_stride=random.choice([0, 128]),
    )  # fmt: skip
    assert_matches(problem, *decode(problem))


def test_soak_of_random_batches():
    """Fresh shapes and values until the time is up; each twice, for an error that moves between runs is a race."""
    end, rounds = time.monotonic() + SOAK_SECONDS, 0
    shapes = [(h, s) for h in (8, 16, 32, 64, 128) for s in (1, 2)]  # few, so that compiling does not take the time
    while time.monotonic() < end or rounds < 5:  # a busy machine is no fault
        h_q, s_q = random.choice(shapes)
        problem = make_problem(
            random_lengths(random.choice([1, 2, 5, 33, 130]), random.choice([300, 4000])), h_q=h_q, s_q=s_q,
            cache_format=random.choice(SERVED), device="cuda", spread=random.choice([0.5, 2.0, 4.0]),
        )  # fmt: skip
        batch_invariant = random.random() < 0.3
        out, lse = decode(problem, batch_invariant)
        again, lse_again = decode(problem, batch_invariant)
        assert torch.equal(out, again) and torch.equal(lse, lse_again)
        assert_matches(problem, out, lse)
        rounds += 1
    print(f"{rounds} batches")


@pytest.mark.parametrize("cache_format", SERVED)
def test_cuda_graph_follows_new_lengths_without_allocation(cache_format):
    b, h_q, s_q = 6, 16, 2
    problem = make_problem([3000] * b, h_q=h_q, s_q=s_q, cache_format=cache_format, device="cuda")
    q, cache, table, lens = problem.arguments()
    plan = decode_plan(s_q, h_q, cache_format, q.device)
    schedule = allocate_schedule(plan.params, b, "cuda")
    workspace = tuple(torch.empty(s, device="cuda") for s in plan.workspace_shapes(b, s_q, h_q))
    out = torch.empty(b, s_q, h_q, 512, dtype=q.dtype, device="cuda")
    lse = torch.empty(b, s_q, h_q, device="cuda")

    def step():
        build_schedule(lens, plan.params, out=schedule)
        dense_decode.mla_decode(
            q, cache, table, lens, k_scale=problem.k_scale, plan=plan, schedule=schedule, workspace=workspace,
            out=out, lse=lse,
        )  # fmt: skip

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        before = torch.cuda.memory_allocated()
        step()
        assert torch.cuda.memory_allocated() == before
    for new in ([3000, 0, 1, 2, 65, 1500], [0] * b, [2999] * b, random_lengths(b, 3000)):
        lens.copy_(torch.tensor(new, dtype=torch.int32))
        out.fill_(float("nan"))
        graph.replay()
        assert_matches(problem, out, lse)


def test_no_host_synchronisation():
    problem = make_problem([700, 0, 90], h_q=16, cache_format="fp8", device="cuda")
    decode(problem)  # compile first
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = decode(problem)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_matches(problem, *result)


@pytest.mark.parametrize("h_q", [16, 128])
@pytest.mark.parametrize("cache_format", SERVED)
def test_batch_invariant_bits(h_q, cache_format):
    problem = make_problem([*random_lengths(20, 4000), 9000], h_q=h_q, cache_format=cache_format, device="cuda")
    q, cache, table, lens = problem.arguments()
    options = {"k_scale": problem.k_scale, "batch_invariant": True}
    whole = ops.mla_decode(q, cache, table, lens, **options)
    for i in (0, 7, 20):
        one = ops.mla_decode(q[i : i + 1], cache, table[i : i + 1], lens[i : i + 1], **options)
        pair = [i, (i + 3) % 21]
        two = ops.mla_decode(q[pair], cache, table[pair], lens[pair], **options)
        for got in (one, two):
            assert torch.equal(got[0][0], whole[0][i]) and torch.equal(got[1][0], whole[1][i])


@pytest.mark.parametrize("cache_format", SERVED)
def test_pages_beyond_two_to_the_31(cache_format):
    problem = make_problem([200, 64], h_q=16, cache_format=cache_format, device="cuda")
    q, cache, table, lens = problem.arguments()
    dtype, width, pages = cache.dtype, cache.shape[2], 2**32 // (64 * cache.shape[2]) + 100
    large = torch.empty(pages, 64, width, dtype=dtype, device="cuda")
    moved = pages - 1 - torch.arange(cache.shape[0], device="cuda")
    large.view(torch.uint8)[moved] = cache.view(torch.uint8)
    used = table < cache.shape[0]
    table = torch.where(used, moved[torch.where(used, table, 0).long()].int(), table)
    out, lse = ops.mla_decode(q, large, table, lens, k_scale=problem.k_scale)
    assert_matches(problem, out, lse)


@pytest.mark.parametrize("is_fp8", [False, True])
def test_flash_mla_metadata_of_the_older_generation(is_fp8):
    problem = make_problem([900, 0, 4100], h_q=16, s_q=2, cache_format="fp8" if is_fp8 else "bf16", device="cuda")
    q, cache, table, lens = problem.arguments()
    metadata, num_splits = ops.get_mla_metadata(lens, q.shape[1] * q.shape[2], 1, is_fp8_kvcache=is_fp8)
    out, lse = ops.flash_mla_with_kvcache(
        q, cache.unsqueeze(2), table, lens, 512, metadata, num_splits, causal=True,
        descale_k=problem.k_scale if is_fp8 else None,
    )  # fmt: skip
    assert_matches(problem, out, lse.transpose(1, 2).masked_fill(lse.transpose(1, 2) == torch.inf, -torch.inf))


def test_schedule_shared_between_layers():
    problem = make_problem([900, 3, 4100], h_q=16, device="cuda")
    q, cache, table, lens = problem.arguments()
    schedule = ops.decode_schedule(lens, 1, 16, cache)
    assert_matches(problem, *ops.mla_decode(q, cache, table, lens, schedule=schedule))
