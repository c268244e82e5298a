# SPDX-License-Identifier: Apache-2.0
"""The comparison of served backends without an engine: jobs, prompts, running and resuming, differences, the report."""

import importlib.metadata
import json
import sys
import types

import pytest
import torch

from evals import compare_backends, compare_report, compare_worker
from evals.compare_backends import Job
from evals.tasks.chain_recall import correct_hops
from vllm_fusedmla.counts import DecodeCounter


def options(tmp_path, *more):
    return compare_backends.parse(["--model", "demo", "--out", str(tmp_path), *more])


def names(tmp_path, *more):
    return [job.name for job in compare_backends.make_jobs(options(tmp_path, *more))]


def test_all_combinations_baseline_first(tmp_path):
    found = names(tmp_path, "--kv-cache-dtypes", "auto,fp8", "--modes", "eager,graph")
    assert len(found) == 12 and found[0] == "demo-FLASHMLA-auto-eager"
    assert set(found) == {
        f"demo-{backend}-{dtype}-{mode}"
        for backend in ("FUSEDMLA", "TRITON_MLA", "FLASHMLA")
        for dtype in ("auto", "fp8")
        for mode in ("eager", "graph")
    }


def test_speculation_and_invariance_add_jobs(tmp_path):
    found = names(tmp_path, "--backends", "FUSEDMLA", "--spec-tokens", "1", "--batch-invariance", "--model", "other")
    assert found[:4] == [
        "demo-FUSEDMLA-auto-eager",
        "demo-FUSEDMLA-auto-eager-spec1",
        "demo-FUSEDMLA-auto-eager-invariance",
        "demo-FUSEDMLA-auto-eager-control",
    ]
    assert len(found) == 8
    assert names(tmp_path, "--spec-tokens", "1", "--jobs", "TRITON.*spec1$") == ["demo-TRITON_MLA-auto-eager-spec1"]


def test_the_own_indexer_adds_twins_of_this_projects_jobs(tmp_path):
    found = names(tmp_path, "--backends", "FUSEDMLA,FLASHMLA_SPARSE", "--own-indexer")
    assert found == ["demo-FUSEDMLA-auto-eager", "demo-FLASHMLA_SPARSE-auto-eager", "demo-FUSEDMLA-auto-eager-indexer"]
    for job, asked in (
        (Job("m", "FUSEDMLA", "auto", "eager"), False),
        (Job("m", "FUSEDMLA", "auto", "eager", own_indexer=True), True),
        (Job("m", "FUSEDMLA", "auto", "eager", kind="control"), True),
    ):
        assert (compare_backends.environment(job, None).get("VLLM_FUSEDMLA_INDEXER") == "1") is asked


def test_batch_invariance_is_set_for_its_job_only():
    for kind, value in (("generate", "0"), ("control", "0"), ("invariance", "1")):
        env = compare_backends.environment(Job("m", "FUSEDMLA", "auto", "eager", kind=kind), "/plugin")
        assert env["VLLM_BATCH_INVARIANT"] == value and env["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
        assert env["PYTHONPATH"].split(":")[:2] == [str(compare_backends.ROOT), "/plugin"]


def test_the_source_tree_can_stand_in_for_an_installed_plugin(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [])
    folder = compare_backends.plugin_path()
    monkeypatch.undo()
    assert folder is not None
    (distribution,) = importlib.metadata.distributions(path=[folder])
    entries = {(entry.group, entry.name): entry.value for entry in distribution.entry_points}
    assert entries["vllm.general_plugins", "fusedmla"] == "vllm_fusedmla.plugin:register"


def test_prompts_are_the_same_everywhere_and_of_mixed_length():
    examples = compare_worker.make_prompts(9, 8192, 32, seed=3)
    assert examples == compare_worker.make_prompts(9, 8192, 32, seed=3)
    assert examples != compare_worker.make_prompts(9, 8192, 32, seed=4)
    lengths = sorted(len(example.prompt_ids) + len(example.answer_ids) for example in examples)
    assert lengths[0] == 1 + 3 * 64 + 2 + 32 and lengths[-1] == 8192
    ratios = [b / a for a, b in zip(lengths, lengths[1:], strict=False)]
    assert max(ratios) / min(ratios) < 1.02
    assert all(len(example.answer_ids) == 32 and correct_hops(example, example.answer) == 32 for example in examples)


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 16384}))
    return str(folder)


def engine(tmp_path, model, **job):
    fields = {"model": model, "backend": "FUSEDMLA", "kv_cache_dtype": "fp8", "mode": "graph"} | job
    settings = compare_backends.settings(options(tmp_path))
    return compare_worker.engine_options(vars(Job(**fields)), settings)


def test_engine_options(tmp_path, model):
    graph = engine(tmp_path, model, spec_tokens=1)
    assert graph["compilation_config"]["cudagraph_mode"] == "FULL_DECODE_ONLY" and "enforce_eager" not in graph
    assert graph["compilation_config"]["cudagraph_capture_sizes"][0] == 2
    assert graph["compilation_config"]["cudagraph_capture_sizes"][-1] == 2 * graph["max_num_seqs"]
    assert graph["speculative_config"]["num_speculative_tokens"] == 1
    eager = engine(tmp_path, model, mode="eager")
    assert eager["enforce_eager"] and "compilation_config" not in eager and "speculative_config" not in eager
    assert eager["max_model_len"] == 8192 + 64 and "enable_prefix_caching" not in eager
    invariance = engine(tmp_path, model, mode="eager", kind="invariance")
    assert invariance["enable_prefix_caching"] is False
    assert invariance["max_num_batched_tokens"] >= 32 * 3072


FAKE_WORKER = """
import json, pathlib, sys, time
request, path = json.loads(sys.argv[1]), pathlib.Path(sys.argv[2])
backend = request["job"]["backend"]
print("INFO 01-01 [backend.py:1] FUSEDMLA: first decode of the fake")
if backend == "SLOW":
    time.sleep(60)
if backend == "BROKEN":
    sys.exit("no such backend")
row = {"prompt_tokens": 9, "tokens": [1, 2], "logprobs": [-0.5, -1.0], "right": True,
       "top": [{"1": -0.5}, {"2": -1.0, "3": -1.25}]}
if backend == "FUSEDMLA":
    row |= {"tokens": [1, 3], "logprobs": [-0.75, -1.0], "right": False}
decode = {"steps": 1, "tokens": 1, "largest_batch": 1, "graph_replays": 0, "steps_by_query_len": {"1": 1}}
path.write_text(json.dumps(request | {"status": "ok", "answers": [row], "versions": {"device": "fake", "vllm": "0"},
    "start_seconds": 1, "generate_seconds": 1, "cudagraph_mode": "NONE", "block_size": 16, "decode": decode,
    "kernels": {"sparse_kernel": 7},
    "fusedmla": {"tokens": 1, "scheduled": 1, "sparse swapab": 1} if backend == "FUSEDMLA" else {}}))
"""


@pytest.fixture
def fake_worker(tmp_path, monkeypatch):
    path = tmp_path / "worker.py"
    path.write_text(FAKE_WORKER)
    monkeypatch.setattr(compare_backends, "WORKER", path)


def compare(tmp_path, backends, *more):
    out = tmp_path / "out"
    code = compare_backends.main(
        ["--model", "demo", "--out", str(out), "--backends", backends, "--baseline", "FLASHMLA-auto-eager", *more]
    )
    return code, json.loads((out / "comparison.json").read_text())


def test_jobs_run_and_are_compared(tmp_path, fake_worker):
    code, summary = compare(tmp_path, "FUSEDMLA,FLASHMLA", "--parallel", "2")
    assert code == 0
    (pair,) = summary["pairs"]
    assert (pair["job"], pair["against"]) == ("FUSEDMLA-auto-eager", "FLASHMLA-auto-eager")
    assert pair["identical"] == 0 and pair["first_divergences"] == [1] and pair["gaps"] == [0.25]
    assert pair["tokens_compared"] == 1 and pair["max_logprob_difference"] == 0.25
    assert summary["jobs"][1]["log_lines"] == ["FUSEDMLA: first decode of the fake"]
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "| demo: FUSEDMLA-auto-eager | FLASHMLA-auto-eager | 0 of 1 | 2.5e-01 |" in text


def test_saved_jobs_are_not_run_again(tmp_path, fake_worker):
    assert compare(tmp_path, "FLASHMLA")[0] == 0
    path = tmp_path / "out" / "runs" / "demo-FLASHMLA-auto-eager.json"
    stamp = path.stat().st_mtime_ns
    compare(tmp_path, "FLASHMLA,FUSEDMLA")
    assert path.stat().st_mtime_ns == stamp
    compare(tmp_path, "FLASHMLA", "--seed", "1")  # other prompts: the saved answers do not count
    assert path.stat().st_mtime_ns != stamp


@pytest.mark.parametrize(
    ("backend", "more", "error"),
    [("BROKEN", (), "exit code 1: no such backend"), ("SLOW", ("--timeout", "1"), "timed out after 1 s")],
)
def test_a_failed_job_is_reported_and_the_others_run(tmp_path, fake_worker, backend, more, error):
    code, summary = compare(tmp_path, f"{backend},FLASHMLA", *more)
    assert code == 1
    status = {job["name"]: job["status"] for job in summary["jobs"]}
    assert status == {f"demo-{backend}-auto-eager": "error", "demo-FLASHMLA-auto-eager": "ok"}
    assert error in (tmp_path / "out" / "comparison.md").read_text()


def test_the_own_indexer_is_compared_with_its_twin(tmp_path, fake_worker):
    code, summary = compare(tmp_path, "FUSEDMLA,FLASHMLA", "--own-indexer")
    assert code == 0
    found = [(pair["job"], pair["against"], pair["kind"]) for pair in summary["pairs"]]
    assert ("FUSEDMLA-auto-eager-indexer", "FUSEDMLA-auto-eager", "indexer") in found
    assert ("FUSEDMLA-auto-eager", "FLASHMLA-auto-eager", "equal conditions") in found and len(found) == 3
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "## This project's indexer against vLLM's" in text
    assert "- demo-FUSEDMLA-auto-eager: `sparse_kernel` 7" in text and "| 1, sparse swapab: 1 |" in text


def answer(tokens, logprobs, top=None, length=9):
    top = top or [{str(token): value} for token, value in zip(tokens, logprobs, strict=True)]
    return {"prompt_tokens": length, "tokens": tokens, "logprobs": logprobs, "top": top, "right": True}


def test_difference_of_equal_answers_is_nothing():
    rows = [answer([1, 2, 3], [-0.1, -0.2, -0.3])]
    found = compare_report.difference(rows, rows)
    assert found["identical"] == 1 and found["first_divergences"] == [] and found["max_logprob_difference"] == 0.0


def test_difference_stops_at_the_first_other_token():
    base = [answer([1, 2, 3], [-0.1, -0.2, -0.3]), answer([7, 8], [-1.0, -2.0])]
    other = [answer([1, 5, 3], [-0.3, -9.0, -9.0]), answer([7, 8], [-1.0, -2.5])]
    found = compare_report.difference(base, other)
    assert found["identical"] == 1 and found["first_divergences"] == [1] and found["gaps"] == [None]
    assert found["tokens_compared"] == 3 and found["max_logprob_difference"] == pytest.approx(0.5)
    assert found["mean_logprob_difference"] == pytest.approx((0.2 + 0.0 + 0.5) / 3)


def test_rivals_of_a_sure_model_are_compared():
    base = [answer([1, 2], [0.0, 0.0], top=[{"1": 0.0, "5": -9.0, "6": -9.5}, {"2": 0.0, "7": -8.0}])]
    other = [answer([1, 2], [0.0, 0.0], top=[{"1": 0.0, "5": -9.25, "9": -9.4}, {"2": 0.0, "7": -8.5}])]
    found = compare_report.difference(base, other)
    assert found["max_logprob_difference"] == 0.0
    assert found["max_rival_difference"] == 0.5 and found["mean_rival_difference"] == pytest.approx(0.375)


def test_answers_to_other_prompts_are_not_compared():
    with pytest.raises(ValueError, match="different prompts"):
        compare_report.difference([answer([1], [-1.0], length=9)], [answer([1], [-1.0], length=8)])


def summary_of(**job):
    base = {"name": "j", "status": "ok", "backend": "FUSEDMLA", "mode": "eager", "fusedmla": {"scheduled": 5}}
    return {"jobs": [base | {"decode": {"graph_replays": 0}} | job], "invariance": []}


def test_what_passes():
    assert compare_report.passed(summary_of())
    assert compare_report.passed(summary_of(backend="FLASHMLA", fusedmla=None))
    assert not compare_report.passed(summary_of(status="error"))
    assert not compare_report.passed(summary_of(fusedmla={"scheduled": 0}))
    assert not compare_report.passed(summary_of(mode="graph"))
    assert compare_report.passed(summary_of(mode="graph", decode={"graph_replays": 3}))


@pytest.mark.parametrize(
    ("kind", "same", "good"), [("invariance", True, True), ("invariance", False, False), ("control", False, True)]
)
def test_other_bits_fail_only_where_equal_ones_are_promised(kind, same, good):
    summary = summary_of()
    summary["invariance"] = [{"kind": kind, "comparisons": [{"same_bits": True}, {"same_bits": same}]}]
    assert compare_report.passed(summary) is good


def test_recorder_counts_a_step_once_although_builders_call_their_base():
    class Base:
        def _build_decode(self, **kwargs):
            return kwargs["num_decode_tokens"]

    class Derived(Base):
        def _build_decode(self, **kwargs):
            return super()._build_decode(**kwargs)

    recorder = compare_worker.DecodeRecorder()
    for builder in (Base, Derived):
        recorder._wrap(builder)
    lengths = torch.ones(4)
    assert Derived()._build_decode(seq_lens_device=lengths, num_decode_tokens=8) == 8
    assert Base()._build_decode(seq_lens_device=lengths[:3], num_decode_tokens=3) == 3
    assert recorder.summary() == {
        "steps": 2,
        "tokens": 11,
        "largest_batch": 4,
        "graph_replays": 0,
        "steps_by_query_len": {"1": 1, "2": 1},
    }


def test_recorder_counts_sparse_decodes():
    class Base:
        def build(self, decodes, tokens):
            return types.SimpleNamespace(num_decodes=decodes, num_decode_tokens=tokens)

    class Derived(Base):
        def build(self, decodes, tokens):
            return super().build(decodes, tokens)

    recorder = compare_worker.DecodeRecorder()
    for builder in (Base, Derived):
        recorder._wrap_sparse(builder)
    assert Derived().build(4, 8).num_decode_tokens == 8
    Base().build(0, 0)  # nothing but prefills
    Base().build(3, 3)
    assert recorder.summary()["steps_by_query_len"] == {"1": 1, "2": 1} and recorder.summary()["tokens"] == 11


def test_counters_of_both_kinds_of_layers_add_up(monkeypatch):
    for module, name, kind in (("backend", "decode_tokens", "dense"), ("sparse_metadata", "sparse_tokens", "sparse")):
        counter = DecodeCounter(kind)
        counter.tokens, counter.scheduled = 2, 3
        counter.record("swapab", 5)
        monkeypatch.setitem(sys.modules, f"vllm_fusedmla.{module}", types.SimpleNamespace(**{name: counter}))
    assert compare_worker.fusedmla_counters() == {
        "tokens": 4,
        "scheduled": 6,
        "dense swapab": 5,
        "sparse swapab": 5,
    }


def test_the_worker_saves_its_failure(tmp_path, monkeypatch):
    result = tmp_path / "result.json"

    def fail(request):
        raise RuntimeError("engine core failed\nsee above")

    monkeypatch.setattr(compare_worker.os, "_exit", sys.exit)
    monkeypatch.setattr(sys, "argv", ["compare_worker.py", json.dumps({"name": "j"}), str(result)])
    with pytest.raises(SystemExit, match="1"):
        compare_worker.work(fail)
    assert json.loads(result.read_text()) == {
        "name": "j",
        "status": "error",
        "error": "RuntimeError: engine core failed",
    }
    with pytest.raises(SystemExit, match="0"):
        compare_worker.work(lambda request: request | {"status": "ok"})
    assert json.loads(result.read_text()) == {"name": "j", "status": "ok"}
