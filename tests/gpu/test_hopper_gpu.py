# SPDX-License-Identifier: Apache-2.0
"""Every kernel, the Hopper ones and the portable one, on shapes it might never be chosen for; streams and graphs."""

import random

import forced
import pytest
import torch
from problems import assert_matches, make_problem, random_lengths

from vllm_fusedmla import ops
from vllm_fusedmla.kernels import dense_decode, hopper, plan
from vllm_fusedmla.kernels.common import device_facts
from vllm_fusedmla.kernels.select import few_rows

ON_HOPPER = [name for name in forced.KERNELS if name not in forced.PORTABLE]
ONE_OF_EACH = [
    "swapab_bf16_n16",
    "swapab_fp8_ds_mla_n32",
    "twowg_fp8_c1",
    "twowg_fp8_ds_mla",
    "twowg_e4m3_c1",
    "twowg_bf16_c1",
    "twowg_fp16_c2",
]


@pytest.fixture(autouse=True)
def counters_are_left_at_zero():
    if not forced.is_hopper() or not hopper.available():
        pytest.skip(hopper.unavailable() or "needs a GPU of compute capability 9.0")
    yield
    from vllm_fusedmla.kernels.hopper.launch import counter_pool

    torch.cuda.synchronize()
    for chunk in counter_pool(torch.cuda.current_device()).chunks:
        assert not chunk.any()


def run(name, problem, q=None, batch_invariant=False, **options):
    s_q, h_q = problem.q.shape[1:3]
    made = forced.plan_of(name, s_q * h_q, problem.q.device, batch_invariant)
    q = problem.q if q is None else q
    return dense_decode.mla_decode(q, *problem.arguments()[1:], k_scale=problem.k_scale, plan=made, **options)


def strided(q):
    """The query's parts as vLLM passes them: heads outermost in memory, and a slice of something wider."""
    latent = q[..., :512].permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    wide = torch.full((*q.shape[:3], 136), float("nan"), dtype=q.dtype, device=q.device)
    wide[..., 64:128] = q[..., 512:]
    return latent, wide[..., 64:128]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", [name for name in ON_HOPPER if not forced.rounds(name)])
def test_scores_that_rise(name):
    """By so much that what weights are related to has to move with almost every tile."""
    problem = forced.random_problem(name, lengths=[random.randint(1, 4000) for _ in range(3)], rise=200.0)
    forced.assert_right(name, problem, *run(name, problem))


@pytest.mark.parametrize("name", [name for name in ON_HOPPER if "ds_mla" in name])
def test_scales_far_from_each_other(name):
    problem = forced.random_problem(name, lengths=[random.randint(1, 4000) for _ in range(3)], wide_scales=True)
    forced.assert_right(name, problem, *run(name, problem))


@pytest.mark.parametrize("name", forced.KERNELS)
def test_random_shapes_twice(name):
    """Twice, for an error that moves between runs is a race."""
    for _ in range(2 if name in forced.PORTABLE else 5):  # each shape of a portable one is compiled
        problem = forced.random_problem(name)
        q = random.choice([lambda q: q, strided])(problem.q)
        causal = random.random() < 0.7
        options = {"causal": causal, "batch_invariant": random.random() < 0.3}
        first = run(name, problem, q, **options)
        assert same(first, run(name, problem, q, **options))
        forced.assert_right(name, problem, *first, causal=causal)


@pytest.mark.parametrize("page_size", forced.PAGE_SIZES)
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_page_sizes(name, page_size):
    problem = forced.random_problem(name, lengths=[0, 1, 700, 4097], page_size=page_size)
    forced.assert_right(name, problem, *run(name, problem))


@pytest.mark.parametrize("name", [name for name in ON_HOPPER if name.startswith("swapab") or name in ONE_OF_EACH])
def test_many_times_while_l2_is_written_back(name):
    """Copies come late and out of order then. Equal bits, and no barrier that takes one tile for another."""
    problem = forced.random_problem(name, lengths=[4096] * 64)
    flushed = torch.empty(160 << 20, dtype=torch.uint8, device="cuda")
    first = run(name, problem)
    for _ in range(150):
        flushed.zero_()
        assert same(first, run(name, problem))


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_one_long_request_and_many_empty_ones(name):
    """The most pieces that a request can have."""
    problem = forced.random_problem(name, lengths=[0] * 70 + [60_000] + [0] * 70, page_size=64)
    forced.assert_right(name, problem, *run(name, problem))
    empty = forced.random_problem(name, lengths=[0] * 5)
    out, lse = run(name, empty)
    assert not out.any() and (lse == -torch.inf).all()


@pytest.mark.parametrize("name", ON_HOPPER)
def test_batch_invariant_bits(name):
    problem = forced.random_problem(name, lengths=[*random_lengths(10, 3000), 9000], page_size=64)
    q, cache, table, lens = problem.arguments()
    made = forced.plan_of(name, q.shape[1] * q.shape[2], q.device, batch_invariant=True)
    whole = dense_decode.mla_decode(q, cache, table, lens, k_scale=problem.k_scale, plan=made)
    for picked in ([10], [3], [10, 0], [5, 6, 10]):
        part = dense_decode.mla_decode(
            q[picked], cache, table[picked], lens[picked], k_scale=problem.k_scale, plan=made
        )  # fmt: skip
        assert same(part, [result[picked] for result in whole])


@pytest.mark.parametrize("name", ["swapab_fp8_n8", "swapab_fp8_n32", "twowg_fp8_c2", "portable_fp8"])
def test_fp16_query_beside_an_fp8_cache(name):
    problem = forced.random_problem(name, lengths=[0, 5, 900, 2500])
    problem.q = problem.q.half()
    out, lse = run(name, problem)
    assert out.dtype == torch.float16
    forced.assert_right(name, problem, out, lse)


@pytest.mark.parametrize("change", ["address", "head stride", "rope stride"])
@pytest.mark.parametrize("cache_format", forced.FORMATS)
def test_queries_that_do_not_suit_get_the_portable_kernel(cache_format, change, monkeypatch):
    from vllm_fusedmla.kernels.hopper import decode

    problem = make_problem([0, 70, 900], h_q=16, s_q=2, cache_format=cache_format, device="cuda")
    q = problem.q
    latent, rope = q[..., :512], q[..., 512:]
    if change == "address":
        q = torch.empty(q.numel() + 1, dtype=q.dtype, device="cuda")[1:].view(q.shape).copy_(q)
        parts = (q[..., :512], q[..., 512:])
    elif change == "head stride":
        parts = (torch.zeros(*q.shape[:3], 513, dtype=q.dtype, device="cuda")[..., :512].copy_(latent), rope)
    else:
        parts = (latent, torch.zeros(*q.shape[:3], 65, dtype=q.dtype, device="cuda")[..., :64].copy_(rope))
    made = plan.decode_plan(2, 16, cache_format, q.device)
    assert made.on_hopper
    monkeypatch.setattr(decode, "decode", lambda *call, **options: pytest.fail("not for this kernel"))
    out, lse = dense_decode.mla_decode(parts, *problem.arguments()[1:], k_scale=problem.k_scale, plan=made)
    forced.assert_right("portable", problem, out, lse)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_concurrent_streams(name):
    problems = [
        forced.random_problem(name, lengths=[3000, 0, *random_lengths(3, 3000)], page_size=64) for _ in range(3)
    ]
    want = [run(name, problem) for problem in problems]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in problems]
    results = []
    for _ in range(20):
        for stream, problem in zip(streams, problems, strict=True):
            with torch.cuda.stream(stream):
                results.append(run(name, problem))
    torch.cuda.synchronize()
    for i, result in enumerate(results):
        assert same(result, want[i % len(problems)])


def capture(name, problem, stream=None):
    """A graph of two launches and its outputs; no launch on the capturing stream before."""
    out = torch.full((*problem.q.shape[:3], 512), float("nan"), dtype=problem.q.dtype, device="cuda")
    lse = torch.full(problem.q.shape[:3], float("nan"), device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run(name, problem, out=out, lse=lse)
        run(name, problem, out=out, lse=lse)
    return graph, (out, lse)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_graphs_replayed_at_the_same_time(name):
    """Captured one after the other on one stream, replayed on two, while the capturing stream decodes too."""
    problems = [
        forced.random_problem(name, lengths=[4000, 0, *random_lengths(3, 3000)], page_size=64) for _ in range(3)
    ]
    want = [run(name, problem) for problem in problems]
    torch.cuda.synchronize()
    shared, others = torch.cuda.Stream(), [torch.cuda.Stream(), torch.cuda.Stream()]
    graphs = [capture(name, problem, shared) for problem in problems[:2]]
    for _ in range(20):
        for (graph, _), stream in zip(graphs, others, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        with torch.cuda.stream(shared):
            eager = run(name, problems[2])
    torch.cuda.synchronize()
    assert same(eager, want[2])
    for (_, result), expected in zip(graphs, want, strict=False):
        assert same(result, expected)


def test_a_graph_captured_before_anything_was_launched(monkeypatch):
    """There are no counters yet: the graph zeroes its own, and nobody else takes them."""
    from vllm_fusedmla.kernels.hopper import launch

    name = "swapab_bf16_n16"
    problem = forced.random_problem(name, lengths=[4000, 0, 77], h_q=16, s_q=1, page_size=64)
    want = run(name, problem)
    pool = launch.CounterPool(torch.device("cuda", torch.cuda.current_device()))
    monkeypatch.setattr(launch, "counter_pool", lambda device: pool)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    graph, result = capture(name, problem, stream)
    with torch.cuda.stream(stream):
        eager = run(name, problem)  # before the first replay
    stream.synchronize()
    assert same(eager, want)
    for _ in range(3):
        result[0].fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert same(result, want)


def test_capture_allocates_no_counters():
    """After a warm-up on another stream."""
    from vllm_fusedmla.kernels.hopper.launch import counter_pool

    name = "swapab_bf16_n16"
    problem = forced.random_problem(name, lengths=[4000, 0, 77], h_q=16, s_q=1, page_size=64)
    made = plan.decode_plan(1, 16, "bf16", problem.q.device)
    workspace = tuple(torch.empty(s, device="cuda") for s in made.workspace_shapes(3, 1, 16))
    want = ops.mla_decode(*problem.arguments())
    graph, chunks = torch.cuda.CUDAGraph(), len(counter_pool(torch.cuda.current_device()).chunks)
    result = tuple(torch.empty_like(part) for part in want)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        before = torch.cuda.memory_allocated()
        dense_decode.mla_decode(
            *problem.arguments(), plan=made, workspace=workspace, out=result[0], lse=result[1]
        )  # fmt: skip
        assert torch.cuda.memory_allocated() == before
    assert len(counter_pool(torch.cuda.current_device()).chunks) == chunks
    graph.replay()
    torch.cuda.synchronize()
    assert same(result, want)


@pytest.mark.parametrize("cache_format", forced.FORMATS)
def test_small_batches_of_many_rows(cache_format):
    """Blocks of the swap-AB kernel, which read the cache once each, where the longest request is known."""
    for length in (1, 64, 700, 3000, 9000):
        h_q, s_q = random.choice([(40, 1), (64, 1), (96, 2), (128, 1), (16, 4), (20, 3), (128, 8)])
        lengths = [length, *random_lengths(random.choice([0, 1, 3]), length)]
        problem = make_problem(lengths, h_q=h_q, s_q=s_q, cache_format=cache_format, device="cuda")
        tiles, device = plan.batch_tiles(len(lengths), length), problem.q.device
        made = plan.decode_plan(s_q, h_q, cache_format, device, tiles=tiles)
        few = few_rows(s_q * h_q, cache_format, tiles, device_facts(device)[1])
        assert made.config.kernel.startswith("twowg" if few is None else "swapab")
        out, lse = dense_decode.mla_decode(*problem.arguments(), k_scale=problem.k_scale, plan=made)
        assert_matches(problem, out, lse)
        via_op = ops.mla_decode(*problem.arguments(), k_scale=problem.k_scale, max_seq_len=length)
        assert torch.equal(via_op[0], out) and torch.equal(via_op[1], lse)


def test_fp8_mma_is_asked_for():
    """The public function takes the kernel that rounds only on request."""
    problem = make_problem([900, 0, 77], h_q=64, cache_format="fp8", device="cuda", spread=1.0)
    exact = ops.mla_decode(*problem.arguments(), k_scale=problem.k_scale)
    forced.assert_right("twowg_fp8_c1", problem, *exact)
    rounded = ops.mla_decode(*problem.arguments(), k_scale=problem.k_scale, fp8_mma=True)
    forced.assert_right("twowg_e4m3_c1", problem, *rounded)
    assert not torch.equal(exact[0], rounded[0])


@pytest.mark.parametrize("cache_format", ["bf16", "fp8"])
@pytest.mark.parametrize("sm_scale", [0.0, -0.05])
def test_any_sm_scale(cache_format, sm_scale):
    """The kernels here expect larger products to be larger scores; calls of another kind go to the portable one."""
    problem = make_problem([900, 0, 77], h_q=64, cache_format=cache_format, device="cuda")
    result = ops.mla_decode(*problem.arguments(), k_scale=problem.k_scale, sm_scale=sm_scale)
    forced.assert_right(f"portable_{cache_format}", problem, *result, sm_scale=sm_scale)


def test_a_cubin_that_the_driver_refuses_leaves_the_portable_kernel(monkeypatch, tmp_path, caplog):
    from vllm_fusedmla.kernels.hopper import launch

    for name in ON_HOPPER:
        (tmp_path / f"{name}.cubin").write_bytes(b"\x7fELF, and no more")
    monkeypatch.setattr(launch, "CUBINS", tmp_path)
    monkeypatch.setattr(hopper, "_refused", [])
    problem = make_problem([0, 70, 900], h_q=16, device="cuda")
    launch._kernel.cache_clear()
    plan._decode_plan.cache_clear()
    try:
        for _ in range(2):
            forced.assert_right("portable", problem, *ops.mla_decode(*problem.arguments()))
        assert not hopper.available()
        assert len([r for r in caplog.records if "could not be loaded" in r.getMessage()]) == 1
    finally:
        launch._kernel.cache_clear()
        plan._decode_plan.cache_clear()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("cache_format", forced.FORMATS)
def test_another_device_than_the_current_one(cache_format):
    problem = make_problem([0, 70, 900], h_q=64, cache_format=cache_format, device="cuda:1")
    assert torch.cuda.current_device() == 0
    forced.assert_right("portable", problem, *ops.mla_decode(*problem.arguments(), k_scale=problem.k_scale))
