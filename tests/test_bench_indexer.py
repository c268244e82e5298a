# SPDX-License-Identifier: Apache-2.0
"""The indexer's benchmark without a GPU: names, counts, checks, runs, and how the peers are called."""

import json
import types
from typing import Any

import pytest
import torch

from benchmarks import bench_indexer, indexer_cases, providers, targets
from benchmarks.indexer_cases import CASES, IndexerCase, PagedInputs, RaggedInputs, TopkInputs, make_inputs
from benchmarks.providers import indexer
from vllm_fusedmla.kernels import indexer_layout
from vllm_fusedmla.kernels import indexer_reference as reference

CPU = torch.device("cpu")
SMALL = ["paged b3 kv200", "ragged s5 kv90", "topk512 b2 kv700"]


def inputs(name, device=CPU):
    return make_inputs(IndexerCase.parse(name), device)


def scores(x):
    """Right scores, computed otherwise than by the check: all rows at once from the paged form."""
    if isinstance(x, RaggedInputs):
        ragged = (x.q, x.k, x.k_scales, x.weights, x.starts, x.lengths)
        return reference.index_logits_ragged(*ragged, max_len=x.case.kv)
    return reference.index_logits_paged(x.q.unsqueeze(1), x.cache, x.weights, x.lengths, x.block_table, x.case.kv)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_is_its_name_and_has_a_target(case):
    assert IndexerCase.parse(case.name) == case
    assert ((case.name, bench_indexer.DTYPE) in targets.RATIOS) == (case.kind != "ragged")


@pytest.mark.parametrize("name", ["", "paged s1 kv64", "topk b1 kv64", "ragged s65 kv64", "paged b1 kv64 x"])
def test_a_bad_name_is_refused(name):
    with pytest.raises(ValueError, match=r"case must look like|among its keys"):
        IndexerCase.parse(name)


def test_counts_by_hand():
    paged, ragged, topk = (IndexerCase.parse(name) for name in ("paged b3 kv200", "ragged s3 kv90", "topk64 b2 kv300"))
    assert paged.min_bytes("") == 3 * 200 * (132 + 4) + 3 * 64 * 132
    assert paged.flops() == 2 * 3 * 200 * 64 * 128
    assert ragged.visible() == [88, 89, 90]
    assert ragged.min_bytes("") == 90 * 132 + 3 * 64 * 132 + 4 * (88 + 89 + 90)
    assert ragged.flops() == 2 * (88 + 89 + 90) * 64 * 128
    assert topk.min_bytes("") == 4 * 2 * (300 + 64) and topk.flops() == 0


def test_inputs_are_what_the_kernels_take():
    x = inputs("paged b3 kv200")
    assert isinstance(x, PagedInputs)
    assert x.q.shape == (3, 64, 128) and x.q.dtype == torch.float8_e4m3fn and x.weights.shape == (3, 64)
    assert sorted(x.block_table.flatten().tolist()) == list(range(x.cache.shape[0])) == list(range(12))
    codes, scales = indexer_layout.page_views(x.cache)
    values = codes.view(torch.float8_e4m3fn).float() * scales.unsqueeze(-1)
    assert values.std() == pytest.approx(1.0, rel=0.05)
    assert torch.equal(torch.frexp(scales).mantissa, torch.full_like(scales, 0.5))


@pytest.mark.parametrize("name", ["paged b6 kv200", "ragged s6 kv90"])
def test_wrong_scores_are_found(name):
    x = inputs(name)
    right = scores(x)
    assert indexer_cases.check(x, right) == (pytest.approx(0, abs=0.1), "")
    row, column = x.case.rows - 1, x.case.kv - 1  # the last row is always checked, and sees all keys
    for wrong in (right[row, column] * 1.1 + 100, torch.nan, torch.inf):
        spoiled = right.clone()
        spoiled[row, column] = wrong
        excess, reason = indexer_cases.check(x, spoiled)
        assert excess > 1 and "times their tolerance off" in reason
    hidden = torch.nn.functional.pad(right, (0, 60), value=torch.nan)  # columns that no row sees may hold anything
    assert indexer_cases.check(x, hidden)[1] == ""


def test_wrong_selections_are_found():
    x = inputs("topk64 b2 kv300")
    assert isinstance(x, TopkInputs)
    x.logits[1, 7] = x.logits[1, 9] = 50.0
    right = x.logits.topk(64, 1).indices.int()
    shuffled = right[:, torch.randperm(64)]
    assert indexer_cases.check(x, shuffled) == (0.0, "")
    least = int(x.logits[0].argmin())
    for column, value, reason in (
        (3, least, "1 of 128 selected values"),
        (3, int(right[0, 4]), "selected twice"),
        (0, -1, "out of range"),
        (0, 300, "out of range"),
    ):
        wrong = right.clone()
        wrong[0, column] = value
        assert reason in indexer_cases.check(x, wrong)[1]


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("kind", ["fusedmla", "reference"])
def test_this_projects_providers(kind, name, device):
    pytest.importorskip("triton")
    provider = indexer.ALL[kind]()
    provider.load()
    x = inputs(name, torch.device(device))
    excess, reason = indexer_cases.check(x, provider.prepare(x)(), provider.slack)
    assert not reason and excess <= 1


@pytest.mark.parametrize("name", SMALL[:2])
def test_how_deepgemm_is_called(name, monkeypatch):
    x = inputs(name)

    def paged(q, cache, weights, lens, table, schedule, max_len):
        assert q[1] is None and cache.shape[1:] == (64, 1, 132) and lens.shape == (3, 1) and schedule == "schedule"
        return reference.index_logits_paged(q[0], cache.squeeze(2), weights, lens, table, max_len)

    def ragged(q, k, weights, starts, ends, max_len):
        assert q[1] is None
        return reference.index_logits_ragged(q[0], k[0], k[1], weights, starts, ends, max_len=max_len)

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(multi_processor_count=132))
    provider = indexer.DeepGemm()
    provider._paged, provider._ragged = paged, ragged
    provider._schedule = lambda lens, page, sms: "schedule" if (lens.dim(), page, sms) == (2, 64, 132) else None
    assert indexer_cases.check(x, provider.prepare(x)())[1] == ""


def select(logits, lengths, out):
    out.copy_(logits.topk(out.shape[1], 1).indices)
    assert lengths.flatten().tolist() == [logits.shape[1]] * len(logits)


@pytest.mark.parametrize("kind", ["vllm-cooperative", "vllm-persistent", "vllm-per-row", "flashinfer"])
def test_how_the_peers_select(kind, monkeypatch):
    x = inputs("topk512 b2 kv700")
    provider: Any = indexer.ALL[kind]()

    def shared(logits, lengths, out, workspace, k, max_len):
        assert workspace.numel() == 1 << 20 and k == out.shape[1] and max_len == 700
        select(logits, lengths, out)

    def per_row(logits, next_n, lengths, out, rows, stride0, stride1, k):
        assert (next_n, rows, stride0, stride1, k) == (1, 2, 700, 1, 512)
        select(logits, lengths, out)

    def ragged_transform(logits, offsets, lengths, k):
        assert offsets.tolist() == [0, 0]
        out = torch.empty(2, k, dtype=torch.int32)
        select(logits, lengths, out)
        return out

    fake = types.SimpleNamespace(cooperative_topk=shared, persistent_topk=shared, top_k_per_row_decode=per_row)
    provider._ops, provider._select = fake, ragged_transform
    monkeypatch.setattr(torch.ops, "_C", fake, raising=False)
    assert indexer_cases.check(x, provider.prepare(x)()) == (0.0, "")
    if kind in ("vllm-cooperative", "vllm-persistent"):
        with pytest.raises(providers.Unsupported, match="512, 1024 or 2048"):
            provider.prepare(inputs("topk64 b2 kv300"))


class Right(indexer.Reference):
    name = "fusedmla"


class Wrong(indexer.Reference):
    name = "deepgemm"
    kinds = ("paged",)

    def prepare(self, x):
        call = super().prepare(x)
        return lambda: call() + 100


class Broken(indexer.Reference):
    name = "vllm-per-row"

    def prepare(self, x):
        raise RuntimeError("boom\nsecond line")


@pytest.fixture
def fakes(monkeypatch):
    monkeypatch.setattr(indexer, "ALL", {"fusedmla": Right, "deepgemm": Wrong, "vllm-per-row": Broken})


def run(tmp_path, names, *more):
    path = tmp_path / "run.json"
    cases = [word for name in SMALL for word in ("--case", name)]
    code = bench_indexer.main(
        [*cases, "--providers", names, "--reps", "2", "--device", "cpu", "--json", str(path), *more]
    )
    return code, json.loads(path.read_text())


def test_a_run_saves_measured_rows_and_compares(fakes, tmp_path, capsys):
    code, saved = run(tmp_path, "fusedmla,vllm-per-row")
    assert code == 0  # a peer's error is not this project's
    assert [row["status"] for row in saved["rows"]] == ["ok", "error"] * 3
    row = saved["rows"][0]
    assert row["gbs"] == pytest.approx(IndexerCase.parse(row["case"]).min_bytes("") / row["median_us"] / 1e3)
    assert row["dtype"] == "indexer" and row["torch"] == torch.__version__ and row["error_over_tolerance"] <= 1
    printed = capsys.readouterr().out
    assert "| topk512 b2 kv700" in printed and "error: vllm-per-row indexer: RuntimeError: boom [" in printed
    old = tmp_path / "old.json"
    for factor, expected in ((1e6, 0), (1e-6, 1)):
        changed = [row | {"median_us": row.get("median_us", 1) * factor} for row in saved["rows"]]
        old.write_text(json.dumps({"rows": changed}))
        assert run(tmp_path, "fusedmla", "--compare", str(old))[0] == expected


def test_a_wrong_result_fails_the_run(fakes, tmp_path):
    code, saved = run(tmp_path, "fusedmla,deepgemm")
    assert code == 1
    found = {(row["case"], row["provider"]): row["status"] for row in saved["rows"]}
    assert found[SMALL[0], "deepgemm"] == "FAIL" and found[SMALL[1], "deepgemm"] == "unsupported"
    assert all(found[name, "fusedmla"] == "ok" for name in SMALL)


def test_what_is_not_there_is_a_note(tmp_path, capsys):
    assert run(tmp_path, "deepgemm,vllm-persistent")[0] == 0
    assert "note: deepgemm is absent: needs a CUDA device" in capsys.readouterr().out


def test_unknown_providers_are_refused():
    with pytest.raises(SystemExit):
        bench_indexer.parse(["--providers", "nobody"])
