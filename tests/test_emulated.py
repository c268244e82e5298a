# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels, run on a CPU: right, and bit-equal, in any order of what their warps and copies do."""

import random
import sys

import pytest
import torch

pytest.importorskip("triton")
import emulated  # noqa: E402
import forced  # noqa: E402
from problems import assert_matches, make_problem, random_lengths  # noqa: E402
from sparse_problems import make_sparse_problem  # noqa: E402

from vllm_fusedmla.kernels import dense_decode, hopper, sparse_decode, sparse_reference  # noqa: E402
from vllm_fusedmla.kernels.plan import make_plan  # noqa: E402
from vllm_fusedmla.kernels.select import DecodeConfig  # noqa: E402
from vllm_fusedmla.kernels.sparse_plan import make_sparse_plan  # noqa: E402

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to run them on"),
    pytest.mark.skipif(not emulated.usable(), reason="no C++ compiler"),
]

DENSE = [
    "swapab_bf16_n8",
    "swapab_fp16_n24",
    "swapab_fp8_n16",
    "swapab_fp8_n32",
    "swapab_fp8_ds_mla_n32",
    "twowg_bf16_c1",
    "twowg_bf16_c2",
    "twowg_fp8_c2",
    "twowg_fp8_ds_mla",
    "twowg_e4m3_c1",
]
SPARSE = {  # kernel: cache format, name in the selection table, heads of a block
    "swapab_gather_bf16_n8": ("bf16", "swapab_gather", 8),
    "swapab_gather_fp8_ds_mla_n16": ("fp8_ds_mla", "swapab_gather", 16),
    "twowg_gather_bf16": ("bf16", "twowg_gather", 64),
    "twowg_gather_fp8_ds_mla": ("fp8_ds_mla", "twowg_gather", 64),
}


@pytest.fixture(scope="session")
def build_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("emulated")


def install(emulator, monkeypatch):
    """Have the launching modules launch on it."""
    monkeypatch.setitem(sys.modules, "vllm_fusedmla.kernels.hopper.launch", emulator)
    monkeypatch.setattr(hopper, "launch", emulator, raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    from vllm_fusedmla.kernels.hopper import decode, sparse

    for module in (decode, sparse):
        monkeypatch.setattr(module, "launch", emulator)
    return emulator


@pytest.fixture
def emulator(build_folder, monkeypatch, seed):
    return install(emulated.Emulator(build_folder, seed=seed), monkeypatch)


def dense_problem(name, lengths=None, **changes):
    """Heads and query tokens that the kernel suits, in one block of rows or two."""
    s_q, block = random.choice([1, 2, 3]), forced.config_of(name).block_h
    least = block + 1 if name.endswith("_c2") else 1
    most = block if name.endswith("_c1") else 2 * block
    h_q = random.randint(-(-least // s_q), most // s_q)
    problem = make_problem(
        lengths or random_lengths(random.randint(1, 3), 700), h_q=h_q, s_q=s_q,
        cache_format=forced.format_of(name), spread=forced.spread_of(name), page_size=random.choice([16, 48, 64, 128]),
        extra_stride=random.choice([0, 64]), **changes,
    )  # fmt: skip
    if problem.cache_format == "fp8" and random.random() < 0.3:
        problem.q = problem.q.half()
    return problem


def attend(emulator, name, problem, programs, batch_invariant=False):
    rows, config = problem.q.shape[1] * problem.q.shape[2], forced.config_of(name)
    plan = make_plan(config, rows, programs * hopper.row_blocks(config, rows), batch_invariant, max_splits=4)
    result = dense_decode.mla_decode(*problem.arguments(), k_scale=problem.k_scale, plan=plan)
    assert emulator.launched[-1] == name and not emulator.last_counters.any()
    return result


@pytest.mark.parametrize("name", DENSE)
def test_dense_twice(name, emulator):
    """Twice, in another order of events: an error, or a bit, that moves between runs is a race."""
    problem, programs, batch_invariant = dense_problem(name), random.choice([1, 2, 3]), random.random() < 0.3
    first, second = (attend(emulator, name, problem, programs, batch_invariant) for _ in range(2))
    forced.assert_right(name, problem, *first)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", ["swapab_bf16_n8", "swapab_fp8_n32", "twowg_bf16_c1", "twowg_fp8_c2"])
def test_many_pieces_of_a_request(name, emulator):
    problem = dense_problem(name, [600, 0])
    forced.assert_right(name, problem, *attend(emulator, name, problem, programs=6))


@pytest.mark.parametrize("name", ["swapab_bf16_n8", "swapab_fp8_n16", "swapab_fp8_ds_mla_n8"])
def test_equal_parts_of_a_small_batch(name, emulator):
    """Programs with one to five tiles: pages of the first ones are looked up before it is known how many they are."""
    b, each = random.choice([(1, 5), (2, 3)])
    for part in random.sample(range(1, 6), 2):
        lengths = [random.randint((each - 1) * part * 64 + 1, each * part * 64) for _ in range(b)]
        problem = dense_problem(name, lengths)
        forced.assert_right(name, problem, *attend(emulator, name, problem, programs=b * each))


@pytest.mark.parametrize("name", ["swapab_fp8_n16", "swapab_fp8_ds_mla_n8"])
def test_a_request_longer_than_the_ring(name, emulator):
    """Warpgroups take its tiles in turns; a late one lets another run ahead."""
    problem = dense_problem(name, [random.randint(1000, 1500)])
    forced.assert_right(name, problem, *attend(emulator, name, problem, programs=1))


@pytest.mark.parametrize("name", ["swapab_bf16_n8", "swapab_fp8_n16", "swapab_fp8_ds_mla_n32"])
def test_scores_that_rise(name, emulator):
    """By so much that what weights are related to has to move with almost every tile."""
    problem = dense_problem(name, [random.randint(700, 1000)], rise=100.0)
    forced.assert_right(name, problem, *attend(emulator, name, problem, programs=random.choice([1, 2])))


@pytest.mark.parametrize("name", ["swapab_fp8_ds_mla_n32", "twowg_fp8_ds_mla"])
def test_scales_far_from_each_other(name, emulator):
    problem = dense_problem(name, [150, 20], wide_scales=True)
    forced.assert_right(name, problem, *attend(emulator, name, problem, programs=1))


def test_many_blocks_of_rows(emulator):
    """As small batches of many rows are decoded."""
    problem = make_problem([300, 0, 65], h_q=random.randint(65, 80), cache_format="fp8", page_size=64)
    forced.assert_right("swapab_fp8_n16", problem, *attend(emulator, "swapab_fp8_n16", problem, programs=2))


def attend_to_lists(emulator, name, problem, programs):
    cache_format, kernel, heads = SPARSE[name]
    config = DecodeConfig(kernel, heads, 64, 12, 0, 1, 1, 1, "forced")
    plan = make_sparse_plan(config, problem.q.shape[2], programs, batch_invariant=random.random() < 0.3)
    emulator.num_sms = random.choice([8, 16])
    result = sparse_decode.mla_sparse_decode(*problem.arguments(), plan=plan, **problem.keywords())
    assert emulator.launched[-1] == name
    return result


@pytest.mark.parametrize("name", SPARSE)
def test_sparse_twice(name, emulator):
    cache_format, _, heads = SPARSE[name]
    problem = make_sparse_problem(
        random_lengths(2, 700), h_q=random.randint(1, heads), s_q=random.choice([1, 2]), topk=random.choice([64, 448]),
        cache_format=cache_format, slots=random.random() < 0.5, lengths=random.random() < 0.5,
        holes=random.choice([0.0, 0.2, 0.9]),
    )  # fmt: skip
    programs, state = random.choice([3, 8, 16]), random.getstate()
    first = attend_to_lists(emulator, name, problem, programs)
    random.setstate(state)
    second = attend_to_lists(emulator, name, problem, programs)
    assert_matches(problem, *first)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_largest_scores(emulator):
    """Of prefill; some of the lists are split, so that their pieces' largest scores have to be joined."""
    problem = make_sparse_problem(
        random_lengths(5, 500), h_q=random.randint(1, 64), topk=448, slots=True, lengths=True, holes=0.3
    )
    q, kv, indices = problem.q[:, 0], problem.cache.flatten(0, 1), problem.indices[:, 0]
    config = DecodeConfig("twowg_gather", 64, 64, 12, 0, 1, 1, 1, "forced")
    plan = make_sparse_plan(config, q.shape[1], random.choice([3, 8]), batch_invariant=random.random() < 0.3)
    out, max_logits, lse = sparse_decode.mla_sparse_prefill(q, kv, indices, plan=plan, **problem.options)
    assert emulator.launched[-1] == "twowg_gather_bf16"
    assert_matches(problem, out.unsqueeze(1), lse.unsqueeze(1))
    want = sparse_reference.mla_sparse_prefill(q.double(), kv, indices, compute_dtype=torch.float64, **problem.options)
    assert max_logits is not None
    torch.testing.assert_close(max_logits.double(), want[1], rtol=8.01 / 65536, atol=2e-5)


@pytest.mark.parametrize("name", ["swapab_gather_bf16_n8", "swapab_gather_fp8_ds_mla_n16"])
def test_a_list_longer_than_the_ring(name, emulator):
    cache_format, _, heads = SPARSE[name]
    problem = make_sparse_problem([1200], h_q=random.randint(1, heads), topk=1024, cache_format=cache_format)
    assert_matches(problem, *attend_to_lists(emulator, name, problem, programs=1))


MISTAKES = {  # kernel: file, what is left out of it, the complaint
    "twowg_bf16_c1": ("twowg_query.cuh", "copy<true>(ring);", None),
    "twowg_fp8_c2": ("twowg_multiply.cuh", "release_message();", "all threads wait"),
    "swapab_bf16_n8": ("swapab_copy.cuh", "mbarrier_wait(shared.empty(ring.stage()), ring.phase() ^ 1);", None),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_noticed(name, monkeypatch, tmp_path, seed):
    file, left_out, complaint = MISTAKES[name]
    code = tmp_path / "sources"
    code.mkdir()
    for source in (*emulated.KERNELS.glob("*.cuh"), *emulated.KERNELS.glob("*.cu")):
        text = source.read_text()
        if source.name == file:
            assert left_out in text
            text = text.replace(left_out, "")
        (code / source.name).write_text(text)
    emulator = install(emulated.Emulator(tmp_path, code, seed), monkeypatch)
    rows = forced.config_of(name).block_h * (2 if name.endswith("_c2") else 1)
    problem = make_problem([900, 400], h_q=rows, cache_format=forced.format_of(name))
    with pytest.raises((AssertionError, emulated.EmulationError), match=complaint):
        for _ in range(5):
            forced.assert_right(name, problem, *attend(emulator, name, problem, programs=1))
