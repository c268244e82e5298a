# SPDX-License-Identifier: Apache-2.0
"""Properties of the tile scheduler, and the device kernel against its host twin."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_fusedmla.kernels.schedule import ScheduleParams, TileSchedule, allocate_schedule, build_schedule_host

lengths = st.lists(st.one_of(st.integers(0, 200), st.integers(0, 40_000)), min_size=1, max_size=40)
parameters = st.builds(
    ScheduleParams,
    num_programs=st.sampled_from([1, 2, 7, 66, 132, 264]),
    block_n=st.sampled_from([16, 32, 64, 128]),
    fixed_tiles=st.sampled_from([1, 2, 5]),
    min_tiles=st.sampled_from([1, 2, 8]),
    batch_invariant=st.booleans(),
    max_splits=st.sampled_from([1, 4, 32]),
)


def tiles_of(lens: list[int], params: ScheduleParams) -> list[int]:
    return [-(-n // params.block_n) for n in lens]


def pieces_of(schedule: TileSchedule) -> list[list[int]]:
    return schedule.items[: int(schedule.program_begin[-1])].tolist()


@given(lengths, parameters)
def test_every_tile_of_every_request_is_covered_once_in_order(lens, params):
    schedule = build_schedule_host(torch.tensor(lens), params)
    reached: dict[int, int] = {}
    for request, begin, end, _ in pieces_of(schedule):
        assert begin == reached.get(request, 0)
        assert end > begin or lens[request] == 0
        reached[request] = end
    assert [reached[i] for i in range(len(lens))] == tiles_of(lens, params)  # empty requests have an item too


@given(lengths, parameters)
def test_slots_belong_to_split_requests_and_buffers_are_large_enough(lens, params):
    schedule = build_schedule_host(torch.tensor(lens), params)
    pieces = pieces_of(schedule)
    for request in range(len(lens)):
        slots = [slot for owner, *_, slot in pieces if owner == request]
        begin, end = schedule.num_splits[request : request + 2].tolist()
        assert slots == (list(range(begin, end)) if len(slots) > 1 else [-1])
        assert end - begin == (len(slots) if len(slots) > 1 else 0)
        assert len(slots) <= params.max_pieces()
    assert len(pieces) <= params.max_items(len(lens))
    assert int(schedule.num_splits[-1]) <= params.max_slots(len(lens))


@given(lengths, parameters)
def test_programs_are_balanced(lens, params):
    schedule = build_schedule_host(torch.tensor(lens), params)
    begin = schedule.program_begin.tolist()
    assert begin[0] == 0 and begin == sorted(begin)
    pieces, fixed, tiles = pieces_of(schedule), params.fixed_tiles, tiles_of(lens, params)
    loads = [sum(e - s + fixed for _, s, e, _ in pieces[i:j]) for i, j in zip(begin, begin[1:], strict=False)]
    if params.batch_invariant:
        chunks = [max(-(-t // params.max_splits), params.min_tiles) for t in tiles]
        whole = sum(max(-(-t // c), 1) * (c + fixed) for t, c in zip(tiles, chunks, strict=True))
        slack = max(chunks) + fixed  # a program takes the chunks that begin in its share
    else:
        whole = sum(t + fixed for t in tiles)
        slack = fixed + 1  # the fixed cost of one more item, and a tile of rounding
    share = max(-(-whole // params.num_programs), params.min_tiles + fixed)
    assert max(loads) <= share + slack


@given(lengths, lengths, parameters, st.data())
def test_batch_invariant_splits_depend_on_the_request_alone(lens, others, params, data):
    params = ScheduleParams(params.num_programs, params.block_n, params.fixed_tiles, params.min_tiles, True)
    place = data.draw(st.integers(0, len(others)))
    target = lens[0]
    alone = pieces_of(build_schedule_host(torch.tensor([target]), params))
    batch = others[:place] + [target] + others[place:]
    among = pieces_of(build_schedule_host(torch.tensor(batch), params))
    assert [p[1:3] for p in among if p[0] == place] == [p[1:3] for p in alone]


def assert_same(device: TileSchedule, host: TileSchedule) -> None:
    assert torch.equal(device.program_begin.cpu(), host.program_begin)
    assert torch.equal(device.num_splits.cpu(), host.num_splits)
    used = int(host.program_begin[-1])
    assert torch.equal(device.items[:used].cpu(), host.items[:used])


@settings(max_examples=25)
@given(lens=lengths, params=parameters)
def test_device_kernel_equals_the_host_twin(lens, params):
    pytest.importorskip("triton")
    from conftest import NUM_GPUS

    from vllm_fusedmla.kernels.schedule import build_schedule

    device = "cuda" if NUM_GPUS else "cpu"
    if not NUM_GPUS and params.num_programs > 66:  # the interpreter runs one program after another
        params = ScheduleParams(7, params.block_n, params.fixed_tiles, params.min_tiles, params.batch_invariant)
    seq_lens = torch.tensor(lens, dtype=torch.int32, device=device)
    assert_same(build_schedule(seq_lens, params), build_schedule_host(seq_lens, params))


def test_buffers_are_reused_for_smaller_batches(device):
    pytest.importorskip("triton")
    from vllm_fusedmla.kernels.schedule import build_schedule

    params = ScheduleParams(5, 64)
    buffers = allocate_schedule(params, 8, device)
    for lens in ([4000, 100, 0], [64] * 8, [1]):
        seq_lens = torch.tensor(lens, dtype=torch.int32, device=device)
        built = build_schedule(seq_lens, params, out=buffers)
        assert built.items.data_ptr() == buffers.items.data_ptr()
        assert_same(built, build_schedule_host(seq_lens, params))


def test_senseless_parameters_are_refused():
    with pytest.raises(ValueError, match="num_programs must be at least 1, got 0"):
        ScheduleParams(0, 64)
