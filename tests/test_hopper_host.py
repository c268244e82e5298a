# SPDX-License-Identifier: Apache-2.0
"""The host's side of the Hopper kernels, on any machine: which kernel a call gets, how it is divided, its parameter."""

import ctypes
import itertools
import logging
import subprocess
import sys
import types

import cubins
import pytest
import torch

from vllm_fusedmla.kernels import hopper, plan, select, sparse_plan
from vllm_fusedmla.kernels.hopper import build, counters, params
from vllm_fusedmla.kernels.hopper.variants import SWAPAB_ROWS, TOPK_NAME, VARIANTS

FORMATS = ("bf16", "fp16", "fp8", "fp8_ds_mla")
HOPPER, SMS = (9, 0), 132
ROWS = sorted({h_q * s_q for h_q in range(1, select.MAX_H_Q + 1) for s_q in range(1, select.MAX_S_Q + 1)})


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Nothing known yet about cubins and driver, and a folder for cubins, with all of them and cuda.bindings there."""
    monkeypatch.setattr(hopper, "_refused", [])
    monkeypatch.setattr(hopper, "CUBINS", tmp_path)
    monkeypatch.setattr(hopper.importlib.util, "find_spec", lambda name: object())
    for name in VARIANTS:
        (tmp_path / f"{name}.cubin").touch()
    hopper._missing.cache_clear()
    plan._decode_plan.cache_clear()
    yield tmp_path
    hopper._missing.cache_clear()
    plan._decode_plan.cache_clear()


# Which kernel


@pytest.mark.parametrize("fp8_mma", [False, True])
@pytest.mark.parametrize("cache_format", FORMATS)
def test_every_shape_gets_a_kernel_that_is_compiled(cache_format, fp8_mma):
    for rows in ROWS:
        config = select.select_decode(HOPPER, rows, cache_format, hopper=True, fp8_mma=fp8_mma)
        assert config.kernel in select.HOPPER_KERNELS
        assert hopper.variant_of(config, cache_format, rows) in VARIANTS
        assert (config.kernel == "twowg_e4m3") == (fp8_mma and cache_format == "fp8" and rows > 32)
        if rows <= max(SWAPAB_ROWS):
            assert config.kernel == "swapab" and rows <= config.block_h < rows + 8, "one block, no row wasted"
        if config.kernel == "swapab":
            assert config.block_h in SWAPAB_ROWS


@pytest.mark.parametrize("cache_format", FORMATS)
def test_small_batches_of_many_rows_get_blocks_of_the_swapab_kernel(cache_format):
    for rows in ROWS:
        blocks = [select.few_rows(rows, cache_format, tiles, SMS) for tiles in range(2000)]
        kept = [block for block, _ in itertools.groupby(blocks)]
        assert kept == ([None] if rows <= 32 else [16, None] if cache_format == "fp8_ds_mla" else [16, 32, None])
        for block in filter(None, kept):
            config = select.select_decode(HOPPER, rows, cache_format, hopper=True, fp8_mma=True, few=block)
            assert (config.kernel, config.block_h) == ("swapab", block)
            assert hopper.variant_of(config, cache_format, rows) in VARIANTS
            made = plan.make_plan(config, rows, SMS, False)
            assert hopper.row_blocks(config, rows) * made.params.num_programs <= SMS
        rounded = [select.few_rows(rows, cache_format, tiles, SMS, fp8_mma=True) for tiles in range(2000)]
        unrounded = 64 if cache_format == "fp8" and rows > 32 else None  # e4m3 is worth it for larger batches
        assert [block for block, _ in itertools.groupby(rounded)] == [*kept[:-1], *filter(None, [unrounded]), None]
        assert all(a == b or (a is None and b == unrounded) for a, b in zip(blocks, rounded, strict=True))
        if unrounded:
            config = select.select_decode(HOPPER, rows, cache_format, hopper=True, fp8_mma=True, few=unrounded)
            assert config == select.select_decode(HOPPER, rows, cache_format, hopper=True, few=unrounded)
            assert (config.kernel, config.block_h) == ("twowg", 64)


def test_plans_follow_the_tiles_that_a_batch_may_have(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(plan, "device_facts", lambda device: (HOPPER, SMS))
    monkeypatch.setattr(hopper, "available", lambda: True)
    monkeypatch.setattr(hopper, "loads", lambda *args: True)
    assert plan.batch_tiles(3, 65) == 6

    def kernel(**options):
        return plan.decode_plan(1, 128, "fp8", gpu, **options).config.kernel

    assert kernel(tiles=100) == kernel(tiles=100, fp8_mma=True) == "swapab"
    assert kernel() == kernel(tiles=100000) == kernel(tiles=100, batch_invariant=True) == "twowg"
    assert plan.decode_plan(1, 16, "fp8", gpu) is plan.decode_plan(1, 16, "fp8", gpu, tiles=7)
    for h_q, options in ((16, {}), (128, {}), (128, {"fp8_mma": True}), (128, {"batch_invariant": True})):
        some = {plan.decode_plan(1, h_q, "fp8", gpu, tiles=tiles, **options) for tiles in (None, *range(1000))}
        assert plan.decode_plans(1, h_q, "fp8", gpu, **options) == some


def test_every_kernel_serves_some_shape():
    used = {TOPK_NAME}
    for cache_format in FORMATS:
        for rows in ROWS:
            for fp8_mma in (False, True):
                config = select.select_decode(HOPPER, rows, cache_format, hopper=True, fp8_mma=fp8_mma)
                used.add(hopper.variant_of(config, cache_format, rows))
        for h_q in range(1, select.MAX_H_Q + 1):
            config = select.select_sparse(HOPPER, h_q, cache_format, hopper=True)
            if config.kernel in select.HOPPER_KERNELS:
                used.add(hopper.variant_of(config, cache_format, h_q))
    assert used == set(VARIANTS)


@pytest.mark.parametrize("arch", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_other_gpus_get_the_portable_kernel(arch):
    assert select.select_decode(arch, 64, "fp8", hopper=True, fp8_mma=True).kernel == "triton"


# How it is divided


@pytest.mark.parametrize("topk", [64, 512, 2048, 2176, 2304])
def test_lists_are_shared_by_as_many_as_run_at_once(topk):
    config = select.select_sparse(HOPPER, 16, "bf16", hopper=True)
    params = sparse_plan.make_sparse_plan(config, 16, SMS, False).params
    tiles = topk // 64
    for tokens in (1, 7, 8, 16, 17, 66, 67, 132, 5000):
        parts = hopper.list_parts(tokens, topk, params, lambda size: SMS // size)
        assert 1 <= parts <= 16 and (parts == 1 or tokens * parts <= SMS)
        assert parts == 1 or tiles > -(-tiles // parts) * (parts - 1), "every one of them has tiles"
        assert hopper.list_parts(tokens, topk, params, lambda size: 0) == 1
    assert hopper.list_parts(1, 2048, params, lambda size: SMS // size if size <= 8 else 0) == 8


def test_parts_of_a_list_in_batch_invariant_mode_depend_on_its_length_alone():
    config = select.select_sparse(HOPPER, 16, "bf16", hopper=True)
    for max_splits in (1, 8):
        params = sparse_plan.make_sparse_plan(config, 16, SMS, True, max_splits).params
        for topk in (64, 2048):
            parts = {hopper.list_parts(n, topk, params, lambda size: SMS // size) for n in (1, 20, 5000)}
            assert parts == {1 if topk == 64 else max_splits}


@pytest.mark.parametrize("cache_format", FORMATS)
def test_plans_keep_to_what_the_kernels_can_do(cache_format):
    for rows in ROWS:
        config = select.select_decode(HOPPER, rows, cache_format, hopper=True)
        for num_sms in (1, 78, SMS, 400):
            made = plan.make_plan(config, rows, num_sms, False)
            blocks, cluster = hopper.row_blocks(config, rows), hopper.cluster(config, rows)
            assert made.on_hopper and 1 <= made.params.num_programs <= hopper.MAX_PROGRAMS
            assert blocks * config.block_h >= rows and blocks % cluster == 0
            # All must run at once, for they wait for one another; one program is the least.
            assert blocks * made.params.num_programs <= num_sms or made.params.num_programs == 1
            assert cluster == (2 if config.kernel == "twowg" and rows > 64 else 1)


def test_batch_invariant_splits_fit_what_a_merger_weighs():
    made = plan.make_plan(select.select_decode(HOPPER, 16, "bf16", hopper=True), 16, SMS, True)
    assert made.params.max_splits <= hopper.MAX_PROGRAMS
    assert made.workspace_shapes(7, 1, 16) == ((7 * made.params.max_splits, 16, 512), (7 * made.params.max_splits, 16))


@pytest.mark.parametrize("lengths", [[70_000, 1], [0, 0, 1], [*range(1, 9000, 30)], [1, 131_072, 5, 0, 9000]])
def test_two_slots_a_program_hold_every_piece(lengths):
    """slot_of in work.cuh: a program writes the end of one split request and the beginning of another.

    Of unequal lengths; equal ones are cut so that a program has pieces of whole requests or of one.
    """
    made = plan.make_plan(select.select_decode(HOPPER, 128, "bf16", hopper=True), 128, SMS, False)
    programs, fixed = made.params.num_programs, made.params.fixed_tiles
    tiles = [-(-n // made.params.block_n) for n in lengths]
    share = max(-(-sum(t + fixed for t in tiles) // programs), made.params.min_tiles)
    start, slots = 0, []
    for t in tiles:
        owners = sorted({(start + fixed + i) // share for i in range(t)}) or [(start + fixed - 1) // share]
        assert owners == list(range(owners[0], owners[-1] + 1)), "pieces lie with consecutive programs"
        if len(owners) > 1:
            slots += [2 * (owners[0] + piece) - (piece > 0) for piece in range(len(owners))]
        start += t + fixed
    assert len(set(slots)) == len(slots) and all(0 <= s < hopper.max_slots(made.params, len(lengths)) for s in slots)


# Its parameter


def test_parameter_has_the_layout_that_the_kernels_read(tmp_path):
    """nvcc itself compares each offset of params.cuh with that of the mirror."""
    nvcc = cubins.nvcc()
    checks = []
    for struct in (params.Schedule, params.Strides, params.Params):
        for name, *_ in struct._fields_:
            if name != "padding":
                field, owner = getattr(struct, name), struct.__name__
                checks += [f"offsetof({owner}, {name}) == {field.offset}", f"sizeof({owner}::{name}) == {field.size}"]
    least = params.Params.padding.offset
    checks += [f"sizeof(Params) >= {least}", f"sizeof(Params) <= {ctypes.sizeof(params.Params)}"]
    asserts = "\n".join(f'static_assert({check}, "{check}");' for check in checks)
    source = tmp_path / "layout.cu"
    source.write_text(f'#include "params.cuh"\n#include <cstddef>\n{asserts}\n')
    flags = [flag for flag in build.FLAGS if flag.startswith(("-gencode", "arch=", "-std", "-cubin"))]
    command = [nvcc, *flags, "-I", build.FOLDER, source, "-o", tmp_path / "layout.cubin"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[:3000]


# Counters


def test_counters_are_shared_within_a_stream_and_nowhere_else():
    pool = counters.CounterPool(torch.device("cpu"))
    first = pool.take(100, stream=1, capture=0)
    assert pool.take(700, stream=1, capture=0) is first
    others = [pool.take(100, stream, capture) for stream, capture in ((2, 0), (1, 5), (2, 5), (1, 6))]
    larger = pool.take(5000, stream=1, capture=0)
    assert larger.numel() >= 5000 and pool.take(100, stream=1, capture=0) is larger
    spans = sorted((t.data_ptr(), t.data_ptr() + 4 * t.numel()) for t in (first, *others, larger))
    assert all(end <= begin for (_, end), (begin, _) in zip(spans, spans[1:], strict=False))
    assert len(pool.chunks) == 1


def test_a_capture_never_takes_new_counters_into_later_use():
    """Memory that a capture allocates is zeroed when the graph is replayed, so nobody else may count on it."""
    pool = counters.CounterPool(torch.device("cpu"))
    recorded = pool.take(100, stream=1, capture=7)  # nothing was reserved
    assert pool.chunks == [] and recorded.numel() >= 100
    assert pool.take(100, stream=1, capture=7).data_ptr() != recorded.data_ptr()
    pool.reserve()
    assert pool.take(100, 1, 7).data_ptr() == pool.chunks[0].data_ptr()
    unknown = pool.take(100, 1, None)
    assert not pool.chunks[0].data_ptr() <= unknown.data_ptr() < pool.chunks[0].data_ptr() + 4 * counters._CHUNK
    pool.take(counters._CHUNK, stream=2, capture=0)
    assert len(pool.chunks) == 2


# What is missing


def test_missing_cubins_are_named(fresh):
    assert hopper.available() and hopper.unavailable() is None
    first, *others = VARIANTS
    (fresh / f"{first}.cubin").unlink()
    hopper._missing.cache_clear()
    assert hopper.unavailable() == f"kernels for Hopper were not compiled: {first}"
    for name in others:
        (fresh / f"{name}.cubin").unlink()
    hopper._missing.cache_clear()
    assert (hopper.unavailable() or "").endswith(f"{others[1]} and {len(VARIANTS) - 3} more")
    assert not hopper.available()


def test_missing_driver_interface_is_named(fresh, monkeypatch):
    def find_spec(name):
        raise ModuleNotFoundError("No module named 'cuda'")

    monkeypatch.setattr(hopper.importlib.util, "find_spec", find_spec)
    hopper._missing.cache_clear()
    assert "cuda.bindings" in (hopper.unavailable() or "") and not hopper.available()


def test_a_cubin_that_does_not_load_leaves_the_portable_kernel(fresh, monkeypatch, caplog):
    def load(name, device):
        loaded.append(name)
        if name.startswith("twowg"):
            raise hopper.DriverError("CUDA driver: CUDA_ERROR_UNSUPPORTED_PTX_VERSION")

    loaded: list[str] = []
    launch = types.ModuleType("launch")
    launch.load = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, f"{hopper.__name__}.launch", launch)
    monkeypatch.setattr(plan, "device_facts", lambda device: (HOPPER, SMS))
    gpu = torch.device("cuda", 0)
    with caplog.at_level(logging.WARNING):
        assert plan.decode_plan(1, 16, "fp8", gpu).config.kernel == "swapab"
        assert plan.decode_plan(1, 16, "fp8", gpu, portable=True).config.kernel == "triton"
        assert plan.decode_plan(1, 128, "fp8", gpu).config.kernel == "triton"
        assert plan.decode_plan(2, 16, "fp8", gpu).config.kernel == "triton", "not tried again"
    assert loaded == ["swapab_fp8_n16", "twowg_fp8_c2"]
    (warning,) = caplog.records
    assert "twowg_fp8_c2 could not be loaded: CUDA driver: CUDA_ERROR_UNSUPPORTED_PTX_VERSION" in warning.getMessage()
    assert "twowg_fp8_c2" in (hopper.unavailable() or "")
    assert plan.decode_plan(1, 16, "fp8", gpu).config.kernel == "swapab", "a kernel that did load stays in use"
