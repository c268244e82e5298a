# SPDX-License-Identifier: Apache-2.0
"""The benchmark program without a GPU: cases, counts, checks, comparison, tables, and runs with fake providers."""

import csv
import json
import math

import pytest
import torch

from benchmarks import bench_decode, check, providers, report, timing
from benchmarks.cases import CACHE_ROW_BYTES, FULL, GRIDS, PEERS, TARGET, Case, select
from benchmarks.inputs import FP8_K_SCALE, KEY_STD, Pool
from vllm_fusedmla.kernels import layout

CPU = torch.device("cpu")


@pytest.mark.parametrize("case", FULL, ids=lambda case: case.name)
def test_a_case_is_its_name(case):
    assert Case.parse(case.name) == case


@pytest.mark.parametrize(
    "name", ["", "b1 h16", "prefill s1 h16 kv1024", "b1 kv1024 h16", "b1 h16 kv1024 page", "b1 h16 kv1024 x"]
)
def test_a_bad_name_is_refused(name):
    with pytest.raises(ValueError, match="case must look like"):
        Case.parse(name)


# Floors printed beside the peers' times in the project's design: bytes at 4.8 TB/s, operations at 989 TFLOP/s.
@pytest.mark.parametrize(
    ("name", "bytes_us", "flops_us"),
    [
        ("b128 h128 kv4096", 133, 148),
        ("b128 h128 kv8192", 259, 295),
        ("b128 s_q2 h128 kv4096", None, 295),
        ("b128 h64 kv8192", 255, None),
        ("b128 h32 kv8192", 253, None),
        ("b128 h16 kv8192", 252, None),
        ("b32 h128 kv4096", 33, 37),
        ("b32 h16 kv4096", 32, None),
        ("b64 s_q2 h16 kv4096", 63, None),
        ("b1 h128 kv131072", 32, 37),
        ("b4 h16 kv4096", 4, None),
    ],
)
def test_floors_of_known_cases(name, bytes_us, flops_us):
    case = Case.parse(name)
    if bytes_us is not None:
        assert case.min_bytes("bf16") / 4.8e12 * 1e6 == pytest.approx(bytes_us, abs=1)
    if flops_us is not None:
        assert case.flops() / 989e12 * 1e6 == pytest.approx(flops_us, abs=1)


def test_counts_by_hand():
    case = Case(2, 3, 10, s_q=2)
    assert case.min_bytes("fp8") == 2 * 10 * 576 + 2 * 2 * 3 * 2 * (576 + 512)
    assert case.min_bytes("bf16") - case.min_bytes("fp8") == 2 * 10 * 576
    assert case.min_bytes("fp8_ds_mla") - case.min_bytes("fp8") == 2 * 10 * 80
    assert case.flops() == 2 * (9 + 10) * 2 * 3 * (576 + 512)


@pytest.mark.parametrize("dtype", CACHE_ROW_BYTES)
def test_a_cached_token_has_the_size_of_the_cache_format(dtype):
    assert CACHE_ROW_BYTES[dtype] == layout.row_bytes(dtype)


def test_ragged_lengths_are_fixed_and_log_uniform():
    case = Case.parse("b64 h16 ragged256-65536")
    lengths = case.seq_lens()
    assert lengths == Case.parse("b64 h128 ragged256-65536").seq_lens() == case.seq_lens()
    assert min(lengths) >= 256 and max(lengths) <= 65536
    assert sum(length < math.sqrt(256 * 65536) for length in lengths) == pytest.approx(32, abs=12)


def test_grids_are_nested_and_selected_by_name():
    assert len(PEERS) == 15
    assert all(set(cases) <= set(FULL) for name, cases in GRIDS.items() if name != "sparse")
    assert all(len({case.name for case in cases}) == len(cases) for cases in GRIDS.values())
    assert {case.h_q for case in FULL} >= {8, 12, 20, 24, 40, 48, 96}
    assert {case.page_size for case in FULL} == {16, 32, 48, 64, 128}
    assert [case.name for case in select("peers", "^b4 ")] == ["b4 h16 kv4096"]
    assert select("peers", None, ["b7 h12 kv9 page16"]) == [Case(7, 12, 9, page_size=16)]


def test_the_target_grid_is_that_of_the_targets():
    groups = [
        [f"b128 h{h} kv8192" for h in (16, 32, 64)],
        ["b32 h16 kv4096", "b64 s_q2 h16 kv4096"],
        ["b1 h16 kv131072", "b1 h128 kv131072"],
        [f"b{b} h16 kv{kv}" for b in (1, 4, 8) for kv in (1024, 2048, 4096, 8192)],
        ["b1 h128 kv8192"],
        ["b128 h128 kv4096", "b128 h128 kv8192", "b128 s_q2 h128 kv4096"],
        ["b64 h16 ragged256-65536", "b64 h128 ragged256-65536"],
    ]
    assert [case.name for case in TARGET] == [name for group in groups for name in group]


@pytest.mark.parametrize("dtype", CACHE_ROW_BYTES)
def test_inputs_use_every_page_once(dtype):
    case = Case(3, 2, (5, 60), page_size=16)
    x = Pool.for_cases([case], CPU).inputs(case, dtype)
    used = [int(x.block_table[i, j]) for i, pages in enumerate(case.pages()) for j in range(pages)]
    assert sorted(used) == list(range(x.cache.shape[0]))
    assert x.seq_lens.tolist() == case.seq_lens()
    assert layout.cache_format(x.cache) == dtype
    values = layout.read_cache(x.cache, x.k_scale)
    assert values.std() == pytest.approx(KEY_STD, rel=0.05) and values.isfinite().all()


def test_fp8_cache_is_the_rounded_bf16_cache():
    case = Case(1, 1, 64)
    pool = Pool.for_cases([case], CPU)
    plain, rounded = pool.inputs(case, "bf16").cache.float(), pool.inputs(case, "fp8").cache.float() * FP8_K_SCALE
    assert torch.allclose(plain, rounded, rtol=1 / 16, atol=FP8_K_SCALE * 2**-9)


@pytest.mark.parametrize("name", ["b1 h1 kv64", "prefill s4 h4 topk64 kv128"])
def test_ds_mla_cache_is_the_rounded_bf16_cache(name):
    """Scales are no powers of two, which readers of codes have to stand, but for prefill."""
    case = Case.parse(name)
    pool = Pool.for_cases([case], CPU)
    cache = pool.inputs(case, "fp8_ds_mla").cache
    scales = cache[..., layout.DS_MLA_SCALES_OFFSET : layout.DS_MLA_ROPE_OFFSET].contiguous().view(torch.float32)
    powers = (torch.frexp(scales).mantissa == 0.5).float().mean()
    assert powers == 1 if case.prefill else powers < 0.1
    plain, rounded = pool.inputs(case, "bf16").cache.float(), layout.read_cache(cache)
    assert torch.allclose(plain, rounded, rtol=1 / 16, atol=float(scales.max()) * 2**-9)
    assert torch.equal(plain[..., 512:], rounded[..., 512:])


class Exact(providers.Reference):
    name = "fusedmla"


class Shifted(providers.Reference):
    """Wrong by more than any tolerance."""

    name = "fusedmla-noschedule"

    def prepare(self, x):
        prepared = super().prepare(x)
        return providers.Prepared(lambda: tuple(t + 1 for t in prepared.call()), prepared.unpack, "none")


class NoFp8(providers.Reference):
    name = "fa3"
    dtypes: tuple[str, ...] = ("bf16",)
    strict = False


class Missing(providers.Provider):
    name = "flashmla"

    def runs_on_cpu(self):
        return True

    def load(self):
        raise providers.Unavailable("not installed here")


class Broken(providers.Reference):
    name = "triton_mla"
    strict = False

    def prepare(self, x):
        raise RuntimeError("boom\nsecond line")


class Picky(providers.Reference):
    name = "flashinfer"
    strict = False

    def prepare(self, x):
        raise providers.Unsupported("page size 64 only")


@pytest.fixture
def fakes(monkeypatch):
    fakes = {fake.name: fake for fake in (Exact, Shifted, NoFp8, Missing, Broken, Picky)}
    monkeypatch.setattr(providers, "ALL", fakes)
    monkeypatch.setattr(providers, "FALLBACKS", {})
    return fakes


def run(tmp_path, names, *more):
    path = tmp_path / "run.json"
    args = ["--case", "b2 s_q2 h4 kv70 page16", "--providers", names, "--reps", "2", "--device", "cpu"]
    code = bench_decode.Bench(bench_decode.parse([*args, "--json", str(path), *more])).main()
    return code, json.loads(path.read_text())


def test_a_run_saves_measured_rows(fakes, tmp_path, capsys):
    dtypes = "bf16,fp8,fp8_ds_mla"
    code, saved = run(tmp_path, "fusedmla,fa3", "--dtypes", dtypes, "--csv", str(tmp_path / "run.csv"))
    assert code == 0
    status = {(row["provider"], row["dtype"]): row["status"] for row in saved["rows"]}
    assert status == {
        ("fusedmla", "bf16"): "ok",
        ("fusedmla", "fp8"): "ok",
        ("fa3", "bf16"): "ok",
        ("fa3", "fp8"): "unsupported",
        ("fusedmla", "fp8_ds_mla"): "ok",
        ("fa3", "fp8_ds_mla"): "unsupported",
    }
    row = saved["rows"][0]
    assert row["p20_us"] <= row["median_us"] <= row["p80_us"] and row["method"] == "host clock"
    assert row["torch"] == torch.__version__ and row["version"] == f"torch {torch.__version__}"
    assert row["gbs"] == pytest.approx(Case.parse(row["case"]).min_bytes("bf16") / row["median_us"] / 1e3)
    assert 0 < row["max_abs_error"] < 4e-3 and row["cosine_difference"] < 5e-6
    assert "running" not in saved
    assert len(list(csv.DictReader((tmp_path / "run.csv").open()))) == 6
    assert "| b2 s_q2 h4 kv70 page16 |" in capsys.readouterr().out


def test_an_absent_peer_is_a_note(fakes, tmp_path, capsys):
    code, saved = run(tmp_path, "fusedmla,flashmla")
    assert code == 0
    assert saved["rows"][1]["status"] == "absent"
    assert "note: flashmla is absent: not installed here" in capsys.readouterr().out


def test_a_failing_peer_does_not_stop_the_run(fakes, tmp_path, capsys):
    code, saved = run(tmp_path, "triton_mla,flashinfer,fusedmla")
    assert code == 0
    assert [row["status"] for row in saved["rows"]] == ["error", "unsupported", "ok"]
    assert "error: triton_mla bf16: RuntimeError: boom [b2" in capsys.readouterr().out


def test_a_wrong_result_fails_the_run(fakes, tmp_path, capsys):
    code, saved = run(tmp_path, "fusedmla,fusedmla-noschedule")
    assert code == 1
    assert [row["status"] for row in saved["rows"]] == ["ok", "FAIL"]
    assert "outputs out of tolerance" in saved["rows"][1]["note"]
    assert " FAIL |" in capsys.readouterr().out


def test_a_stand_in_is_used_and_named(fakes, tmp_path, monkeypatch):
    monkeypatch.setattr(providers, "FALLBACKS", {"flashmla": "fa3"})
    code, saved = run(tmp_path, "flashmla")
    assert code == 0 and saved["rows"][0]["status"] == "ok"
    assert saved["rows"][0]["version"] == f"torch {torch.__version__}"


def test_resuming_measures_only_what_is_missing(fakes, tmp_path):
    _, first = run(tmp_path, "fusedmla")
    path = tmp_path / "run.json"
    first["running"] = {"case": first["rows"][0]["case"], "provider": "fa3", "dtype": "bf16"}
    path.write_text(json.dumps(first))
    code, second = run(tmp_path, "fusedmla,fa3,flashmla", "--resume")
    assert code == 0  # a peer's row that ended the program is an error row, not a failure of this project
    assert second["rows"][0] == first["rows"][0]
    assert [(row["provider"], row["status"]) for row in second["rows"][1:]] == [
        ("fa3", "error"),
        ("flashmla", "absent"),
    ]


def test_comparison_with_an_older_run_sets_the_exit_code(fakes, tmp_path):
    _, saved = run(tmp_path, "fusedmla")
    old = tmp_path / "old.json"
    for factor, expected in ((1e6, 0), (1e-6, 1)):
        changed = [row | {"median_us": row["median_us"] * factor} for row in saved["rows"]]
        old.write_text(json.dumps({"rows": changed}))
        assert run(tmp_path, "fusedmla", "--compare", str(old))[0] == expected


def row(case="c", provider="fusedmla", median=100.0, status="ok", **more):
    return {
        "case": case,
        "provider": provider,
        "dtype": "bf16",
        "median_us": median,
        "status": status,
        "note": "",
    } | more


@pytest.mark.parametrize(("new", "worse"), [(104.9, False), (105.1, True), (60.0, False)])
def test_a_regression_is_over_five_percent(new, worse):
    text, found = report.compare([row(median=new)], [row(median=100.0)])
    assert found is worse and ("REGRESSION" in text) is worse


def test_a_row_that_fails_now_is_a_regression_and_an_absent_one_is_not():
    assert report.compare([row(status="FAIL")], [row()])[1]
    assert not report.compare([row(status="absent")], [row()])[1]
    assert not report.compare([row()], [row(status="FAIL")])[1]


def test_table_shows_the_best_correct_peer_over_ours():
    rows = [
        row(
            provider="fusedmla",
            median=100.0,
            gbs=4000.0,
            tflops=500.0,
            copy_percent=94.0,
            read_percent=89.0,
            matmul_percent=70.0,
        ),
        row(provider="fa3", median=125.0),
        row(provider="flashmla", median=50.0, status="FAIL"),
        row(provider="flashinfer", median=150.0),
    ]
    lines = report.table(rows, "bf16").splitlines()
    assert len({len(line) for line in lines}) == 1
    cells = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    assert cells == ["c", "100.0", "125.0", "50.0 FAIL", "150.0", "4000", "94", "89", "500", "70", "1.25"]


def test_figures_are_shares_of_the_ceilings():
    case = Case.parse("b128 h16 kv8192")
    ceilings = {"copy_gbs": 4000.0, "read_gbs": 4500.0, "matmul_tflops": 700.0}
    found = report.figures(case, "bf16", 300.0, ceilings)
    assert found["gbs"] == pytest.approx(case.min_bytes("bf16") / 300e-6 / 1e9)
    assert found["copy_percent"] == pytest.approx(found["gbs"] / 40)
    assert found["read_percent"] == pytest.approx(found["gbs"] / 45)
    assert found["matmul_percent"] == pytest.approx(found["tflops"] / 7)


def test_the_read_kernel_reads_everything(device):
    read_rate = pytest.importorskip("benchmarks.read_rate")
    source = torch.rand(3 * 8192, device=device)
    torch.testing.assert_close(read_rate.sum_of_blocks(source), source.view(3, -1).sum(1), rtol=1e-5, atol=0)
    assert timing.Timer(torch.device(device), reps=2)._read_us(4 * source.numel()) > 0
    with pytest.raises(ValueError, match="multiple of 8192 values, got 8193"):
        read_rate.sum_of_blocks(torch.rand(8193, device=device))


@pytest.mark.parametrize("dtype", CACHE_ROW_BYTES)
def test_the_portable_provider_runs_the_portable_kernel(dtype, device):
    pytest.importorskip("triton")
    case = Case.parse("b3 s_q2 h5 kv70 page16")
    x = Pool.for_cases([case], torch.device(device)).inputs(case, dtype)
    provider = providers.FusedMLAPortable()
    assert provider.name in providers.ALL and dtype in provider.dtypes
    provider.load()
    assert provider.plan_for(x).config.kernel == "triton"
    prepared = provider.prepare(x)
    verdict = check.judge(*prepared.unpack(prepared.call()), check.expected(x), check.PEER[dtype])
    assert prepared.config.startswith("triton") and verdict.ok, verdict.reason


def test_percentiles():
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert [timing.percentile(values, f) for f in (0.0, 0.2, 0.5, 0.8, 1.0)] == pytest.approx([1.0, 1.8, 3.0, 4.2, 5.0])


def test_cosine_difference():
    x = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert check.cosine_difference(x, x) == 0.0
    assert check.cosine_difference(x, -x) == 2.0
    assert check.cosine_difference(x, 2 * x) == pytest.approx(0.2)


@pytest.mark.parametrize("where", ["out", "lse"])
def test_judgement_sees_non_finite_values(where):
    want = check.Expected([0], torch.ones(1, 1, 2, 512, dtype=torch.float64), torch.zeros(1, 1, 2, dtype=torch.float64))
    got = {"out": torch.ones(3, 1, 2, 512), "lse": torch.zeros(3, 1, 2)}
    assert check.judge(got["out"], got["lse"], want, check.STRICT["bf16"]).ok
    got[where][0, 0, 1] = float("nan")
    verdict = check.judge(got["out"], got["lse"], want, check.STRICT["bf16"])
    assert not verdict.ok and "non-finite" in verdict.reason


def test_judgement_covers_chosen_requests():
    assert check.requests_to_check([5, 9, 1, 7, 3]) == [0, 4, 1, 2]
    assert check.requests_to_check([5]) == [0]
    assert check.requests_to_check([5, 5, 5]) == [0, 2, 1]
