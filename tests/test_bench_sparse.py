# SPDX-License-Identifier: Apache-2.0
"""The benchmark's sparse cases without a GPU: names, counts, inputs, runs, and how the peers are called."""

import json

import pytest
import torch

from benchmarks import bench_decode, check, providers, report, targets, timing
from benchmarks.cases import SPARSE, Case
from benchmarks.inputs import Pool
from benchmarks.providers import sparse_fa3, sparse_flashinfer, sparse_flashmla
from benchmarks.providers.reference import SparseReference
from vllm_fusedmla import ops
from vllm_fusedmla.kernels import layout, sparse_reference

CPU = torch.device("cpu")
DECODE = "b2 s_q2 h4 topk128 kv150"
PREFILL = "prefill s4 h6 topk128 kv200"


def inputs(name, dtype, device=CPU):
    case = Case.parse(name)
    return Pool.for_cases([case], device).inputs(case, dtype)


@pytest.mark.parametrize(
    "name",
    [*targets.SPARSE, "b128 s_q2 h64 topk2048", "b2 h8 topk64 kv300 page16", "prefill s9 h6 topk64 kv200 page48"],
)
def test_a_sparse_case_is_its_name(name):
    assert Case.parse(name).name == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("b2 h8 topk2048 kv100", "topk must be 1 to kv = 100"),
        ("b2 h8 topk0", "topk must be 1 to kv"),
        ("b2 h8 topk64 ragged100-200", "topk must be 1 to kv"),
        ("prefill s9 h6 kv200", "case must look like"),
        ("prefill s9 s_q2 h6 topk64", "case must look like"),
    ],
)
def test_a_bad_sparse_case_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        Case.parse(name)


# By hand: megabytes of rows of 656 bytes, of the query and of the output; 2 x lists x topk x heads x 1088 operations.
@pytest.mark.parametrize(
    ("name", "rows", "rest_mb", "gflop"),
    [
        ("b128 h16 topk2048", 128 * 2048, 128 * 16 * 2176e-6, 9.13),
        ("b128 h64 topk2048", 128 * 2048, 128 * 64 * 2176e-6, 36.5),
        ("b128 s_q2 h128 topk2048", 128 * 3968, 256 * 128 * 2176e-6, 146.0),  # 4096 - 2048^2 / 32768 distinct rows
        ("prefill s4096 h128 topk2048", 32768, 4096 * 128 * 2176e-6, 2336.5),
    ],
)
def test_counts_of_known_cases(name, rows, rest_mb, gflop):
    case = Case.parse(name)
    assert case.rows_read() == rows
    assert case.min_bytes("fp8_ds_mla") / 1e6 == pytest.approx(rows * 656e-6 + rest_mb)
    assert case.flops() / 1e9 == pytest.approx(gflop, rel=2e-3)


def test_the_sparse_grid_has_the_targets():
    assert [case.name for case in SPARSE] == list(targets.SPARSE)
    decode = [(case.b, case.s_q, case.h_q) for case in SPARSE if not case.prefill]
    assert decode == [
        *((128, s_q, 128) for s_q in (1, 2)),
        *((128, 1, h) for h in (64, 16, 8)),
        *((8, 1, h) for h in (64, 16)),
        *((1, 1, h) for h in (128, 64, 32, 16)),
    ]
    assert [(case.s_q, case.h_q) for case in SPARSE if case.prefill] == [(4096, h) for h in (128, 64, 16)]
    assert {case.topk for case in SPARSE} == {2048}
    assert all((name, dtype) in targets.RATIOS for name in targets.SPARSE for dtype in ("fp8_ds_mla", "bf16"))


def test_the_table_shows_the_targets():
    row = {"dtype": "bf16", "status": "ok", "note": "", "gbs": 1.0, "tflops": 2.0}
    rows = [
        row | {"case": case, "provider": name, "median_us": median}
        for case, median in (("b8 h16 topk2048", 10.0), ("b9 h16 topk2048", 20.0))
        for name, median in (("fusedmla", median), ("fa3", 15.0))
    ]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.table(rows, "bf16").splitlines()]
    assert lines[0][-2:] == ["peer/ours", "target"]
    assert [line[-2:] for line in lines[2:]] == [["1.50", "1.7"], ["0.75", ""]]


@pytest.mark.parametrize("name", [DECODE, PREFILL])
def test_lists_name_distinct_keys_of_their_request(name):
    x = inputs(name, "bf16")
    case = x.case
    assert x.indices is not None and x.slots is not None
    assert x.indices.shape == x.slots.shape == (case.b, case.s_q, case.topk) and x.slots.dtype == torch.int32
    assert not torch.equal(x.indices[0, 0], x.indices[0, 1])
    for b in range(case.b):
        for row, slots in zip(x.indices[b], x.slots[b], strict=True):
            assert len(set(row.tolist())) == case.topk and 0 <= row.min() and row.max() < case.kv
            assert row.tolist() != sorted(row.tolist())
            pages = x.block_table[b, row // case.page_size]
            assert torch.equal(slots, pages * case.page_size + row % case.page_size)


def test_bf16_lists_are_held_to_the_sparse_tolerance():
    sparse, dense = inputs(DECODE, "bf16"), inputs("b1 h1 kv64", "bf16")
    assert check.tolerance(sparse, True).absolute == check.tolerance(inputs(DECODE, "fp8"), True).absolute == 1e-3
    assert check.tolerance(dense, True) == check.STRICT["bf16"] and check.tolerance(sparse, False) == check.PEER["bf16"]


def judged(provider, x):
    """The verdict on what a provider computes, at a peer's tolerance."""
    prepared = provider.prepare(x)
    out, lse = prepared.unpack(prepared.call())
    verdict = check.judge(out, lse, check.expected(x), check.PEER[x.dtype])
    assert verdict.ok, verdict.reason
    return prepared


@pytest.mark.parametrize("dtype", ["bf16", "fp8", "fp8_ds_mla"])
@pytest.mark.parametrize("name", [DECODE, PREFILL])
@pytest.mark.parametrize("kind", ["fusedmla", "fusedmla-positions", "fusedmla-portable", "reference"])
def test_this_projects_providers(kind, name, dtype, device):
    pytest.importorskip("triton")
    provider = providers.SPARSE[kind]()
    provider.load()
    x = inputs(name, dtype, torch.device(device))
    if kind == "fusedmla-positions" and x.case.prefill:
        with pytest.raises(providers.Unsupported):
            provider.prepare(x)
        return
    prepared = judged(provider, x)
    if kind == "fusedmla-portable":
        assert prepared.config.startswith("triton")


class Recorder:
    """This project's functions of FlashMLA's names, and the arguments that they were called with."""

    def __init__(self):
        self.q_shape: list[int] = []
        self.arguments: dict = {}

    def get_mla_metadata(self):
        return ops.get_mla_metadata()

    def flash_mla_with_kvcache(self, **arguments):
        self.q_shape, self.arguments = list(arguments["q"].shape), arguments
        return ops.flash_mla_with_kvcache(**arguments)

    def flash_mla_sparse_fwd(self, q, *arguments, **named):
        self.q_shape, self.arguments = list(q.shape), named
        return ops.flash_mla_sparse_fwd(q, *arguments, **named)


def flashmla(name):
    """A provider of FlashMLA's that calls this project's functions of the same names."""
    provider = providers.SPARSE[name]()
    assert isinstance(provider, sparse_flashmla.SparseFlashMLA)
    provider._ops = Recorder()

    def to_bf16(cache, rows, table, starts, batch):
        assert batch == 1 and starts.tolist() == [0]
        rows.copy_(layout.read_cache(cache)[table[0].long()].flatten(0, 1)[: rows.shape[0]])

    provider._to_bf16 = to_bf16
    return provider


@pytest.mark.parametrize(
    ("kind", "name", "dtype", "q_shape"),
    [
        ("flashmla", DECODE, "fp8_ds_mla", [2, 2, 64, 576]),
        ("flashmla-mixed", DECODE, "fp8_ds_mla", [1, 4, 64, 576]),
        ("flashmla-schedule", DECODE, "fp8_ds_mla", [2, 2, 64, 576]),
        ("flashmla", "b1 h66 topk128 kv150", "fp8_ds_mla", [1, 1, 128, 576]),
        ("flashmla", DECODE, "bf16", [4, 64, 576]),
        ("flashmla", PREFILL, "bf16", [4, 64, 576]),
        ("flashmla", PREFILL, "fp8_ds_mla", [1, 4, 64, 576]),  # few heads: the decode kernel
        ("flashmla", PREFILL.replace("h6", "h33"), "fp8_ds_mla", [4, 64, 576]),  # more: converted rows
        ("flashmla-native", PREFILL.replace("h6", "h16"), "bf16", [4, 16, 576]),
        ("flashmla-native", PREFILL.replace("h6", "h16"), "fp8_ds_mla", [4, 16, 576]),
        ("flashmla-native", DECODE.replace("h4", "h8"), "bf16", [4, 8, 576]),
    ],
)
def test_how_flashmla_is_called(kind, name, dtype, q_shape):
    provider, x = flashmla(kind), inputs(name, dtype)
    judged(provider, x)
    recorded = provider._ops
    assert recorded.q_shape == q_shape
    converted = dtype != "bf16" and x.case.prefill and len(q_shape) == 3
    assert ("is_fp8_kvcache" in recorded.arguments) == (dtype == "fp8_ds_mla" and not converted)


@pytest.mark.parametrize(
    ("kind", "name", "dtype"),
    [
        ("flashmla", "b1 h8 topk100 kv150", "fp8_ds_mla"),
        ("flashmla", "b1 h8 topk64 kv150", "bf16"),
        ("flashmla", "b1 h8 topk128 kv150 page32", "fp8_ds_mla"),
        ("flashmla-mixed", "b1 h8 topk128 kv150", "fp8_ds_mla"),
        ("flashmla-mixed", DECODE, "bf16"),
        ("flashmla-schedule", DECODE, "bf16"),
        ("flashmla-native", DECODE, "bf16"),
        ("flashmla-native", DECODE.replace("h4", "h8"), "fp8_ds_mla"),
        ("flashmla-native", "prefill s9 h64 topk128 kv200", "bf16"),
    ],
)
def test_what_flashmla_does_not_take_or_takes_elsewhere(kind, name, dtype):
    with pytest.raises(providers.Unsupported):
        flashmla(kind).prepare(inputs(name, dtype))


def attend_pages_of_one_token(q_nope, q_rope, k_rope, latent, lists, scale):
    """Attention of rows ``[T, h, ...]`` to the pages that lists name, in the peers' split form."""
    cache = torch.cat([latent, k_rope], -1).flatten(0, -2).unsqueeze(1)
    q = torch.cat([q_nope, q_rope], -1).unsqueeze(1)
    out, lse = sparse_reference.mla_sparse_decode(q, cache, lists.unsqueeze(1), sm_scale=scale)
    return out.squeeze(1), lse.squeeze(1)


@pytest.mark.parametrize("name", [DECODE, PREFILL])
def test_how_flash_attention_is_called(name):
    def attend(q, k, v, q_v, cu_seqlens_q, seqused_k, block_table, softmax_scale, **more):
        assert cu_seqlens_q.tolist() == list(range(q.shape[0] + 1)) and k.shape[1:3] == v.shape[1:3] == (1, 1)
        assert seqused_k.tolist() == [more["max_seqlen_k"]] * q.shape[0] and more["max_seqlen_q"] == 1
        out, lse = attend_pages_of_one_token(q_v, q, k, v, block_table, softmax_scale)
        return out, lse.transpose(0, 1)

    provider = sparse_fa3.SparseFlashAttention3()
    provider._attend = attend
    judged(provider, inputs(name, "bf16"))


@pytest.mark.parametrize("name", [DECODE, PREFILL])
def test_how_flashinfer_is_called(name):
    class Wrapper:
        def __init__(self, workspace, backend):
            assert backend == "fa3"

        def plan(self, metadata, **options):
            starts, ends, pages, lengths = metadata
            assert options["page_size"] == 1 and not options["causal"]
            assert starts.tolist() == list(range(lengths.numel() + 1)) and ends[-1] == pages.numel() == lengths.sum()
            self.lists, self.scale = pages.view(lengths.numel(), -1), options["sm_scale"]

        def run(self, query, kv_cache, out, lse, **options):
            assert [tuple(part.shape[1:]) for part in kv_cache] == [(1, 512), (1, 64)]
            nope, rope = query
            results = attend_pages_of_one_token(nope, rope, kv_cache[1], kv_cache[0], self.lists, self.scale)
            return out.copy_(results[0]), lse.copy_(results[1])

    class Metadata:
        @staticmethod
        def csr(*parts):
            return parts

    provider = sparse_flashinfer.SparseFlashInfer()
    provider._wrapper, provider._plan_metadata = Wrapper, Metadata
    provider._workspace = torch.empty(1)
    judged(provider, inputs(name, "bf16"))


class Exact(SparseReference):
    name = "fusedmla"


class Dense(providers.Reference):
    name = "fusedmla"


def test_a_run_of_dense_and_sparse_cases(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(providers, "ALL", {"fusedmla": Dense})
    monkeypatch.setattr(providers, "SPARSE", {"fusedmla": Exact, "fa3": providers.SPARSE["fa3"]})
    path = tmp_path / "run.json"
    cases = ["--case", DECODE, "--case", "b2 h4 kv70 page16", "--case", PREFILL]
    options = ["--providers", "fusedmla,fa3", "--dtypes", "bf16,fp8_ds_mla", "--reps", "2", "--device", "cpu"]
    assert bench_decode.Bench(bench_decode.parse([*cases, *options, "--json", str(path)])).main() == 0
    rows = json.loads(path.read_text())["rows"]
    status = {(row["case"], row["provider"]): row["status"] for row in rows if row["dtype"] == "bf16"}
    names = [Case.parse(name).name for name in (DECODE, "b2 h4 kv70 page16", PREFILL)]
    assert [status[name, "fusedmla"] for name in names] == ["ok"] * 3
    assert [status[name, "fa3"] for name in names] == ["absent", "unsupported", "absent"]
    assert all(row["max_abs_error"] < 1e-3 for row in rows if row["provider"] == "fusedmla")
    printed = capsys.readouterr().out
    assert "no dense attention" in printed and f"| {names[2]}" in printed


def test_the_sparse_grid_brings_its_providers():
    assert bench_decode.parse(["--grid", "sparse"]).providers == list(providers.DEFAULT_SPARSE)
    assert bench_decode.parse([]).providers == list(providers.DEFAULT)
    assert set(providers.DEFAULT_SPARSE) <= set(providers.SPARSE) and set(providers.DEFAULT) <= set(providers.ALL)
    everything = bench_decode.parse(["--providers", "all"]).providers
    assert len(everything) == len(set(everything)) and set(everything) == set(providers.ALL) | set(providers.SPARSE)


@pytest.mark.parametrize("tensor", [torch.ones(3), torch.ones(3, dtype=torch.int32), torch.ones(2, 2).bfloat16()])
def test_spoiled_results_are_recognised(tensor):
    assert not timing.spoiled(tensor)
    timing.spoil(tensor)
    assert timing.spoiled(tensor)
    tensor.view(-1)[1] = 0
    assert not timing.spoiled(tensor)
    assert [t.data_ptr() for t in timing.result_tensors((None, [tensor, torch.ones(2, dtype=torch.int64)]))] == [
        tensor.data_ptr()
    ]
