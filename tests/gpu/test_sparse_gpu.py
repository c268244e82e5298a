# SPDX-License-Identifier: Apache-2.0
"""Sparse attention and the cache writer at real sizes on a GPU.

A soak of random batches, CUDA graphs, batch invariance, addresses over 2^31, vLLM's own writer.
"""

import dataclasses
import os
import random
import time

import pytest
import torch
from problems import CACHE_DTYPE, FORMATS, assert_matches, random_lengths
from sparse_problems import make_sparse_problem

from vllm_fusedmla.kernels import cache_write, hopper, layout, sparse_decode, sparse_reference
from vllm_fusedmla.kernels.common import device_facts
from vllm_fusedmla.kernels.hopper.variants import listed_heads
from vllm_fusedmla.kernels.select import DecodeConfig
from vllm_fusedmla.kernels.sparse_plan import make_sparse_plan, sparse_plan

HEADS = [1, 8, 12, 16, 20, 24, 32, 40, 48, 64, 96, 128]
SERVED = ["bf16", "fp8", "fp8_ds_mla"]
SOAK_SECONDS = float(os.environ.get("FUSEDMLA_SOAK_SECONDS", "20"))


KERNELS = ["chosen", "portable", "twowg_gather", "swapab_gather"]


def plan_of(problem, batch_invariant=False, kernel="chosen"):
    """A plan for the kernel of that name, where there is one for the problem; otherwise for the portable one."""
    h_q, cache_format, device = problem.q.shape[2], problem.cache_format, problem.q.device
    if kernel not in ("twowg_gather", "swapab_gather"):
        return sparse_plan(h_q, cache_format, device, batch_invariant, portable=kernel == "portable")
    arch, num_sms = device_facts(device)
    if arch != (9, 0) or not hopper.available() or cache_format == "fp8":
        pytest.skip("not on this GPU, or not for this cache")
    heads = 64
    if kernel == "swapab_gather":
        if h_q > max(listed_heads(cache_format)):
            pytest.skip("more heads than a block of it holds")
        heads = min(n for n in listed_heads(cache_format) if n >= h_q)
    config = DecodeConfig(kernel, heads, 64, 12, 0, 1, 1, 1, "forced")
    return make_sparse_plan(config, h_q, num_sms, batch_invariant)


def attend(problem, batch_invariant=False, kernel="chosen", **options):
    options = {"plan": plan_of(problem, batch_invariant, kernel), **problem.keywords(), **options}
    return sparse_decode.mla_sparse_decode(*problem.arguments(), k_scale=problem.k_scale, **options)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("cache_format", FORMATS)
@pytest.mark.parametrize("h_q", HEADS)
def test_head_counts_at_full_size(h_q, cache_format, kernel):
    problem = make_sparse_problem(
        [0, 1, 64, 5000, *random_lengths(6, 3000)], h_q=h_q, s_q=random.choice([1, 2]), topk=2048,
        cache_format=cache_format, device="cuda", slots=random.random() < 0.5, lengths=random.random() < 0.5,
        sink=random.random() < 0.5,
    )  # fmt: skip
    assert_matches(problem, *attend(problem, random.random() < 0.5, kernel))


@pytest.mark.parametrize("topk", [64, 512, 2048, 2176, 2304])
@pytest.mark.parametrize("b", [1, 8, 128])
def test_list_lengths_and_batches(topk, b):
    """With one token, a few, and enough to fill the GPU, so with many pieces a list, some, and one or two."""
    cache_format = random.choice(SERVED)
    problem = make_sparse_problem(
        [3000] + random_lengths(b - 1, 3000), h_q=16, topk=topk, page_size=random.choice([16, 48, 64, 256]),
        cache_format=cache_format, device="cuda", slots=random.random() < 0.5, extra_stride=random.choice([0, 128]),
    )  # fmt: skip
    assert_matches(problem, *attend(problem))


def test_soak_of_random_batches():
    """Fresh shapes and values until the time is up; each twice, for an error that moves between runs is a race."""
    end, rounds = time.monotonic() + SOAK_SECONDS, 0
    while time.monotonic() < end or rounds < 5:  # a busy machine is no fault
        problem = make_sparse_problem(
            random_lengths(random.choice([1, 2, 5, 33]), random.choice([300, 4000])),
            h_q=random.choice([8, 16, 32, 64, 128]), s_q=random.randint(1, 4), topk=random.choice([64, 512, 2048]),
            cache_format=random.choice(SERVED), device="cuda", slots=random.random() < 0.5,
            lengths=random.random() < 0.5, sink=random.random() < 0.5, holes=random.choice([0.0, 0.2, 0.9]),
            spread=random.choice([0.5, 2.0, 4.0]),
        )  # fmt: skip
        batch_invariant = random.random() < 0.3
        kernels = KERNELS if problem.cache_format != "fp8" else KERNELS[:2]
        kernel = random.choice(kernels if problem.q.shape[2] <= 24 else kernels[:3])
        first, second = (attend(problem, batch_invariant, kernel) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert_matches(problem, *first)
        rounds += 1
    print(f"{rounds} batches")


@pytest.mark.parametrize("cache_format", SERVED)
@pytest.mark.parametrize("b", [2, 300])
@pytest.mark.parametrize("h_q", [16, 64])
def test_cuda_graph_follows_new_lists_without_allocation(cache_format, b, h_q):
    s_q, topk = 2, 512
    problem = make_sparse_problem(
        [900] * b, h_q=h_q, s_q=s_q, topk=topk, cache_format=cache_format, device="cuda", lengths=True
    )
    other = make_sparse_problem([900] * b, h_q=h_q, s_q=s_q, topk=topk, cache_format=cache_format, device="cuda")
    plan = plan_of(problem)
    workspace = tuple(torch.empty(s, device="cuda") for s in plan.workspace_shapes(b, s_q, h_q))
    out = torch.empty(b, s_q, h_q, 512, dtype=problem.q.dtype, device="cuda")
    lse = torch.empty(b, s_q, h_q, device="cuda")
    counts = torch.full((b, s_q), topk, dtype=torch.int32, device="cuda")
    given = problem.options["topk_length"]
    counts.copy_(given.unsqueeze(1).expand(b, s_q) if given.dim() == 1 else given)
    problem.options["topk_length"] = counts

    def step():
        attend(problem, plan=plan, workspace=workspace, out=out, lse=lse)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        before = torch.cuda.memory_allocated()
        step()
        assert torch.cuda.memory_allocated() == before
    for change in ("nothing", "holes", "counts", "all"):
        if change == "holes":
            problem.indices.masked_fill_(torch.rand(b, s_q, topk, device="cuda") < 0.5, -1)
        elif change == "counts":
            counts.copy_(torch.where(torch.rand(b, s_q, device="cuda") < 0.3, 0, counts))
        elif change == "all":
            problem.cache.copy_(other.cache)
            problem.block_table.copy_(other.block_table)
            problem.indices.copy_(other.indices)
            problem.q.copy_(other.q)
            counts.fill_(topk)
            problem.score_size = other.score_size
            if cache_format == "fp8":
                problem.k_scale.copy_(other.k_scale)
        out.fill_(float("nan"))
        graph.replay()
        assert_matches(problem, out, lse)


@pytest.mark.parametrize("cache_format", SERVED)
def test_no_host_synchronisation(cache_format):
    problem = make_sparse_problem(
        [700, 0, 90], h_q=64, topk=512, cache_format=cache_format, device="cuda", lengths=True, sink=True
    )
    attend(problem)  # compile first
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = attend(problem)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_matches(problem, *result)


@pytest.mark.parametrize("h_q", [16, 128])
@pytest.mark.parametrize("cache_format", SERVED)
def test_batch_invariant_bits(h_q, cache_format):
    problem = make_sparse_problem(
        [*random_lengths(20, 4000), 3000], h_q=h_q, topk=2048, cache_format=cache_format, device="cuda"
    )
    q, cache, indices = problem.arguments()
    options = {"k_scale": problem.k_scale, "plan": plan_of(problem, True)}
    whole = attend(problem, True)
    for chosen in ([0], [20], [7, 10], list(range(13))):
        got = sparse_decode.mla_sparse_decode(
            q[chosen], cache, indices[chosen], block_table=problem.block_table[chosen], **options
        )
        assert torch.equal(got[0], whole[0][chosen]) and torch.equal(got[1], whole[1][chosen])


@pytest.mark.parametrize("cache_format", SERVED)
@pytest.mark.parametrize("slots", [False, True])
def test_rows_beyond_two_to_the_31(cache_format, slots):
    """The last pages of a cache of 4 GiB, by position and by slot; the writer puts the same bytes there."""
    h_q = random.choice([16, 64])
    problem = make_sparse_problem([200, 64], h_q=h_q, topk=128, cache_format=cache_format, device="cuda", slots=slots)
    cache, width = problem.cache, problem.cache.shape[2]
    used_pages, pages = cache.shape[0], 2**32 // (64 * width) + 100
    large = torch.empty(pages, 64, width, dtype=cache.dtype, device="cuda")
    first = pages - used_pages
    large.view(torch.uint8)[first:] = cache.view(torch.uint8)
    if slots:
        inside = (problem.indices >= 0) & (problem.indices < used_pages * 64)
        moved = {"indices": torch.where(inside, problem.indices + first * 64, problem.indices.clamp_max(-1))}
    else:
        table = problem.block_table
        moved = {"block_table": torch.where(table < used_pages, table + first, table)}
    out, lse = attend(dataclasses.replace(problem, cache=large, **moved))
    assert_matches(problem, out, lse)  # on the small cache, for the reference converts all of it

    kv = torch.randn(3, 576, dtype=torch.bfloat16, device="cuda")
    slot = torch.tensor([pages * 64 - 1, first * 64, pages * 64], device="cuda")
    cache_write.write_cache(kv[:, :512], kv[:, 512:], large, slot, problem.k_scale)
    rows = layout.pack_rows(kv[:2], cache_format, problem.k_scale).view(torch.uint8)
    written = torch.stack([large[-1, -1].view(torch.uint8), large[first, 0].view(torch.uint8)])
    assert torch.equal(written, rows)


@pytest.mark.parametrize("cache_format", ["bf16", "fp8_ds_mla"])
@pytest.mark.parametrize("h_q", [16, 64, 128])
@pytest.mark.parametrize("s", [5, 700])
def test_prefill(cache_format, h_q, s):
    problem = make_sparse_problem(
        random_lengths(s, 700), h_q=h_q, topk=512, cache_format=cache_format, device="cuda", slots=True, lengths=True,
        sink=True,
    )  # fmt: skip
    q, kv, indices = problem.q[:, 0], problem.cache.flatten(0, 1), problem.indices[:, 0]
    out, max_logits, lse = sparse_decode.mla_sparse_prefill(q, kv, indices, **problem.options)
    assert_matches(problem, out.unsqueeze(1), lse.unsqueeze(1))
    want = sparse_reference.mla_sparse_prefill(q.double(), kv, indices, compute_dtype=torch.float64, **problem.options)[
        1
    ]
    assert max_logits is not None
    torch.testing.assert_close(max_logits.double(), want, rtol=8.01 / 65536, atol=2e-5)
    out, max_logits, lse = sparse_decode.mla_sparse_prefill(q, kv, indices, with_max_logits=False, **problem.options)
    assert max_logits is None
    assert_matches(problem, out.unsqueeze(1), lse.unsqueeze(1))


def test_more_tokens_than_a_grid_is_high():
    """70000 tokens: the second and third dimension of a CUDA grid end at 65535."""
    kv = torch.randn(300, 576, dtype=torch.bfloat16, device="cuda")
    q = torch.randn(70000, 1, 576, dtype=torch.bfloat16, device="cuda")
    indices = torch.randint(-50, 300, (70000, 64), dtype=torch.int32, device="cuda")
    got = sparse_decode.mla_sparse_prefill(q, kv, indices)
    want = sparse_reference.mla_sparse_prefill(q, kv, indices)
    torch.testing.assert_close(got[0], want[0], rtol=2.01 / 128, atol=2e-2)  # values of size 1, not 0.1
    for a, b in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=8.01 / 65536, atol=2e-5)


@pytest.mark.parametrize("cache_format", SERVED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_writer_against_the_plain_one_for_many_tokens(cache_format, dtype):
    width = 656 if cache_format == "fp8_ds_mla" else 576
    cache = torch.zeros(200, 64, width, device="cuda").to(CACHE_DTYPE[cache_format])
    want = cache.clone()
    kv = (torch.randn(9000, 576, device="cuda") * torch.exp(3 * torch.randn(9000, 1, device="cuda"))).to(dtype)
    slots = torch.randperm(200 * 64, device="cuda")[:9000]
    slots[torch.rand(9000, device="cuda") < 0.1] = -1
    k_scale = torch.tensor(0.037, device="cuda")
    layout.write_cache(kv, slots, want, k_scale)
    cache_write.write_cache(kv[:, :512], kv[:, 512:], cache, slots, k_scale)
    assert torch.equal(cache.view(torch.uint8), want.view(torch.uint8))


def test_writer_against_vllm():
    ops = pytest.importorskip("vllm._custom_ops")
    kv = (torch.randn(5000, 576, device="cuda") * torch.exp(3 * torch.randn(5000, 1, device="cuda"))).bfloat16()
    latent, rope = kv[:, :512].contiguous(), kv[:, 512:].contiguous()
    ours, theirs = (torch.zeros(100, 64, 656, dtype=torch.uint8, device="cuda") for _ in range(2))
    slots = torch.randperm(6400, device="cuda")[:5000]
    slots[::7] = -1
    scale = torch.ones((), device="cuda")
    ops.concat_and_cache_mla(latent, rope, theirs, slots, "fp8_ds_mla", scale)
    scales = theirs[..., layout.DS_MLA_SCALES_OFFSET : layout.DS_MLA_ROPE_OFFSET].contiguous().view(torch.int32)
    if (scales & 0x7FFFFF).any():
        pytest.skip("this vLLM writes scales that are no powers of two")
    cache_write.write_ds_mla(latent, rope, ours, slots)
    assert torch.equal(ours, theirs)
