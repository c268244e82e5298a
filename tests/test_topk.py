# SPDX-License-Identifier: Apache-2.0
"""Exact top-k: equal to a stable sort on any values, with one program a row and with several."""

import math
import random

import pytest
import torch
import torch.multiprocessing

pytest.importorskip("triton")
from indexer_problems import VALUES, check_topk, make_values, run_topk_program  # noqa: E402

from vllm_fusedmla.kernels import indexer_reference as reference  # noqa: E402
from vllm_fusedmla.kernels import topk, topk_kernel  # noqa: E402

PARTS = [1, 3]


def brute_force(row: list[float], k: int) -> list[int]:
    usable = [i for i, x in enumerate(row) if x > -math.inf]
    chosen = sorted(sorted(usable, key=lambda i: (-row[i], i))[:k])
    return chosen + [-1] * (k - len(chosen))


def lengths(values: list[int], device: str) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


@pytest.mark.parametrize("kind", VALUES)
def test_reference_is_a_stable_sort(kind):
    x = make_values(kind, 2, 60)
    for k in (1, 7, 60, 64):
        got = reference.topk_indices(x, torch.tensor([60, 41]), k)
        assert got.tolist() == [brute_force(x[0].tolist(), k), brute_force(x[1, :41].tolist(), k)]


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("kind", VALUES)
def test_any_values(kind, parts, device):
    n = random.randint(3200, 4500)
    x = make_values(kind, 2, n).to(device)
    for k in (random.choice([1, 2, 64]), random.randint(500, 2304)):
        check_topk(x, lengths([n, random.randint(2305, n)], device), k, parts=parts)


@pytest.mark.parametrize("parts", PARTS)
def test_lengths_around_k_and_out_of_range(parts, device):
    x = torch.randn(8, 3000).to(device)
    check_topk(x, lengths([0, 1, 63, 64, 65, 3000, 9999, -5], device), 64, parts=parts)
    check_topk(x[:3], lengths([2303, 2304, 2305], device), 2304, parts=parts)
    check_topk(x[:2, :100], lengths([100, 40], device), 300, parts=parts)  # k over n


@pytest.mark.parametrize("parts", PARTS)
def test_values_that_are_not_visible_do_not_count(parts, device):
    n = 2500
    x = torch.randn(3, n)
    ends = [0, 1300, 2497]
    for row, end in enumerate(ends):
        x[row, end:] = random.choice([math.nan, math.inf])
    got = check_topk(x.to(device), lengths(ends, device), 700, parts=parts)
    assert (got[0] == -1).all() and got[1].max() < 1300


@pytest.mark.parametrize("parts", PARTS)
def test_ranges_give_indices_from_their_start(parts, device):
    n = random.choice([3000, 3001])
    x = torch.randn(7, n)
    starts, ends = [0, 7, 1501, 2999, 40, -4, 9999], [3000, 2900, 3000, 3000, 40, 2902, 9999]
    for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
        x[row, : max(start, 0)] = math.inf
        x[row, end:] = math.inf
    got = check_topk(x.to(device), (lengths(starts, device), lengths(ends, device)), 1200, parts=parts)
    assert got[3].tolist() == [0] + [-1] * 1199 and (got[4] == -1).all()


@pytest.mark.parametrize("s_q", [2, 4])
def test_rows_of_a_request_see_one_more_each(s_q, device):
    x = torch.randn(3 * s_q, 400).to(device)
    lens = [300, 1, 0]
    got = check_topk(x, lengths(lens, device), 50, parts=1)
    each = [max(n - s_q + 1 + i, 0) for n in lens for i in range(s_q)]
    assert torch.equal(got, reference.topk_indices(x, lengths(each, device), 50))


def test_result_may_be_part_of_a_wider_buffer(device):
    x = torch.randn(3, 600).to(device)
    buffer = torch.full((5, 100), 77, dtype=torch.int32, device=device)
    got = topk.topk_indices(x, lengths([600, 20, 0], device), 64, out=buffer[1:4, :64])
    assert torch.equal(got, reference.topk_indices(x, lengths([600, 20, 0], device), 64))
    assert (buffer[:, 64:] == 77).all() and (buffer[0] == 77).all() and (buffer[4] == 77).all()


@pytest.mark.parametrize("parts", PARTS)
def test_rows_that_are_not_aligned(parts, device):
    whole = torch.randn(3, 2311).to(device)
    ends = lengths([2307, 1999, 2300], device)
    for x in (whole[:, 1:2308], whole[:, :2307], torch.randn(3, 2312).to(device)[:, :2307]):
        check_topk(x, ends, 300, parts=parts)


def test_more_programs_than_values(device):
    x = make_values("ties", 2, 1100).to(device)
    check_topk(x, lengths([1100, 70], device), 64, parts=9)


def test_many_tiles_in_a_program(device):
    n = 40_000
    x = torch.randn(1, n).to(device)
    x[0, 30_000:] = 0.25  # more ties than fit, in tiles of their own
    x[0, :100] = 9.0
    check_topk(x, lengths([n], device), 2304, parts=1)
    x[0, torch.randperm(n, device=device)[:1000]] = 5.0
    check_topk(x, lengths([n], device), 2304, parts=4)


def test_an_empty_batch_and_the_choice_of_programs(device):
    empty = torch.empty(0, 100, device=device)
    assert topk.topk_indices(empty, lengths([], device), 8).shape == (0, 8)
    place = torch.device("cpu")  # poses as four multiprocessors
    assert topk.programs_per_row(1, 131072, place) == 4
    assert topk.programs_per_row(1, 1500, place) == 2
    assert topk.programs_per_row(3, 131072, place) == 1
    assert topk.programs_per_row(64, 131072, place) == 1


def test_a_workspace_that_is_too_small_is_refused(device):
    x, ends = torch.zeros(3, 5000, device=device), lengths([5000] * 3, device)
    with pytest.raises(ValueError, match="workspace is for 2 rows of up to 64 programs, got 3 rows of 2"):
        topk.topk_indices(x, ends, 8, parts=2, workspace=topk.topk_workspace(2, device))
    with pytest.raises(ValueError, match="got 3 rows of 65"):
        topk.topk_indices(x, ends, 8, parts=65)


def test_programs_that_run_at_the_same_time():
    """The one launch of a GPU, where programs wait for each other: here each is a process."""
    if torch.cuda.is_available():
        pytest.skip("gpu/test_indexer_gpu.py does this for real")
    parts, k = 3, 200
    workspace = topk.topk_workspace(2, "cpu").share_memory_()
    ends = lengths([2000, 600], "cpu").share_memory_()  # the second row keeps fewer programs
    launches = [
        (make_values(kind, 2, 2000).share_memory_(), ends, torch.zeros(2, k, dtype=torch.int32).share_memory_())
        for kind in ("normal", "ties", "constant", "special")
    ]
    context = torch.multiprocessing.get_context("spawn")
    start = context.Barrier(parts)
    processes = [
        context.Process(target=run_topk_program, args=(part, parts, launches, workspace, k, start))
        for part in range(parts)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * parts
    for x, ends, out in launches:
        assert torch.equal(out, reference.topk_indices(x, ends, k))
    assert not workspace[:, : topk_kernel.STATE_OFFSET].any() and not workspace[:, topk_kernel.COUNTER_OFFSET :].any()
