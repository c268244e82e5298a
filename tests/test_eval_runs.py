# SPDX-License-Identifier: Apache-2.0
"""`fusedmla eval` around its engines: what is run and compared, what is kept, and what the report says of it.

A small program stands for the engines. It answers a hundred prompts, decodes two texts, and does what its backend's
name says.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

for module in ("scipy", "matplotlib", "lm_eval"):
    pytest.importorskip(module)

from vllm_fusedmla.__main__ import build_parser, main  # noqa: E402
from vllm_fusedmla.evaluation import cli, configurations, runner  # noqa: E402
from vllm_fusedmla.evaluation.configurations import Plan, Run  # noqa: E402

ENGINE = """
import json, pathlib, sys, time
request, folder = json.loads(pathlib.Path(sys.argv[1]).read_text()), pathlib.Path(sys.argv[2])
run, settings = request["run"], request["settings"]
backend = run["backend"]
bad = run["fault"] == "nonsense" or backend == "WRONG"
def save(path, value):  # as the worker does: runs look at each other's files
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value))
    partial.replace(path)

decoded = {"dense reference": 100} if backend == "FUSEDMLA" and run["kv_cache_dtype"] != "idle" else {}
about = {"versions": {"vllm": "0", "device": "fake"}, "start_seconds": 1, "seconds": 1, "decoded": decoded}
print("fusedmla eval: task x", flush=True)
if backend == "SLOW":
    time.sleep(60)
if backend == "REFUSED" or backend == f"REFUSED_{run['kv_cache_dtype']}":
    sys.exit("ValueError: REFUSED is not valid for this configuration. Reason: ['kv_cache_dtype not supported']")
if backend == "BROKEN":
    sys.exit("no such backend")
if run["teacher"]:
    import numpy as np
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(40, 10))
    logits += np.random.default_rng(len(backend)).normal(size=logits.shape) * (1e-3 if not bad else 0.5)
    logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    order = np.argsort(-logprobs, axis=1)
    np.savez(folder / "teacher.npz", text=np.repeat([0, 1], 20), position=np.tile(np.arange(20), 2),
             token=np.zeros(40, int), logprob=logprobs[:, 0], top_tokens=order,
             top_logprobs=np.take_along_axis(logprobs, order, 1), whole=True)
    save(folder / "teacher.json", about | {"texts": 2, "tokens": 40})
else:
    for task in settings["tasks"]:
        if (folder / f"task.{task}.json").exists():
            continue
        if task == "later" and not (folder.parent.parent / "go_on").exists():
            sys.exit("interrupted")
        rows = []
        for i in range(100):
            right = float(i % 10 != 0 and not (bad and i % 3 == 0))
            rows.append({"id": [str(i % 99), "p", "none"], "values": {"exact_match": right}, "answer": str(right),
                         "text": "", "where": {"length": 100 * (i % 2), "depth": i % 4 / 4}})
        scores = {"exact_match,none": sum(row["values"]["exact_match"] for row in rows) / 100}
        result = about | {"results": {task: scores}, "samples": {task: rows}}
        save(folder / f"task.{task}.json", result)
"""


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "engine.py").write_text(ENGINE)
    monkeypatch.setattr(runner, "WORKER", (sys.executable, str(tmp_path / "engine.py")))
    return tmp_path / "out"


def evaluate(out: Path, *options: str) -> tuple[int, dict[str, Any], str]:
    code = main(["eval", "--model", "some/model", "--tasks", "maths", "--out", str(out), *options])
    return code, json.loads((out / "report.json").read_text()), (out / "report.md").read_text()


def test_same_answers_pass(out: Path) -> None:
    code, summary, text = evaluate(out, "--backends", "FUSEDMLA,FLASHMLA,TRITON_MLA", "--margin", "0.1")
    assert code == 0 and summary["passed"] and summary["findings"] == []
    kinds = {(row["kind"], row["other_run"], row["base_run"]): row for row in summary["comparisons"]}
    assert set(kinds) == {
        ("rerun", "FUSEDMLA-auto-rerun", "FUSEDMLA-auto"),
        ("backend", "FUSEDMLA-auto", "FLASHMLA-auto"),
        ("backend", "FUSEDMLA-auto", "TRITON_MLA-auto"),
    }
    for row in kinds.values():
        assert (row["n"], row["unpaired"], row["difference"], row["verdict"]) == (100, 0, 0.0, "same")
    reference = [row for row in summary["forced"] if row["kind"] == "reference"]
    assert [(row["other_run"], row["base_run"]) for row in reference] == [("TRITON_MLA-auto", "FLASHMLA-auto")]
    for row in summary["forced"]:
        if row["kind"] == "backend":
            assert row["kl_limit"] == 2 * reference[0]["kl"] and row["limit_source"] == "twice that of other backends"
            assert row["verdict"] == "same"
        if row["kind"] == "rerun":
            assert row["kl"] == 0.0 and row["top1_agreement"] == 1.0
    assert {cell["value"] for cell in summary["maps"]["FUSEDMLA-auto"]["maths"]} <= {0.8, 0.88, 0.9, 0.92, 0.96, 1.0}
    for name in ("differences.png", "divergence.png", "maths.png"):
        assert (out / name).stat().st_size > 5000 and f"]({name})" in text
    assert "**No difference found**" in text and "| FUSEDMLA-auto | ok | dense reference: 200 |" in text


def test_a_difference_is_found(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, summary, text = evaluate(out, "--backends", "FUSEDMLA,WRONG")
    assert code == 1
    (row,) = (row for row in summary["comparisons"] if row["kind"] == "backend")
    # In doubt about who is right, a gain from equal weights is a difference too.
    assert row["verdict"] == "better" and row["difference"] > 0.2 and row["p"] < 1e-6
    found = "FUSEDMLA-auto against WRONG-auto: maths: exact_match better"
    assert any(finding.startswith(found) for finding in summary["findings"])
    assert any("KL" in finding and "above 2.0e-04" in finding for finding in summary["findings"])
    assert found in text and found in capsys.readouterr().err


def test_injected_faults_are_reported_and_do_not_fail(out: Path) -> None:
    code, summary, text = evaluate(out, "--backends", "FUSEDMLA", "--fault", "nonsense", "--fault", "harmless")
    assert code == 0
    by_name = {row["fault"]: row for row in summary["faults"]}
    assert by_name["nonsense"]["caught"] and not by_name["harmless"]["caught"]
    assert (
        by_name["nonsense"]["measures"]["maths: exact_match"] and by_name["nonsense"]["measures"]["teacher-forced: KL"]
    )
    assert "| FUSEDMLA-auto+harmless | **no** |" in text and "| FUSEDMLA-auto+nonsense | yes |" in text


def test_without_decoded_tokens_it_fails(out: Path) -> None:
    code, summary, text = evaluate(out, "--backends", "FUSEDMLA", "--kv-cache-dtypes", "auto,idle")
    assert code == 1 and summary["findings"] == [
        f"{name}: no token passed FUSEDMLA's decode" for name in ("FUSEDMLA-idle", "FUSEDMLA-idle-rerun")
    ]
    assert "FUSEDMLA decoded nothing in maths" in text


@pytest.mark.parametrize(
    ("backend", "options", "reason"),
    [("BROKEN", (), "exit code 1: no such backend"), ("SLOW", ("--timeout", "3"), "timed out after 3 s")],
)
def test_a_failed_configuration_is_shown_and_the_others_run(
    out: Path, backend: str, options: tuple[str, ...], reason: str
) -> None:
    code, summary, text = evaluate(
        out, "--backends", f"FUSEDMLA,{backend},FLASHMLA", "--teacher-forced", "none", *options
    )
    assert code == 1 and summary["findings"] == [f"{backend}-auto: error: {reason}"]
    assert {row["base_run"] for row in summary["comparisons"]} == {"FUSEDMLA-auto", "FLASHMLA-auto"}
    assert f"| {backend}-auto | error: {reason} |" in text


def stamps(out: Path) -> dict[str, int]:
    return {str(path.relative_to(out)): path.stat().st_mtime_ns for path in out.glob("runs/*/*.json")}


def test_a_run_may_start_anew_while_its_state_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread removes its files then: what was there a moment ago need not be there to be read."""
    settings: dict[str, Any] = {"tasks": ["maths"], "variants": {}}
    monkeypatch.setattr(Path, "exists", lambda path: True)
    for run in (Run("FUSEDMLA", "auto"), Run("FUSEDMLA", "auto", teacher=True)):
        assert runner.state(run, settings, tmp_path)["status"] == "unfinished"
        folder = runner.folder_of(run, tmp_path)
        folder.mkdir(parents=True)
        runner._save(folder / "request.json", {"fingerprint": configurations.fingerprint(run, settings)})
        assert runner.state(run, settings, tmp_path)["status"] == "unfinished"


def test_it_goes_on_where_it_stopped(out: Path) -> None:
    options = ("--backends", "FUSEDMLA", "--teacher-forced", "maths")
    both = [*options, "--tasks", "maths,later"]
    code, summary, _ = evaluate(out, *both)
    assert code == 1 and "interrupted" in summary["findings"][0]
    before = stamps(out)
    (out / "go_on").touch()
    assert evaluate(out, *both)[0] == 0
    after = stamps(out)
    kept = [name for name in before if name.endswith(("maths.json", "teacher.json"))]
    assert len(kept) == 4 and all(after[name] == before[name] for name in kept)
    assert evaluate(out, *options, "--margin", "0.5")[0] == 0 and stamps(out) == after  # only judged anew
    evaluate(out, *options, "--seed", "1")
    assert all(stamps(out)[name] != before[name] for name in kept)  # other prompts: nothing saved counts


def test_the_report_alone(out: Path) -> None:
    assert evaluate(out, "--backends", "FUSEDMLA")[0] == 0
    runs = stamps(out)
    code, summary, _ = evaluate(out, "--backends", "FUSEDMLA,FLASHMLA", "--report")
    assert code == 1 and stamps(out) == runs
    assert summary["findings"] == ["FLASHMLA-auto: unfinished: not run"]


def test_the_plan() -> None:
    plan = Plan(("FUSEDMLA", "FLASHMLA", "TRITON_MLA"), ("auto", "fp8"), ("", "dense"), ("x", "y:fp8:dense"), (False,))
    names = [run.configuration for run in plan.runs]
    assert names[:2] == ["FUSEDMLA-auto", "FUSEDMLA-auto-rerun"] and len(names) == len(set(names)) == 3 * 2 * 2 + 2 + 2
    pairs = {kind: set() for kind in configurations.PAIR_KINDS}  # type: dict[str, set[tuple[str, str]]]
    for kind, base, other in plan.pairs():
        pairs[kind].add((other.configuration, base.configuration))
    assert pairs["rerun"] == {(f"FUSEDMLA-{dtype}-rerun", f"FUSEDMLA-{dtype}") for dtype in ("auto", "fp8")}
    assert len(pairs["backend"]) == 2 * 4 and ("FUSEDMLA-fp8-dense", "TRITON_MLA-fp8-dense") in pairs["backend"]
    assert len(pairs["reference"]) == 4 and ("TRITON_MLA-fp8", "FLASHMLA-fp8") in pairs["reference"]
    assert len(pairs["cache"]) == 3 * 2 and ("FLASHMLA-fp8-dense", "FLASHMLA-auto-dense") in pairs["cache"]
    assert len(pairs["variant"]) == 3 * 2 and ("FUSEDMLA-fp8-dense", "FUSEDMLA-fp8") in pairs["variant"]
    assert pairs["fault"] == {("FUSEDMLA-auto+x", "FUSEDMLA-auto"), ("FUSEDMLA-fp8-dense+y", "FUSEDMLA-fp8-dense")}
    with pytest.raises(ValueError, match="fault x: FUSEDMLA-fp4 is not among the runs"):
        Plan(("FUSEDMLA",), ("auto",), faults=("x:fp4",))


def test_where_no_two_others_have_a_cache_one_of_them_repeats(out: Path) -> None:
    plan = Plan(("FUSEDMLA", "SPARSE", "OTHER"), ("auto", "fp8"))
    reruns = {run.name for run in plan.runs if run.rerun}
    assert reruns == {
        *(f"FUSEDMLA-{dtype}-rerun.{kind}" for dtype in ("auto", "fp8") for kind in ("tasks", "teacher")),
        "SPARSE-fp8-rerun.teacher",
    }
    assert ("reference", "SPARSE-fp8", "SPARSE-fp8-rerun") in {
        (kind, base.configuration, other.configuration) for kind, base, other in plan.pairs()
    }
    _, summary, _ = evaluate(out, "--backends", "FUSEDMLA,FLASHMLA,REFUSED_fp8", "--kv-cache-dtypes", "auto,fp8")
    rows = {(row["other_run"], row["base_run"]): row for row in summary["forced"]}
    assert rows["FLASHMLA-fp8-rerun", "FLASHMLA-fp8"]["kind"] == "reference"
    limit = rows["FUSEDMLA-fp8", "FLASHMLA-fp8"]
    assert limit["verdict"] == "same" and limit["kl_limit"] >= 2 * rows["REFUSED_fp8-auto", "FLASHMLA-auto"]["kl"]


def test_a_variant_of_one_configuration_alone() -> None:
    only = {"mma": ("FUSEDMLA", "fp8"), "eager": ("FUSEDMLA",)}
    plan = Plan(("FUSEDMLA", "FLASHMLA"), ("auto", "fp8"), ("", "mma", "eager"), kinds=(False,), only=only)
    mine = {run.configuration for run in plan.runs if run.variant}
    assert mine == {"FUSEDMLA-fp8-mma", "FUSEDMLA-auto-eager", "FUSEDMLA-fp8-eager"}
    pairs = {(kind, other.configuration, base.configuration) for kind, base, other in plan.pairs() if other.variant}
    assert pairs == {
        ("backend", "FUSEDMLA-fp8-mma", "FLASHMLA-fp8"),
        ("backend", "FUSEDMLA-auto-eager", "FLASHMLA-auto"),
        ("backend", "FUSEDMLA-fp8-eager", "FLASHMLA-fp8"),
        ("cache", "FUSEDMLA-fp8-mma", "FUSEDMLA-auto"),
        ("cache", "FUSEDMLA-fp8-eager", "FUSEDMLA-auto-eager"),
        ("variant", "FUSEDMLA-fp8-mma", "FUSEDMLA-fp8"),
        ("variant", "FUSEDMLA-auto-eager", "FUSEDMLA-auto"),
        ("variant", "FUSEDMLA-fp8-eager", "FUSEDMLA-fp8"),
    }


def test_fp8_is_measured_against_other_backends_fp8(out: Path) -> None:
    backends = ("--backends", "FUSEDMLA,FLASHMLA", "--kv-cache-dtypes", "auto,fp8")
    _, summary, _ = evaluate(out, *backends, "--parallel", "3")
    cache = {row["other_run"]: row for row in summary["forced"] if row["kind"] == "cache"}
    assert cache["FUSEDMLA-fp8"]["kl_limit"] == 2 * cache["FLASHMLA-fp8"]["kl"]
    assert cache["FLASHMLA-fp8"]["kl_limit"] is None


def test_a_cache_that_no_two_others_have_is_measured_against_their_first(out: Path) -> None:
    backends = ("--backends", "FUSEDMLA,FLASHMLA,REFUSED_fp8", "--kv-cache-dtypes", "auto,fp8")
    _, summary, _ = evaluate(out, *backends, "--kl-limit", "1e-12")
    rows = {(row["kind"], row["other_run"], row["base_run"]): row for row in summary["forced"]}
    reference = rows["reference", "REFUSED_fp8-auto", "FLASHMLA-auto"]
    for dtype, source in (("auto", "other backends"), ("fp8", "other backends, auto cache")):
        row = rows["backend", f"FUSEDMLA-{dtype}", f"FLASHMLA-{dtype}"]
        assert row["kl_limit"] == 2 * reference["kl"] and row["limit_source"] == f"twice that of {source}"
    _, summary, _ = evaluate(out, *backends, "--kl-limit", "0.5")
    limits = {row["other_run"]: row["kl_limit"] for row in summary["forced"] if row["kind"] == "backend"}
    assert limits == {"FUSEDMLA-auto": 2 * reference["kl"], "FUSEDMLA-fp8": 0.5}


def test_a_fault_that_was_not_run_is_not_caught(out: Path) -> None:
    _, summary, text = evaluate(out, "--backends", "FUSEDMLA", "--fault", "nonsense", "--report")
    assert not summary["faults"][0]["caught"] and "| FUSEDMLA-auto+nonsense | **no** |" in text
    assert "FUSEDMLA-auto+nonsense: unfinished: not run" in summary["findings"]


def test_what_another_backend_does_not_support_is_no_failure(out: Path) -> None:
    code, summary, text = evaluate(out, "--backends", "FUSEDMLA,REFUSED")
    assert code == 0 and summary["findings"] == []
    assert "| REFUSED-auto | not supported: ['kv_cache_dtype not supported'] |" in text
    code, summary, _ = evaluate(out, "--backends", "REFUSED,FUSEDMLA")
    assert code == 1 and "REFUSED-auto: error: exit code 1" in summary["findings"][0]


def test_settings_and_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("words")
    given = ["eval", "--model", str(tmp_path), "--out", "o", "--teacher-forced", str(text), "--limit", "20"]
    args = build_parser().parse_args([*given, "--variant", 'eager={"enforce_eager": true}'])
    settings = cli.settings_of(args)
    assert settings["name"] == tmp_path.name and settings["teacher"]["source"] == str(text)
    assert settings["limit"] == 20 and isinstance(settings["limit"], int)
    assert settings["variants"] == {"eager": {"enforce_eager": True}} and settings["tasks"] == cli.OFFLINE_TASKS
    assert configurations.task_file("my/tasks/mmlu_*.yaml") == "task.my_tasks_mmlu__.yaml.json"
    run = Run("FUSEDMLA", "auto", "eager")
    same = configurations.fingerprint(run, settings)
    assert same == configurations.fingerprint(run, settings | {"kl_limit": 1.0, "tasks": []})
    assert same != configurations.fingerprint(run, settings | {"seed": 9})
    for bad in (["--variant", "eager"], ["--model-args", "[1]"], ["--task-args", "{"]):
        with pytest.raises(SystemExit):
            build_parser().parse_args([*given, *bad])
    assert main(["eval", "--model", "m", "--tasks", "", "--teacher-forced", "none", "--out", str(tmp_path / "o")]) == 2
    assert "nothing to run" in capsys.readouterr().err


def test_environment_of_an_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    settings = {"variants": {"mma": {"environment": {"VLLM_FUSEDMLA_FP8_MMA": "1"}}}}
    tasks = runner.environment(Run("FUSEDMLA", "auto", fault="x"), tmp_path, settings)
    assert tasks["FUSEDMLA_COUNT_DIR"] == str(tmp_path / "counts") and tasks["FUSEDMLA_EVAL_FAULT"] == "x"
    assert tasks["VLLM_ENABLE_V1_MULTIPROCESSING"] == "1" and "VLLM_USE_V2_MODEL_RUNNER" not in tasks
    teacher = runner.environment(Run("FUSEDMLA", "auto", "mma", teacher=True), tmp_path, settings, "1,3")
    assert teacher["VLLM_USE_V2_MODEL_RUNNER"] == "0" and teacher["VLLM_FUSEDMLA_FP8_MMA"] == "1"
    assert teacher["CUDA_VISIBLE_DEVICES"] == "1,3" and "VLLM_FUSEDMLA_FP8_MMA" not in tasks


def test_engines_are_spread_over_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"model_args": {}, "variants": {}}

    def slots(parallel: int, **model_args: int) -> list[str]:
        found = runner.device_slots(parallel, settings | {"model_args": model_args})
        return [found.get() for _ in range(found.qsize())]

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,5")
    assert slots(1) == [""] and slots(4) == ["2", "3", "5", "2"]
    assert slots(2, tensor_parallel_size=2) == ["2,3"] * 2
    assert slots(2, tensor_parallel_size=4) == [""] * 2  # vLLM says what is missing
