# SPDX-License-Identifier: Apache-2.0
"""The check of vLLM's features without an engine: what is run, how steps are counted, how results are judged."""

import copy
import json
from types import SimpleNamespace

import pytest

from evals import check_features, features_report, features_worker
from evals.features_report import PLAIN, compare, markdown, problems, summarise

FEATURES = {feature.name: feature for feature in check_features.features("models/demo", "models/heads16")}


def answer(tokens, logprobs=None, right=True):
    return {"tokens": tokens, "logprobs": logprobs or [-0.5] * len(tokens), "right": right}


def good_result(feature):
    """What a feature's worker saves when all is well."""
    names = {"fork": "ForkProcess", "spawn": "SpawnProcess"}
    rank = {
        "process": names.get(feature.env.get("VLLM_WORKER_MULTIPROC_METHOD"), "ForkProcess"),
        "configured_backend": "FUSEDMLA",
        "impls": ["FusedMLAImpl"],
        "heads": [8],
        "dcp": [feature.options.get("decode_context_parallel_size", 1)],
        "steps": {"decode": 31, "mixed": 9, "prefill": 1, "context": 8},
        "most_tokens_in_a_step": 512,
        "graph_replays": 31,
        "fusedmla": {"tokens": 4, "scheduled": 40},
        "versions": {"vllm": "0.33.0", "device": "a GPU"},
    }
    passes = [
        {"cached_tokens": 100 * number, "answers": [answer([1, 2, 3]), answer([4, 5, 6])]}
        for number in range(feature.passes)
    ]
    ranks = [copy.deepcopy(rank) for _ in range(feature.options.get("tensor_parallel_size", 1))]
    return {"passes": passes, "ranks": ranks, "start_seconds": 1.0, "seconds": 2.0}


def judge(name, result):
    feature = FEATURES[name]
    plain = good_result(FEATURES[feature.plain_name])
    row = summarise([feature], {feature.name: result, feature.plain_name: plain})[0]
    return row["problems"]


def test_every_compared_feature_has_its_plain_run():
    compared = [feature for feature in FEATURES.values() if feature.kind not in (PLAIN, "serve")]
    assert len(compared) == 11
    for feature in compared:
        plain = FEATURES[feature.plain_name]
        same = (plain.model, plain.kv_cache_dtype) == (feature.model, feature.kv_cache_dtype)
        assert plain.kind == PLAIN and plain.mode == "eager" and not plain.options and same


def test_features_cover_the_ways_to_ask_and_to_start():
    options = [feature.options for feature in FEATURES.values()]
    assert any(found.get("attention_backend") == "fusedmla" for found in options)
    assert any(found.get("attention_config") == {"backend": "FUSEDMLA"} for found in options)
    methods = {feature.env.get("VLLM_WORKER_MULTIPROC_METHOD") for feature in FEATURES.values() if feature.gpus == 2}
    assert {"fork", "spawn"} <= methods
    assert {feature.kv_cache_dtype for feature in FEATURES.values() if feature.kind == "dcp"} == {"auto", "fp8"}


@pytest.mark.parametrize("name", [name for name, feature in FEATURES.items() if feature.kind != "serve"])
def test_a_good_result_passes(name):
    assert judge(name, good_result(FEATURES[name])) == []


@pytest.mark.parametrize(
    ("name", "change", "complaint"),
    [
        ("tp2 spawn", {"process": "ForkProcess"}, "process is a ForkProcess"),
        ("tp2 fork", {"process": "SpawnProcess"}, "process is a SpawnProcess"),
        ("tp2 fork", {"impls": ["TritonMLAImpl"]}, "TritonMLAImpl"),
        ("tp2 fork", {"configured_backend": None}, "configured backend None"),
        ("tp2 fork", {"fusedmla": {}}, "decoded nothing"),
        ("tp2 fork", {"graph_replays": 0}, "no CUDA graph"),
        ("dcp2 bf16", {"dcp": [1]}, "decode context parallel size"),
        ("chunked, lower case", {"most_tokens_in_a_step": 513}, "513 tokens"),
        ("chunked, lower case", {"steps": {"decode": 3, "prefill": 4, "context": 2}}, "decodes and prefills"),
        ("chunked, lower case", {"steps": {"decode": 3, "mixed": 4}}, "second step"),
    ],
)
def test_what_a_rank_did_not_do_is_named(name, change, complaint):
    result = good_result(FEATURES[name])
    result["ranks"][-1] |= change
    found = judge(name, result)
    assert len(found) == 1 and complaint in found[0]


def test_missing_ranks_cache_hits_and_other_tokens_are_named():
    result = good_result(FEATURES["tp2 fork"])
    del result["ranks"][1]
    assert judge("tp2 fork", result) == ["1 ranks, not 2"]
    name = "prefix cache, attention_config"
    result = good_result(FEATURES[name])
    result["passes"][1]["cached_tokens"] = 0
    result["passes"][1]["answers"][0]["tokens"] = [1, 2, 9]
    assert judge(name, result) == [
        "the second pass found 0 cached tokens",
        "1 of 2 answers differ from the plain run's",
    ]


def test_errors_and_missing_plain_runs_are_problems():
    feature = FEATURES["tp2 fork"]
    assert problems(feature, {"error": "timed out"}, []) == ["timed out"]
    (row,) = summarise([feature], {feature.name: good_result(feature)})
    assert row["problems"] == ["there is no plain run to compare with"]


def test_served_answers_need_evidence_in_the_log():
    feature = FEATURES["serve"]
    good = {"right": [True, True], "evidence": {"FUSEDMLA: first decode": "FUSEDMLA: first decode, b = 1"}}
    assert problems(feature, good, []) == []
    bad = {"right": [True, False], "evidence": {"FUSEDMLA: first decode": ""}}
    assert problems(feature, bad, []) == [
        "the server's log has no 'FUSEDMLA: first decode'",
        "1 of 2 answers wrong",
    ]


def test_differences_count_up_to_the_first_other_token():
    rows = [answer([1, 2, 3], [-0.1, -0.2, -0.3]), answer([4, 5, 6], [-0.1, -0.2, -0.3])]
    plain = [answer([1, 2, 3], [-0.1, -0.25, -0.3]), answer([4, 9, 6], [-0.1, -5.0, -7.0])]
    found = compare(rows, plain)
    assert (found["same"], found["of"]) == (1, 2)
    assert found["max_logprob_difference"] == pytest.approx(0.05)


def test_steps_are_counted_by_what_is_in_them():
    recorder = features_worker.StepRecorder()
    prompt, rest = SimpleNamespace(chunked_context=None), SimpleNamespace(chunked_context=object())
    for decodes, prefills, prefill, tokens in ((0, 2, prompt, 300), (3, 1, rest, 512), (4, 0, None, 4)):
        recorder.count(
            SimpleNamespace(num_decodes=decodes, num_prefills=prefills, prefill=prefill, num_actual_tokens=tokens)
        )
    assert recorder.kinds == {"prefill": 1, "mixed": 1, "context": 1, "decode": 1}
    assert recorder.most_tokens == 512


def test_options_ask_for_the_backend_in_one_way(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 16384}))
    settings = check_features.compare_backends.settings(check_features.parse(["--out", str(tmp_path)]))
    asked = set()
    for feature in check_features.features(str(tmp_path), str(tmp_path)):
        options = features_worker.engine_options(vars(feature), settings)
        by_name, by_config = options.get("attention_backend", ""), options.get("attention_config", {})
        assert bool(by_name) != bool(by_config)
        asked.add(by_name or f"config {by_config['backend']}")
        assert ("enforce_eager" in options) == (feature.mode == "eager")
        assert options["enable_prefix_caching"] == (feature.kind == "prefix")
    assert asked == {"FUSEDMLA", "fusedmla", "config FUSEDMLA"}


def test_features_run_in_processes_that_may_fail(tmp_path, monkeypatch):
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import json, os, pathlib, sys\n"
        "feature = json.loads(sys.argv[1])['feature']\n"
        "if feature['kind'] == 'tp': sys.exit(3)\n"
        "seen = {name: os.environ.get(name) for name in ('CUDA_VISIBLE_DEVICES', 'NCCL_NVLS_ENABLE')}\n"
        "pathlib.Path(sys.argv[2]).write_text(json.dumps({'seen': seen}))\n"
    )
    monkeypatch.setattr(check_features, "WORKER", worker)
    args = check_features.parse(["--out", str(tmp_path), "--gpus", "2"])
    (tmp_path / "runs").mkdir()
    assert check_features.run(FEATURES["tp2 fork"], None, args, None)["error"] == "exit code 3"
    result = check_features.run(FEATURES["chunked, lower case"], 1, args, None)
    assert result["seen"] == {"CUDA_VISIBLE_DEVICES": "1", "NCCL_NVLS_ENABLE": "0"}


def test_the_table_names_verdict_and_versions():
    feature = FEATURES["prefix cache, attention_config"]
    plain = FEATURES[feature.plain_name]
    results = {one.name: good_result(one) for one in (feature, plain)}
    results[plain.name]["ranks"][0]["impls"] = []
    rows = summarise([feature, plain], results)
    text = markdown(rows, {"prompts": 2, "max_prompt": 64, "max_tokens": 3, "seed": 0})
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert "vllm 0.33.0" in text and len(lines) == 4
    assert all(line.count("|") == len(features_report.COLUMNS) + 1 for line in lines)
    assert "PASS" in lines[2] and "0 / 100 cached tokens" in lines[2] and "2 of 2 / 2 of 2" in lines[2]
    assert "attention by []" in lines[3]


@pytest.mark.parametrize(("binding", "taken"), [(None, "base"), ("off", "base"), ("on", "bound")])
def test_reduce_scatter_falls_back_where_the_nccl_binding_is_off(monkeypatch, binding, taken):
    pytest.importorskip("vllm")
    fallback = pytest.importorskip("evals.nccl_fallback")
    monkeypatch.setattr(fallback, "_bound", lambda self, tensor, dim: ("bound", tensor, dim))
    base = fallback.DeviceCommunicatorBase
    monkeypatch.setattr(base, "reduce_scatter", lambda self, tensor, dim: ("base", tensor, dim))
    communicator = object.__new__(fallback.CudaCommunicator)
    communicator.pynccl_comm = None if binding is None else SimpleNamespace(disabled=binding == "off")
    assert communicator.reduce_scatter("rows", 1) == (taken, "rows", 1)
