# SPDX-License-Identifier: Apache-2.0
"""Serve small models with several attention backends and compare what comes out, token by token.

    python evals/compare_backends.py --model evals/models/demo --out results/demo
    python evals/compare_backends.py --model M1 --model M2 --kv-cache-dtypes auto,fp8 --modes eager,graph --out results
    python evals/compare_backends.py --model M1 --spec-tokens 1 --batch-invariance --jobs 'FUSEDMLA' --out results

Every combination of model, backend, KV cache dtype and mode is a job. A job is one engine in a process of its own,
which answers the same seeded chain-recall prompts greedily and saves tokens and log-probabilities in OUT/runs/JOB.json.
Jobs that are saved already are not run again, so an interrupted comparison goes on where it stopped. After every job
OUT/comparison.md and OUT/comparison.json are written anew.

--spec-tokens K adds speculative decoding with vLLM's n-gram drafter: batches of 1 + K query tokens a request.
--batch-invariance adds, for FUSEDMLA under VLLM_BATCH_INVARIANT=1, prompts answered alone and inside a batch,
compared bit by bit, and the same without the variable as a control.
--own-indexer adds, for FUSEDMLA and models with DeepSeek-V3.2's indexer, the same jobs with VLLM_FUSEDMLA_INDEXER=1,
each compared with its twin. Batch invariance of such models needs the variable, so those jobs always have it.

    python evals/compare_backends.py --model evals/models/demo-dsa --kv-cache-dtypes auto,fp8_ds_mla --out results \
        --backends FUSEDMLA,FLASHMLA_SPARSE,FLASH_ATTN_MLA_SPARSE --baseline FLASHMLA_SPARSE-auto-eager \
        --jobs '^(?!.*FLASH_ATTN_MLA_SPARSE-fp8)' --own-indexer

Exit code 1 if a job failed, a batch-invariant answer changed, or FUSEDMLA's jobs did not decode with FUSEDMLA.
"""

from __future__ import annotations

import argparse
import atexit
import concurrent.futures
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from evals import compare_report

ROOT = pathlib.Path(__file__).resolve().parent.parent
OURS = "FUSEDMLA"
WORKER = ROOT / "evals" / "compare_worker.py"


@dataclasses.dataclass(frozen=True)
class Job:
    """One engine to run.

    `kind` is "generate", "invariance" or "control" (the latter two: batch invariance). `own_indexer`: whether this
    project's indexer is asked for.
    """

    model: str
    backend: str
    kv_cache_dtype: str
    mode: str
    spec_tokens: int = 0
    kind: str = "generate"
    own_indexer: bool = False

    @property
    def name(self) -> str:
        model = pathlib.Path(self.model).resolve().name
        spec = f"-spec{self.spec_tokens}" if self.spec_tokens else ""
        kind = f"-{self.kind}" if self.kind != "generate" else ""
        indexer = "-indexer" if self.own_indexer else ""
        return f"{model}-{self.backend}-{self.kv_cache_dtype}-{self.mode}{spec}{kind}{indexer}"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True, help="model folder; repeat for several")
    parser.add_argument("--backends", default="FUSEDMLA,TRITON_MLA,FLASHMLA")
    parser.add_argument("--kv-cache-dtypes", default="auto")
    parser.add_argument("--modes", default="eager", help="eager, graph (full CUDA graphs for decode, no compilation)")
    parser.add_argument("--spec-tokens", type=int, default=0, help="also run with this many n-gram draft tokens")
    parser.add_argument("--batch-invariance", action="store_true", help="also compare bits alone and in a batch")
    parser.add_argument("--invariance-backends", default=OURS, help="backends of --batch-invariance")
    parser.add_argument("--own-indexer", action="store_true", help="FUSEDMLA also with VLLM_FUSEDMLA_INDEXER=1")
    parser.add_argument("--baseline", default="FLASHMLA-auto-eager", help="BACKEND-DTYPE-MODE (default: %(default)s)")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--jobs", metavar="REGEX", help="only jobs whose name matches")
    parser.add_argument("--list", action="store_true", help="print the jobs' names and stop")
    parser.add_argument("--force", action="store_true", help="run saved jobs again")
    parser.add_argument("--parallel", type=int, default=1, help="engines at a time on one GPU")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one job")
    parser.add_argument("--retries", type=int, default=0, help="further attempts of failed jobs, one at a time")
    parser.add_argument("--prompts", type=int, default=72)
    parser.add_argument("--max-prompt", type=int, default=8192, help="longest prompt and answer in tokens")
    parser.add_argument("--max-tokens", type=int, default=32, help="answer length")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kv-cache-gib", type=float, default=4.0, help="KV cache of each engine")
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--block-size", type=int, help="vLLM's --block-size; its own choice by default")
    args = parser.parse_args(argv)
    for option in ("backends", "invariance_backends", "kv_cache_dtypes", "modes"):
        setattr(args, option, getattr(args, option).split(","))
    if unknown := set(args.modes) - {"eager", "graph"}:
        parser.error(f"--modes: unknown {', '.join(sorted(unknown))}, choose from eager, graph")
    return args


def make_jobs(args: argparse.Namespace) -> list[Job]:
    """All combinations, the baseline's first: an unfinished comparison should at least have that."""
    jobs = []
    for model in args.model:
        plain = [
            Job(model, backend, dtype, mode)
            for mode in args.modes
            for dtype in args.kv_cache_dtypes
            for backend in args.backends
        ]
        plain.sort(key=lambda job: not job.name.endswith(args.baseline))
        jobs += plain
        if args.spec_tokens:
            jobs += [dataclasses.replace(job, spec_tokens=args.spec_tokens) for job in plain]
        if args.own_indexer:
            jobs += [dataclasses.replace(job, own_indexer=True) for job in plain if job.backend == OURS]
        if args.batch_invariance:
            for backend in args.invariance_backends:
                for dtype in args.kv_cache_dtypes:
                    jobs += [Job(model, backend, dtype, mode, kind="invariance") for mode in args.modes]
                jobs.append(Job(model, backend, args.kv_cache_dtypes[0], args.modes[0], kind="control"))
    return [job for job in jobs if args.jobs is None or re.search(args.jobs, job.name)]


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What all jobs of a comparison share, beside the versions of the software."""
    names = ("prompts", "max_prompt", "max_tokens", "seed", "kv_cache_gib", "max_num_seqs", "block_size")
    return {name: getattr(args, name) for name in names}


def plugin_path() -> str | None:
    """A folder whose metadata makes vLLM find the plugin in this source tree; None if a distribution is installed."""
    found = importlib.metadata.entry_points(group="vllm.general_plugins")
    if any(entry.value.startswith("vllm_fusedmla.") for entry in found):
        return None
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    folder = pathlib.Path(tempfile.mkdtemp(prefix="fusedmla-plugin-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    info = folder / "vllm_fusedmla-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0\n")
    lines = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return str(folder)


def environment(job: Job, plugin: str | None) -> dict[str, str]:
    """Environment of a job's process. The engine runs inside it, so that what it computed can be counted there."""
    env = dict(os.environ)
    paths = [str(ROOT), plugin or "", env.get("PYTHONPATH", "")]
    env["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    env.setdefault("VLLM_NO_USAGE_STATS", "1")
    env["VLLM_BATCH_INVARIANT"] = "1" if job.kind == "invariance" else "0"
    if job.own_indexer or job.kind != "generate":
        env["VLLM_FUSEDMLA_INDEXER"] = "1"
    return env


def run(job: Job, args: argparse.Namespace, plugin: str | None) -> dict[str, Any]:
    """Run one job in a process group of its own; its result, saved, with status "ok" or "error"."""
    runs = args.out / "runs"
    result_path, log_path = runs / f"{job.name}.json", runs / f"{job.name}.log"
    request = {"job": dataclasses.asdict(job), "name": job.name, "settings": settings(args)}
    begin = time.monotonic()
    # The worker writes beside the final name: a killed one must not leave half a result.
    partial = runs / f"{job.name}.partial.json"
    partial.unlink(missing_ok=True)
    with log_path.open("w") as log:
        process = subprocess.Popen(
            [sys.executable, str(WORKER), json.dumps(request), str(partial)],
            env=environment(job, plugin),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(args.timeout)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end_group(process)
    text = log_path.read_text(errors="replace")
    result = json.loads(partial.read_text()) if partial.exists() else {**request, "status": "error"}
    partial.unlink(missing_ok=True)
    if result["status"] != "ok" and "error" not in result:
        last = [line for line in text.splitlines() if line.strip()][-1:] or ["no output"]
        result["error"] = (
            f"timed out after {args.timeout:.0f} s" if code is None else f"exit code {code}: {last[0][:300]}"
        )
    result["seconds"] = round(time.monotonic() - begin, 1)
    result["fingerprint"] = fingerprint(job, args)
    result["parallel"] = args.parallel
    # vLLM's prefix of a log line (time, process, file) is noise here.
    result["log_lines"] = list(dict.fromkeys(m.group(0) for m in re.finditer(r"FUSEDMLA: .*", text)))[:4]
    result_path.write_text(json.dumps(result) + "\n")
    return result


def _end_group(process: subprocess.Popen) -> None:
    """End whatever a job has left running; its session holds nothing else."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def fingerprint(job: Job, args: argparse.Namespace) -> str:
    """Equal for runs that may stand in for each other: same job, same settings."""
    text = json.dumps(
        [dataclasses.asdict(job) | {"model": pathlib.Path(job.model).name}, settings(args)], sort_keys=True
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def saved(job: Job, args: argparse.Namespace) -> dict[str, Any] | None:
    """The saved result of a job, if it went well and was run with these settings."""
    path = args.out / "runs" / f"{job.name}.json"
    if not path.exists():
        return None
    result = json.loads(path.read_text())
    return result if result["status"] == "ok" and result.get("fingerprint") == fingerprint(job, args) else None


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    jobs = make_jobs(args)
    if args.list:
        print("\n".join(job.name for job in jobs))
        return 0
    (args.out / "runs").mkdir(parents=True, exist_ok=True)
    plugin = plugin_path()
    results: dict[str, dict[str, Any]] = {}
    todo = []
    for job in jobs:
        old = None if args.force else saved(job, args)
        if old is None:
            todo.append(job)
        else:
            results[job.name] = old
            print(f"{job.name}: saved", flush=True)

    def finish(job: Job, result: dict[str, Any]) -> None:
        results[job.name] = result
        print(f"{job.name}: {compare_report.one_line(result)}", flush=True)
        write_report(args, jobs, results)

    # kv_cache_memory_bytes makes vLLM skip its memory profiling, and with it the check that no other process frees
    # memory meanwhile: engines may start side by side.
    with concurrent.futures.ThreadPoolExecutor(max(args.parallel, 1)) as pool:
        futures = {pool.submit(run, job, args, plugin): job for job in todo}
        for future in concurrent.futures.as_completed(futures):
            finish(futures[future], future.result())
    for _ in range(args.retries):
        for job in todo:
            if results[job.name]["status"] != "ok":
                finish(job, run(job, args, plugin))
    write_report(args, jobs, results)
    summary = compare_report.summarise(list(results.values()), args.baseline)
    print("\n" + compare_report.markdown(summary))
    return 0 if compare_report.passed(summary) else 1


def write_report(args: argparse.Namespace, jobs: list[Job], results: dict[str, dict[str, Any]]) -> None:
    """Write comparison.md and comparison.json from the jobs that have run."""
    done = [results[job.name] for job in jobs if job.name in results]
    summary = compare_report.summarise(done, args.baseline)
    (args.out / "comparison.json").write_text(json.dumps(summary, indent=1) + "\n")
    (args.out / "comparison.md").write_text(compare_report.markdown(summary) + "\n")


if __name__ == "__main__":
    sys.exit(main())
