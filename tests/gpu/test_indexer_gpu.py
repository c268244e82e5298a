# SPDX-License-Identifier: Apache-2.0
"""Indexer scores and top-k at real sizes on a GPU: programs that wait for each other, graphs, vLLM's own operations."""

import os
import random
import time

import pytest
import torch
from indexer_problems import (
    VALUES,
    assert_scores,
    assert_selects_the_best,
    check_paged,
    check_ragged,
    check_topk,
    make_problem,
    make_values,
    ragged_problem,
)
from problems import random_lengths

from vllm_fusedmla.kernels import hopper, indexer, indexer_layout, indexer_write, topk
from vllm_fusedmla.kernels import indexer_reference as reference
from vllm_fusedmla.kernels.hopper import topk as hopper_topk

SOAK_SECONDS = float(os.environ.get("FUSEDMLA_SOAK_SECONDS", "20"))
DEVICE = torch.device("cuda")


def vllm_ops():
    """vLLM's compiled operations; skips where vLLM or this build of it has none."""
    ops = pytest.importorskip("vllm._custom_ops")
    if not hasattr(torch.ops._C_cache_ops, "indexer_k_quant_and_cache"):
        pytest.skip("this vLLM has no indexer operations")
    return ops


def lengths(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("heads", [1, 8, 16, 32, 40, 64])
@pytest.mark.parametrize("s_q", [1, 2, 4, 5])
def test_paged_scores_at_full_size(heads, s_q):
    problem = make_problem([0, 1, 64, 9000, *random_lengths(6, 5000)], heads=heads, s_q=s_q, device="cuda")
    check_paged(problem, 9024)


@pytest.mark.parametrize("page_size", [16, 48, 64, 128])
def test_page_sizes_and_pages_that_lie_apart(page_size):
    problem = make_problem(random_lengths(9, 2500), page_size=page_size, device="cuda", extra_stride=128)
    check_paged(problem, 2560)


def test_more_requests_than_programs_and_one_long_request():
    check_paged(make_problem(random_lengths(900, 200), heads=8, device="cuda"), 256)
    check_paged(make_problem([131072], heads=64, device="cuda"), 131072)


@pytest.mark.parametrize("max_len", [None, 4000])
def test_ragged_scores_of_chunked_prefill(max_len):
    ranges = [(0, n) for n in range(100, 700, 3)] + [(700, 700 + n) for n in range(0, 3300, 10)]
    check_ragged(ragged_problem(ranges, 4000, 64, "cuda"), max_len=max_len)


@pytest.mark.parametrize("rows", [1, 2, 5, 8, 32, 40, 132, 300])
@pytest.mark.parametrize("n", [2049, 32768, 131072])
def test_topk_at_full_size(rows, n):
    x = make_values(random.choice(VALUES), rows, n).cuda()
    ends = lengths([n] + [random.randint(0, n) for _ in range(rows - 1)])
    for k in (512, 2048, 2304):
        check_topk(x, ends, k)


@pytest.mark.parametrize("kind", VALUES)
def test_topk_of_any_values_with_many_programs(kind):
    x = make_values(kind, 3, 60_000).cuda()
    for parts in (1, 2, 7, 44):
        check_topk(x, lengths([60_000, 59_999, 3000]), 2048, parts=parts)


needs_clusters = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0) or not hopper.available(),
    reason="needs a Hopper GPU and its compiled kernels",
)
SHAPES = [(1, 131072), (3, 262144), (8, 131072), (17, 40_000), (33, 131072), (140, 9000)]


@needs_clusters
@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize(
    ("rows", "n"), [(1, 131072), (3, 262144), (8, 131072), (17, 40_000), (33, 131072), (140, 9000)]
)
def test_topk_by_clusters(kind, rows, n):
    """The CUDA kernel: few rows in many blocks, many in few; all of a row's best together; nearly equal values."""
    x = make_values(kind, rows, n).cuda()
    x[0, n // 2 : n // 2 + 2048] = torch.randn(2048).abs().cuda() + 100
    ends = lengths([n] + [random.choice([random.randint(0, n), 0, -3, n + 7, 2048, 2049]) for _ in range(rows - 1)])
    for k in (1, 512, 2048, 2304):
        assert hopper_topk.takes(x, k)
        check_topk(x, ends, k)
    buffer = torch.full((rows + 2, 600), 77, dtype=torch.int32, device=DEVICE)
    topk.topk_indices(x, ends, 512, out=buffer[1:-1, :512])
    assert torch.equal(buffer[1:-1, :512], reference.topk_indices(x, ends, 512))
    assert (buffer[:, 512:] == 77).all() and (buffer[0] == 77).all() and (buffer[-1] == 77).all()


@needs_clusters
@pytest.mark.parametrize("s_q", [2, 4])
def test_topk_by_clusters_for_several_rows_a_request(s_q):
    lens = [random.randint(0, 70_000) for _ in range(5)]
    x = torch.randn(5 * s_q, 70_016, device=DEVICE)
    each = lengths([max(n - s_q + 1 + i, 0) for n in lens for i in range(s_q)])
    assert torch.equal(topk.topk_indices(x, lengths(lens), 2048), reference.topk_indices(x, each, 2048))


@needs_clusters
def test_topk_by_clusters_in_a_graph():
    x, ends = torch.empty(4, 50_048, device=DEVICE), lengths([50_048, 30_000, 5, 2048])
    out = torch.empty(4, 2048, dtype=torch.int32, device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    topk.topk_indices(x.normal_(), ends, 2048, out=out)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        topk.topk_indices(x, ends, 2048, out=out)
    for _ in range(3):
        x.normal_()
        graph.replay()
        assert torch.equal(out, reference.topk_indices(x, ends, 2048))


def test_programs_of_a_row_meet_again_and_again():
    """One workspace for launches of all shapes, without a pause: a counter not made ready would hang or corrupt."""
    workspace = topk.topk_workspace(132, DEVICE)
    cases = []
    for _ in range(40):
        rows, n = random.choice([1, 3, 16, 60]), random.choice([3000, 20_000, 100_000])
        x, ends = torch.randn(rows, n, device=DEVICE), lengths([random.randint(0, n) for _ in range(rows)])
        cases.append((x, ends, reference.topk_indices(x, ends, 1024)))
    for _ in range(5):
        results = [
            topk.topk_indices(
                x, ends, 1024, workspace=workspace, parts=topk.programs_per_row(x.shape[0], x.shape[1], DEVICE)
            )
            for x, ends, _ in cases
        ]
        for result, (_, _, want) in zip(results, cases, strict=True):
            assert torch.equal(result, want)


def test_two_streams_with_a_workspace_each():
    streams = [torch.cuda.Stream() for _ in range(2)]
    spaces = [topk.topk_workspace(1, DEVICE) for _ in streams]
    x = torch.randn(2, 1, 100_000, device=DEVICE)
    ends = lengths([100_000])
    results = []
    torch.cuda.synchronize()
    for _ in range(50):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results.append((i, topk.topk_indices(x[i], ends, 2048, workspace=spaces[i], parts=64)))
    torch.cuda.synchronize()
    want = [reference.topk_indices(x[i], ends, 2048) for i in range(2)]
    assert all(torch.equal(result, want[i]) for i, result in results)


def test_soak_from_scores_to_indices():
    end, rounds = time.monotonic() + SOAK_SECONDS, 0
    while time.monotonic() < end or rounds < 5:  # a busy machine is no fault
        lens = random_lengths(random.choice([1, 2, 5, 33]), random.choice([300, 9000]))
        problem = make_problem(lens, heads=random.choice([32, 64]), s_q=random.choice([1, 2]), device="cuda")
        max_len = 9024
        logits = indexer.index_logits_paged(*problem.arguments(max_len), clean=False)
        got = topk.topk_indices(logits, problem.seq_lens, 1024)
        again = indexer.index_logits_paged(*problem.arguments(max_len), clean=False)
        assert torch.equal(got, topk.topk_indices(again, problem.seq_lens, 1024))
        assert_selects_the_best(problem, got, max_len)
        rounds += 1
    print(f"{rounds} batches")


def test_cuda_graph_follows_new_lengths_without_allocation():
    b, max_len, k = 6, 8192, 1024
    problem = make_problem([8000] * b, heads=64, device="cuda")
    workspace = topk.topk_workspace(b, DEVICE)
    logits = indexer.empty_logits(b, max_len, DEVICE)
    indices = torch.empty(b, k, dtype=torch.int32, device=DEVICE)

    def step():
        indexer.index_logits_paged(*problem.arguments(max_len), clean=False, out=logits)
        topk.topk_indices(logits, problem.seq_lens, k, out=indices, workspace=workspace)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        before = torch.cuda.memory_allocated()
        step()
        assert torch.cuda.memory_allocated() == before
    for new in ([8000, 0, 1, 2, 65, 1500], [0] * b, [7999] * b, random_lengths(b, 8000)):
        problem.seq_lens.copy_(lengths(new))
        indices.fill_(77)
        logits.fill_(float("nan"))
        graph.replay()
        assert_selects_the_best(problem, indices, max_len)


def test_no_host_synchronisation():
    problem = make_problem([700, 0, 9000], device="cuda")
    keys, slots = torch.randn(8, 128, device=DEVICE), torch.full((8,), -1, device=DEVICE)
    workspace = topk.topk_workspace(3, DEVICE)

    def step():
        indexer_write.write_index_cache(keys, problem.cache, slots)
        logits = indexer.index_logits_paged(*problem.arguments(9024))
        return topk.topk_indices(logits, problem.seq_lens, 512, workspace=workspace)

    step()  # compile first
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_selects_the_best(problem, got, 9024)


def test_pages_beyond_two_to_the_31():
    problem = make_problem([200, 64], heads=8, device="cuda")
    pages = 2**32 // (64 * 132) + 100
    large = torch.empty(pages, 64, 132, dtype=torch.uint8, device=DEVICE)
    moved = pages - 1 - torch.arange(problem.cache.shape[0], device=DEVICE)
    large[moved] = problem.cache
    used = problem.block_table < problem.cache.shape[0]
    table = torch.where(used, moved[torch.where(used, problem.block_table, 0).long()].int(), problem.block_table)
    want = check_paged(problem, 256)
    assert torch.equal(
        indexer.index_logits_paged(problem.q, large, problem.weights, problem.seq_lens, table, 256), want
    )
    keys = torch.randn(3, 128, device=DEVICE)
    slots = torch.tensor([pages * 64 - 1, pages * 64 - 64, 5], device=DEVICE)
    indexer_write.write_index_cache(keys, large, slots)
    codes, scales = indexer_layout.page_views(large)
    new_codes, new_scales = indexer_layout.quantise_keys(keys)
    assert torch.equal(codes[slots // 64, slots % 64], new_codes.view(torch.uint8))
    assert torch.equal(scales[slots // 64, slots % 64], new_scales)


def test_written_bytes_are_those_of_vllm():
    ops = vllm_ops()
    keys = (torch.randn(5000, 128, device=DEVICE) * torch.exp(torch.randn(5000, 1, device=DEVICE) * 3)).bfloat16()
    slots = torch.randperm(90 * 64, device=DEVICE)[:5000]
    slots[::7] = -1
    ours, theirs = torch.zeros(2, 90, 64, 132, dtype=torch.uint8, device=DEVICE)
    indexer_write.write_index_cache(keys, ours, slots)
    ops.indexer_k_quant_and_cache(keys, theirs, slots, 128, "ue8m0")
    assert torch.equal(ours, theirs)


def test_gathered_keys_are_those_of_vllm():
    ops = vllm_ops()
    problem = make_problem([200, 0, 1000], device="cuda")
    bounds = lengths([0, 200, 200, 1200])
    k = torch.empty(1200, 128, dtype=torch.float8_e4m3fn, device=DEVICE)
    k_scales = torch.empty(1200, 4, dtype=torch.uint8, device=DEVICE)
    ops.cp_gather_indexer_k_quant_cache(problem.cache, k, k_scales, problem.block_table.clamp(max=1), bounds)
    table = problem.block_table.clamp(max=1)
    want, want_scales = reference.gather_index_cache(problem.cache, table, bounds)
    assert torch.equal(k.view(torch.uint8), want.view(torch.uint8))
    assert torch.equal(k_scales.view(torch.int32).flatten(), want_scales.view(torch.int32))  # unused pages hold NaN


def test_topk_selects_what_vllm_selects():
    ops = vllm_ops()
    logits = torch.randn(6, 40_000, device=DEVICE)  # no equal values: two implementations must agree on the set
    logits = logits.flatten().sort().indices.argsort().view(6, 40_000).float()
    ends = lengths([40_000, 39_999, 3000, 2048, 100, 0])
    theirs = torch.full((6, 2048), -1, dtype=torch.int32, device=DEVICE)
    ops.top_k_per_row_decode(logits, 1, ends, theirs, 6, logits.stride(0), 1, 2048)
    ours = topk.topk_indices(logits, ends, 2048)
    for row in range(6):
        assert sorted(theirs[row][theirs[row] >= 0].tolist()) == ours[row][ours[row] >= 0].tolist()
    starts = lengths([0, 500, 0, 2000, 5, 0])
    theirs.fill_(-1)
    ops.top_k_per_row_prefill(logits, starts, ends, theirs, 6, logits.stride(0), 1, 2048)
    ours = topk.topk_indices(logits, (starts, ends), 2048)
    for row in range(6):
        assert sorted(theirs[row][theirs[row] >= 0].tolist()) == ours[row][ours[row] >= 0].tolist()


@pytest.mark.parametrize("heads", [32, 64])
def test_scores_are_those_of_deepgemm(heads):
    vllm_ops()
    peer = pytest.importorskip("vllm.utils.deep_gemm")
    if not peer.has_deep_gemm():
        pytest.skip("this vLLM has no DeepGEMM")
    problem = make_problem([5000, 64, 1], heads=heads, device="cuda")
    lens = problem.seq_lens.unsqueeze(1)
    sms = torch.cuda.get_device_properties(DEVICE).multi_processor_count
    table = torch.where(problem.block_table < problem.cache.shape[0], problem.block_table, 0)
    options = {"clean_logits": False} if "clean_logits" in peer.fp8_fp4_paged_mqa_logits.__annotations__ else {}
    try:
        plan = peer.get_paged_mqa_logits_metadata(lens, 64, sms)
        cache = problem.cache.unsqueeze(2)
        theirs = peer.fp8_fp4_paged_mqa_logits(
            (problem.q, None), cache, problem.weights, lens, table, plan, max_model_len=5056, **options
        )
    except (RuntimeError, AssertionError) as error:
        pytest.skip(f"DeepGEMM compiles at run time, and cannot here: {error}")
    unseen = torch.arange(5056, device=DEVICE) >= lens
    want = reference.index_logits_paged(*problem.arguments(5056), compute_dtype=torch.float64)
    for got in (theirs.float()[:, :5056], indexer.index_logits_paged(*problem.arguments(5056), clean=False)):
        assert_scores(got.masked_fill(unseen, -torch.inf), want, problem.sizes(5056))
