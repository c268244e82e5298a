# SPDX-License-Identifier: Apache-2.0
"""Each of evals/faults.py's mistakes changes what FUSEDMLA computes, in the way it says, and can be taken back."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from problems import make_problem
from sparse_problems import make_sparse_problem

PROJECT = Path(__file__).resolve().parents[1]
if str(PROJECT) not in sys.path:  # `evals` is not part of the installed package
    sys.path.insert(0, str(PROJECT))

from evals import faults  # noqa: E402
from vllm_fusedmla.kernels import layout, reference, sparse_reference  # noqa: E402

PAGE = 16
DENSE = [name for name, fault in faults.FAULTS.items() if fault.dense]
SPARSE = [name for name, fault in faults.FAULTS.items() if fault.sparse]
LISTS = [name for name, fault in faults.FAULTS.items() if fault.layer]


@pytest.fixture(autouse=True)
def clean() -> Any:
    """Nothing stays injected after a test that fails."""
    places = [(module, name) for module, name in (*faults.DENSE, *faults.SPARSE) if faults._module(module)]
    before = [(faults._module(module), name, getattr(faults._module(module), name)) for module, name in places]
    yield
    for module, name, function in before:
        setattr(module, name, function)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Distance of two results relative to their size."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def test_unknown_faults_are_refused() -> None:
    with pytest.raises(ValueError, match="fault must be one of merge_without_lse, lost_page, .*, got 'nothing'"):
        faults.inject("nothing")


def test_table_says_what_and_where() -> None:
    assert len(faults.FAULTS) >= 9
    for fault in faults.FAULTS.values():
        assert fault.does and fault.applies and (fault.dense or fault.sparse or fault.layer)


def dense_problem(name: str, cache_format: str = "bf16") -> Any:
    """Requests on which a fault must show: few keys where one of them is at stake, more than two pages elsewhere."""
    if name == "causal_off_by_one":
        lens = [random.randrange(3, 9) for _ in range(2)]
        return make_problem(lens, h_q=3, s_q=2, page_size=PAGE, cache_format=cache_format, spread=1.0)
    lens = [random.randrange(3 * PAGE + 1, 6 * PAGE) for _ in range(2)]
    return make_problem(lens, h_q=3, page_size=PAGE, cache_format=cache_format, spread=1.0)


@pytest.mark.parametrize("cache_format", ["bf16", "fp8", "fp8_ds_mla"])
@pytest.mark.parametrize("name", DENSE)
def test_dense_decode_changes(name: str, cache_format: str) -> None:
    """Wrong far beyond rounding (0.005 and less), and the same as before once the fault is gone."""
    problem = dense_problem(name, cache_format)
    options = {"k_scale": problem.k_scale, "sm_scale": 192**-0.5}
    want, want_lse = reference.mla_decode(*problem.arguments(), **options)
    undo = faults.inject(name)
    wrong, wrong_lse = reference.mla_decode(*problem.arguments(), **options)
    undo()
    again, again_lse = reference.mla_decode(*problem.arguments(), **options)
    assert wrong.isfinite().all() and wrong_lse.isfinite().all()
    assert difference(wrong, want) > 0.05, difference(wrong, want)
    assert torch.equal(again, want) and torch.equal(again_lse, want_lse)


@pytest.mark.parametrize("name", DENSE)
def test_portable_kernel_is_wrong_like_the_reference(name: str) -> None:
    portable = faults._module(faults.DENSE[1][0])
    if portable is None:
        pytest.skip("needs Triton")
    problem = dense_problem(name)
    problem.seq_lens[1] = 0  # a padded request
    undo = faults.inject(name)
    try:
        want, want_lse = reference.mla_decode(*problem.arguments(), sm_scale=192**-0.5)
        got, got_lse = portable.mla_decode(*problem.arguments(), sm_scale=192**-0.5)
    finally:
        undo()
    assert torch.equal(got_lse.isfinite(), want_lse.isfinite())
    torch.testing.assert_close(got.float(), want.float(), rtol=4 / 128, atol=4e-3)
    assert want[0].any() and not want[1].any()


def dense_by_hand(problem: Any, keep: Any, scale: float) -> torch.Tensor:
    """Attention of one query row a request in float64, over the keys at positions for which `keep` says so."""
    outs = []
    rows = layout.read_cache(problem.cache, problem.k_scale, torch.float64)
    for request, length in enumerate(problem.seq_lens.tolist()):
        position = torch.arange(length)
        page = problem.block_table[request, position // PAGE].long()
        keys = rows[page, position % PAGE][torch.tensor([keep(p, length) for p in range(length)])]
        scores = problem.q[request, 0].double() @ keys.T * scale
        outs.append(torch.softmax(scores, -1) @ keys[:, : layout.D_V])
    return torch.stack(outs)


def test_lost_page_is_the_second_one_alone() -> None:
    lens = [random.randrange(2 * PAGE + 1, 6 * PAGE), 2 * PAGE, 7]
    problem = make_problem(lens, h_q=2, page_size=PAGE)
    undo = faults.inject("lost_page")
    out, _ = reference.mla_decode(*problem.arguments())
    undo()
    want = dense_by_hand(problem, lambda p, n: n <= 2 * PAGE or not PAGE <= p < 2 * PAGE, layout.D_QK**-0.5)
    assert difference(out[:, 0], want) < 5e-3


def test_tile_and_cache_scales_are_those_of_the_rows() -> None:
    problem = make_problem([40, 9], h_q=2, page_size=PAGE, cache_format="fp8_ds_mla")
    for name, groups, factor in (("tile_scale", slice(0, 1), 1.5), ("k_scale_doubled", slice(0, 4), 2.0)):
        undo = faults.inject(name)
        out, lse = reference.mla_decode(*problem.arguments())
        undo()
        cache = problem.cache.clone()
        scales = cache[..., layout.DS_MLA_SCALES_OFFSET : layout.DS_MLA_ROPE_OFFSET].clone().view(torch.float32)
        scales[..., groups] *= factor
        cache[..., layout.DS_MLA_SCALES_OFFSET : layout.DS_MLA_ROPE_OFFSET] = scales.view(torch.uint8)
        if name == "k_scale_doubled":
            rope = cache[..., layout.DS_MLA_ROPE_OFFSET :].clone().view(torch.bfloat16)
            cache[..., layout.DS_MLA_ROPE_OFFSET :] = (2 * rope).view(torch.uint8)
        want, want_lse = reference.mla_decode(problem.q, cache, *problem.arguments()[2:])
        torch.testing.assert_close(out.float(), want.float(), rtol=2 / 128, atol=1e-3)
        torch.testing.assert_close(lse, want_lse, rtol=1e-2, atol=1e-2)


def test_causal_fault_needs_two_rows() -> None:
    problem = make_problem([40], h_q=2, page_size=PAGE)
    want, _ = reference.mla_decode(*problem.arguments())
    undo = faults.inject("causal_off_by_one")
    got, _ = reference.mla_decode(*problem.arguments())
    undo()
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", SPARSE)
def test_sparse_operators_change_alike(name: str) -> None:
    problem = make_sparse_problem([70, 40], h_q=3, topk=64, page_size=PAGE)
    operators: list[Any] = [sparse_reference]
    if (portable := faults._module(faults.SPARSE[1][0])) is not None:
        operators.append(portable)
    wrongs = []
    for module in operators:
        keywords = {**problem.keywords(), "sm_scale": 192**-0.5}
        want, _ = module.mla_sparse_decode(*problem.arguments(), **keywords)
        undo = faults.inject(name)
        out, lse = torch.empty_like(want), torch.empty(want.shape[:-1], dtype=torch.float32)
        wrong, _ = module.mla_sparse_decode(*problem.arguments(), **keywords, out=out, lse=lse)
        undo()
        assert wrong.data_ptr() == out.data_ptr()  # the layer wants its results there
        assert torch.equal(module.mla_sparse_decode(*problem.arguments(), **keywords)[0], want)
        assert out.isfinite().all() and difference(out, want) > 0.05
        wrongs.append(out)
    for wrong in wrongs[1:]:
        torch.testing.assert_close(wrong.float(), wrongs[0].float(), rtol=4 / 128, atol=4e-3)


@pytest.mark.parametrize("name", LISTS)
def test_lists_of_keys_change(name: str) -> None:
    indices = torch.tensor([[0, 5, 17, -1, 40], [33, 16, -1, 31, 1]], dtype=torch.int32)
    table = torch.tensor([[7, 8, 9, 10]], dtype=torch.int32)
    metadata = SimpleNamespace(block_table=table, seq_lens=torch.tensor([41, 99], dtype=torch.int32))
    change = faults.FAULTS[name].layer
    assert change is not None
    lists, changed = change(indices, metadata, PAGE)
    expected = {
        "lost_page": [[0, 5, -1, -1, 40], [33, -1, -1, -1, 1]],
        "topk_off_by_one": [[0, 4, 16, -1, 39], [32, 15, -1, 30, 0]],
        "stale_block_table": indices.tolist(),
    }
    assert lists.tolist() == expected[name] and lists.dtype == torch.int32
    assert changed.block_table.tolist() == ([[7, 8, 8, 10]] if name == "stale_block_table" else table.tolist())
    assert indices[0].tolist() == [0, 5, 17, -1, 40] and table.tolist() == [[7, 8, 9, 10]]  # the model's own


def test_sparse_layer_is_wrapped_and_its_buffer_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer computes with changed lists, and the buffer that all layers share is as it was."""
    backend = faults._module(faults.SPARSE_LAYER[0])
    if backend is None:
        pytest.skip("needs vLLM")
    owner = getattr(backend, faults.SPARSE_LAYER[1])
    seen: list[Any] = []
    monkeypatch.setattr(owner, "forward_mqa", lambda self, q, cache, metadata, layer: seen.append(self.lists()))
    before = owner.forward_mqa
    undo = faults.inject("topk_off_by_one")
    impl = object.__new__(owner)
    impl.topk_indices_buffer = torch.tensor([[3, -1], [9, 9]], dtype=torch.int32)
    monkeypatch.setattr(owner, "lists", lambda self: self.topk_indices_buffer.tolist(), raising=False)
    impl.forward_mqa(torch.zeros(1, 2, 576), torch.zeros(4, PAGE, 576), SimpleNamespace(), None)
    undo()
    assert seen == [[[2, -1]]] and impl.topk_indices_buffer.tolist() == [[3, -1], [9, 9]]
    assert owner.forward_mqa is before
