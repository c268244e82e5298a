# SPDX-License-Identifier: Apache-2.0
"""`fusedmla eval`: its arguments, and a comparison from beginning to end."""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

from .configurations import ENVIRONMENT, Plan, Run
from .documents import GENERATORS, PREFIX

DESCRIPTION = """\
Compare what a model answers with several attention backends and KV cache dtypes.

Every configuration is an engine in a process of its own that runs lm-eval's tasks; the first one runs twice, which
gives the noise floor. Then each decodes the same texts token by token. OUT/report.md and OUT/report.json are written
anew now and then, pictures at the end; what is on disk is not run again. Exit code 1 if a run failed, FUSEDMLA
decoded nothing, or its answers differ from another backend's.
"""
OFFLINE_TASKS = [PREFIX + name for name in GENERATORS]
_REPORT_SHARE = 20
"""A report of what has been run so far takes at most the inverse of this of the time."""


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(name for name in text.split(",") if name))


def _json(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text!r} ({error})") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text!r}")
    return value


def _variant(text: str) -> tuple[str, tuple[str, ...], dict[str, Any]]:
    """Name, the backend and cache dtype it is for, and its engine options."""
    where, equals, options = text.partition("=")
    name, *only = where.split(":")
    if not name or not equals or len(only) > 2:
        raise argparse.ArgumentTypeError(f"must look like NAME[:BACKEND[:DTYPE]]={{...}}, got {text!r}")
    return name, tuple(only), _json(options)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the sub-command."""
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", required=True, help="folder or hub name")
    parser.add_argument("--backends", type=_names, default=["FUSEDMLA"], help="attention backends, commas between")
    parser.add_argument("--kv-cache-dtypes", type=_names, default=["auto"], help="commas between (default auto)")
    parser.add_argument("--tasks", type=_names, default=OFFLINE_TASKS, help="lm-eval's, or this project's (default)")
    parser.add_argument("--out", type=Path, required=True, help="folder of runs and report; runs in it are kept")
    work = parser.add_argument_group("work")
    work.add_argument("--limit", type=float, help="prompts of each task, a share if below 1")
    work.add_argument("--num-fewshot", type=int, help="examples before each prompt (default: the task's)")
    work.add_argument("--apply-chat-template", action="store_true")
    work.add_argument("--gen-kwargs", type=_json, help="JSON, generation settings for all tasks")
    work.add_argument("--task-args", type=_json, default={}, help="JSON, lm-eval's --metadata; ours: {TASK: {...}}")
    work.add_argument("--include-path", action="append", default=[], help="folder with further lm-eval tasks")
    work.add_argument("--confirm-run-unsafe-code", action="store_true", help="as lm-eval's")
    work.add_argument("--seed", type=int, default=0)
    engine = parser.add_argument_group("engines")
    engine.add_argument("--model-args", type=_json, default={}, help='JSON, vLLM\'s: {"tensor_parallel_size": 8}')
    engine.add_argument(
        "--variant",
        type=_variant,
        action="append",
        default=[],
        metavar="NAME[:BACKEND[:DTYPE]]=JSON",
        help=f'further engine options, and as "{ENVIRONMENT}" variables of the process; for all, or for those named',
    )
    engine.add_argument(
        "--parallel", type=int, default=1, help="engines at a time, spread over the GPUs, if there is room (default 1)"
    )
    engine.add_argument("--timeout", type=float, default=86400.0, help="seconds for one engine's work")
    teacher = parser.add_argument_group("teacher-forced decoding")
    teacher.add_argument("--teacher-forced", metavar="TEXT|TASK", help="file or task (default: the first; none: off)")
    teacher.add_argument("--teacher-texts", type=int, default=16, help="texts (default 16)")
    teacher.add_argument("--teacher-length", type=int, default=1024, help="tokens of a text at most (default 1024)")
    teacher.add_argument("--teacher-prompt", type=int, default=1, help="tokens of it that are prefilled (default 1)")
    teacher.add_argument("--teacher-top", type=int, default=64, help="tokens to compare; -1: all (default 64)")
    verdicts = parser.add_argument_group("verdicts")
    verdicts.add_argument("--margin", type=float, default=0.01, help="difference that would not matter (default 0.01)")
    verdicts.add_argument(
        "--kl-limit", type=float, default=2e-4, help="where no other backends give a measure (default 2e-4)"
    )
    verdicts.add_argument(
        "--fault",
        action="append",
        default=[],
        metavar="NAME[:DTYPE[:VARIANT]]",
        help="also run the first backend with a fault of evals/faults.py, to see what catches it",
    )
    parser.add_argument("--report", action="store_true", help="run nothing, write the report from OUT/runs")


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What all runs of a comparison share, as JSON."""
    kept = ["model", "limit", "num_fewshot", "apply_chat_template", "gen_kwargs", "task_args", "include_path"]
    kept += ["confirm_run_unsafe_code", "seed", "model_args", "tasks", "margin", "kl_limit"]
    settings = {name: getattr(args, name) for name in kept}
    limit = settings["limit"]
    settings["limit"] = int(limit) if limit is not None and limit >= 1 else limit
    # An absolute folder is the same wherever the command is given; a hub's name is none.
    model = Path(args.model)
    settings["name"] = model.resolve().name if model.is_dir() else args.model
    settings["model"] = str(model.resolve()) if model.is_dir() else args.model
    settings["include_path"] = [str(Path(path).resolve()) for path in args.include_path]
    settings["variants"] = {name: options for name, _, options in args.variant}
    source = args.teacher_forced or (args.tasks[0] if args.tasks else "none")
    settings["teacher"] = {
        "source": str(Path(source).resolve()) if Path(source).is_file() else source,
        "texts": args.teacher_texts,
        "length": args.teacher_length,
        "prompt": args.teacher_prompt,
        "top": args.teacher_top,
    }
    return settings


def plan_of(args: argparse.Namespace, settings: dict[str, Any]) -> Plan:
    """What is to be run. Raises ValueError for a fault that belongs to no run, or where there is nothing to do."""
    kinds = tuple(
        teacher
        for teacher, asked in ((False, bool(args.tasks)), (True, settings["teacher"]["source"] != "none"))
        if asked
    )
    if not kinds or not args.backends or not args.kv_cache_dtypes:
        raise ValueError("nothing to run: name backends, cache dtypes, and tasks or a text")
    variants = ("", *settings["variants"])
    only = {name: where for name, where, _ in args.variant}
    return Plan(tuple(args.backends), tuple(args.kv_cache_dtypes), variants, tuple(args.fault), kinds, only)


def write_report(plan: Plan, settings: dict[str, Any], out: Path, draw: bool = True) -> dict[str, Any]:
    """Write report.json and report.md, and pictures, from what is in `out`; the summary."""
    from . import pictures, report, runner, summary

    states = {run: runner.state(run, settings, out) for run in plan.runs}
    found = summary.summarise(plan, states, out, settings)
    # Where the machine keeps the model is nobody's business.
    shown = settings | {"model": settings["name"], "include_path": [Path(p).name for p in settings["include_path"]]}
    shown["teacher"] = settings["teacher"] | {"source": Path(settings["teacher"]["source"]).name}
    found["settings"] = shown
    (out / "report.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "report.md").write_text(report.markdown(found, pictures.draw(found, out) if draw else []))
    return found


def one_line(run: Run, state: dict[str, Any]) -> str:
    """A finished run in a line of the terminal."""
    if state["status"] != "ok":
        return f"{run.name}: {state['status']}: {state.get('error', '')}"
    if run.teacher:
        return f"{run.name}: {state['teacher']['tokens']} tokens ({state['seconds']:.0f} s)"
    scores = []
    for result in state["tasks"].values():
        for task, values in result["results"].items():
            first = next(((n, v) for n, v in values.items() if "stderr" not in n and n != "sample_len"), None)
            scores += [f"{task} {first[1]:.4g}"] if first else []
    return f"{run.name}: {', '.join(scores)} ({state['seconds']:.0f} s)"


def say(line: str) -> None:
    """Print a line in one piece: several threads do."""
    print(line + "\n", end="", flush=True)


def run_all(plan: Plan, settings: dict[str, Any], args: argparse.Namespace) -> None:
    """Run what is not on disk, and write the report now and then."""
    from . import runner

    runs, todo = plan.runs, []
    numbers = {run: f"[{number + 1}/{len(runs)}]" for number, run in enumerate(runs)}
    for run in runs:
        state = runner.state(run, settings, args.out)
        if state["status"] == "ok":
            say(f"{numbers[run]} {one_line(run, state)}, saved")
        else:
            todo.append(run)

    slots = runner.device_slots(args.parallel, settings)

    def execute(run: Run) -> dict[str, Any]:
        devices = slots.get()
        say(f"{numbers[run]} {run.name} ...")
        try:
            return runner.execute(run, settings, args.out, args.timeout, show=args.parallel == 1, devices=devices)
        finally:
            slots.put(devices)

    cost, written = 0.0, time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(max(args.parallel, 1)) as pool:
        futures = {pool.submit(execute, run): run for run in todo}
        for future in concurrent.futures.as_completed(futures):
            run = futures[future]
            say(f"{numbers[run]} {one_line(run, future.result())}")
            begin = time.monotonic()
            if begin - written > _REPORT_SHARE * cost:
                write_report(plan, settings, args.out, draw=False)
                written = time.monotonic()
                cost = written - begin


def main(args: argparse.Namespace) -> int:
    """Run the comparison. Raises ImportError where the extra is missing, ValueError for arguments that do not fit."""
    for module in ("lm_eval", "scipy", "matplotlib"):
        if importlib.util.find_spec(module) is None:
            raise ImportError(f"{module} is not installed: pip install 'vllm-fusedmla[eval]'")
    settings = settings_of(args)
    plan = plan_of(args, settings)
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.report:
        run_all(plan, settings, args)
    found = write_report(plan, settings, args.out)
    for finding in found["findings"]:
        print(f"found: {finding}", file=sys.stderr)
    print(f"{'passed' if found['passed'] else 'failed'}: {args.out / 'report.md'}")
    return 0 if found["passed"] else 1
