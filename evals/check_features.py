# SPDX-License-Identifier: Apache-2.0
"""Check FUSEDMLA together with what vLLM offers around an attention backend, on one machine with one or two GPUs.

    python evals/check_features.py --gpus 2 --parallel 6 --out results/features
    python evals/check_features.py --gpus 1 --jobs 'plain|prefix' --out results/features

Every feature is an engine in processes of its own that answers the same seeded chain-recall prompts greedily: chunked
prefill, prefix caching, tensor parallelism with forked and with spawned workers, decode context parallelism, and
`vllm serve` over HTTP. Its tokens are compared with the right answers and with those of the plain run of the same
model and cache dtype (one GPU, eager, whole prompts, no prefix cache), and the engine's own figures have to show that
the feature was at work. OUT/features.md and OUT/features.json are written anew after each. Exit code 1 if one failed.

Ranks talk through NCCL alone: other transports use NVLink multicast, which hosts shared with others may not allow.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from evals import compare_backends
from evals.features_report import PLAIN, Feature, markdown, summarise

WORKER = compare_backends.ROOT / "evals" / "features_worker.py"
NCCL_ONLY = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "VLLM_ALLREDUCE_USE_FLASHINFER": "0",
    "VLLM_USE_DIRECT_DCP_A2A": "0",
    "VLLM_USE_DIRECT_DCP_Q_GATHER": "0",
    "VLLM_USE_DIRECT_DCP_KV_GATHER": "0",
}


def features(demo: str, wide: str) -> list[Feature]:
    """What is checked, the slowest starters first. `demo`: the shipped model; `wide`: one with more heads."""
    two: dict[str, Any] = {"tensor_parallel_size": 2, "disable_custom_all_reduce": True}
    extension = {"worker_extension_cls": "evals.nccl_fallback.WorkerExtension"}
    shared = {**two, **extension, "decode_context_parallel_size": 2}
    exchanged = {**shared, "dcp_comm_backend": "a2a"}
    chunks = {"max_num_batched_tokens": 512}
    spawn = {"VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    fork = {"VLLM_WORKER_MULTIPROC_METHOD": "fork"}
    lower, by_config = {"attention_backend": "fusedmla"}, {"attention_config": {"backend": "FUSEDMLA"}}
    cached = {"enable_prefix_caching": True}
    found = [
        Feature("serve", "serve", demo, "fp8"),
        Feature("dcp2 bf16", "dcp", wide, options=shared, gpus=2),
        Feature("dcp2 fp8, chunks", "dcp", wide, "fp8", options=shared | chunks, gpus=2),
        Feature("dcp2 a2a", "dcp", wide, options=exchanged, gpus=2),
        Feature("dcp2 interleave 16", "dcp", demo, options=shared | {"cp_kv_cache_interleave_size": 16}, gpus=2),
        Feature("tp2 spawn", "tp", wide, options=two | by_config, env=spawn, gpus=2),
        Feature("tp2 spawn fp8, lower case", "tp", demo, "fp8", options=two | lower, env=spawn, gpus=2),
        Feature("tp2 fork", "tp", wide, options=two, env=fork, gpus=2),
        Feature("chunked, lower case", "chunked", demo, options=chunks | lower),
        Feature("chunked fp8, attention_config", "chunked", wide, "fp8", options=chunks | by_config),
        Feature("prefix cache, attention_config", "prefix", wide, options=cached | by_config, passes=2),
        Feature("prefix cache fp8, lower case", "prefix", demo, "fp8", options=cached | lower, passes=2),
    ]
    compared = dict.fromkeys((f.model, f.kv_cache_dtype) for f in found if f.kind != "serve")
    plain = [Feature("", PLAIN, model, dtype, mode="eager") for model, dtype in compared]
    return found + [dataclasses.replace(feature, name=feature.plain_name) for feature in plain]


def result_path(feature: Feature, args: argparse.Namespace) -> pathlib.Path:
    """Where a feature's result is saved."""
    return args.out / "runs" / (re.sub(r"[^a-z0-9]+", "-", feature.name.lower()) + ".json")


def report(args: argparse.Namespace, todo: list[Feature], results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Write features.json and features.md from the features that have run; the rows."""
    rows = summarise(todo, results)
    (args.out / "features.json").write_text(json.dumps(rows, indent=1) + "\n")
    (args.out / "features.md").write_text(markdown(rows, compare_backends.settings(args)))
    return rows


def run(feature: Feature, gpu: int | None, args: argparse.Namespace, plugin: str | None) -> dict[str, Any]:
    """Run one feature in a process group of its own; its saved result. `gpu`: the one that it shall see, None: all."""
    path = result_path(feature, args)
    log = path.with_suffix(".log")
    path.unlink(missing_ok=True)
    about = dataclasses.asdict(feature) | {"serve": feature.kind == "serve", "timeout": args.timeout}
    about["log"] = str(path.with_suffix(".server.log"))
    env = dict(os.environ)
    env["PYTHONPATH"] = os.pathsep.join(
        part for part in (str(compare_backends.ROOT), plugin or "", env.get("PYTHONPATH", "")) if part
    )
    # Functions travel to the ranks, which report what they did.
    env |= {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1", **NCCL_ONLY, **feature.env}
    env.setdefault("VLLM_NO_USAGE_STATS", "1")
    if gpu is not None:
        env["CUDA_VISIBLE_DEVICES"] = str(gpu)
    begin = time.monotonic()
    with log.open("w") as output:
        request = json.dumps({"feature": about, "settings": compare_backends.settings(args)})
        process = subprocess.Popen(
            [sys.executable, str(WORKER), request, str(path)],
            env=env,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        ended = "exit code"
        try:
            process.wait(args.timeout)
        except subprocess.TimeoutExpired:
            ended = f"timed out after {args.timeout:.0f} s, exit code"
        finally:
            compare_backends._end_group(process)
    result = json.loads(path.read_text()) if path.exists() else {"error": f"{ended} {process.returncode}"}
    result["seconds"] = round(time.monotonic() - begin, 1)
    path.write_text(json.dumps(result) + "\n")
    return result


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo-model", default="evals/models/demo", metavar="PATH")
    parser.add_argument("--wide-model", default="evals/models/heads16", metavar="PATH", help="one with more heads")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--jobs", metavar="REGEX", help="only features whose name matches")
    parser.add_argument("--gpus", type=int, default=1, help="features that take more are left out")
    parser.add_argument("--parallel", type=int, default=1, help="engines at a time")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one engine")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs (on a CPU)")
    parser.add_argument("--report", action="store_true", help="run nothing, write the report from OUT/runs")
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--max-prompt", type=int, default=8192, help="longest prompt and answer in tokens")
    parser.add_argument("--max-tokens", type=int, default=32, help="answer length")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kv-cache-gib", type=float, default=2.0, help="KV cache of each engine and GPU")
    parser.add_argument("--max-num-seqs", type=int, default=64)
    return parser.parse_args(argv, argparse.Namespace(block_size=None))


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    todo = [feature for feature in features(args.demo_model, args.wide_model) if feature.gpus <= args.gpus]
    todo = [feature for feature in todo if args.jobs is None or re.search(args.jobs, feature.name)]
    if args.eager:
        todo = [dataclasses.replace(feature, mode="eager") for feature in todo]
    (args.out / "runs").mkdir(parents=True, exist_ok=True)
    plugin = compare_backends.plugin_path()
    results: dict[str, dict[str, Any]] = {}
    if args.report:
        saved = {feature.name: result_path(feature, args) for feature in todo}
        results = {name: json.loads(path.read_text()) for name, path in saved.items() if path.exists()}
        todo = [feature for feature in todo if feature.name in results]
    with concurrent.futures.ThreadPoolExecutor(max(args.parallel, 1)) as pool:
        futures = {}
        for number, feature in enumerate([] if args.report else todo):
            gpu = number % args.gpus if feature.gpus < args.gpus else None
            futures[pool.submit(run, feature, gpu, args, plugin)] = feature
        for future in concurrent.futures.as_completed(futures):
            feature = futures[future]
            results[feature.name] = future.result()
            print(f"{feature.name}: {results[feature.name].get('error', 'ran')}", flush=True)
            report(args, todo, results)
    rows = report(args, todo, results)
    print("\n" + markdown(rows, compare_backends.settings(args)))
    return 1 if any(row["problems"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
