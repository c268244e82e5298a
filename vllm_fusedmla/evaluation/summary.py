# SPDX-License-Identifier: Apache-2.0
"""What a comparison found: every pair of configurations on every measure, with a verdict."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from . import paired
from .configurations import OURS, Plan, Run
from .divergence import Forced, compare_forced
from .runner import folder_of

State = dict[str, Any]
ALIKE = ("rerun", "backend", "fault")
"""Kinds of pairs that should give the same answers up to rounding: any difference found is an error."""
_REFUSAL = "is not valid for this configuration. Reason:"
"""vLLM's words where a backend does not support what is asked of it."""


def task_samples(state: State) -> dict[str, dict[tuple[Any, ...], dict[str, Any]]]:
    """Samples of a run by task, and by what identifies a prompt: its hashes, the filter, and how often it came before.

    lm-eval counts a prompt as often as a task has it.
    """
    found: dict[str, dict[tuple[Any, ...], dict[str, Any]]] = {}
    for result in state.get("tasks", {}).values():
        for task, rows in result["samples"].items():
            seen: Counter[tuple[Any, ...]] = Counter()
            samples = found.setdefault(task, {})
            for row in rows:
                key = tuple(row["id"])
                samples[(*key, seen[key])] = row
                seen[key] += 1
    return found


def compare_tasks(base: State, other: State) -> list[dict[str, Any]]:
    """Every metric of every task that both runs have, over the prompts that both answered."""
    rows = []
    ours, theirs = task_samples(base), task_samples(other)
    for task in ours:
        both = [key for key in ours[task] if key in theirs.get(task, {})]
        if not both:
            continue
        pairs: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for key in both:
            a, b = ours[task][key], theirs[task][key]
            label = "" if key[2] == "none" else f" ({key[2]})"
            for metric in a["values"].keys() & b["values"].keys():
                # RULER's metrics are lengths, and -1 stands for a prompt of another length.
                if (a["values"][metric], b["values"][metric]) != (-1.0, -1.0):
                    pairs[metric + label].append((a["values"][metric], b["values"][metric]))
        same = sum(ours[task][key]["answer"] == theirs[task][key]["answer"] for key in both)
        unpaired = len(ours[task]) + len(theirs.get(task, {})) - 2 * len(both)
        for metric, values in sorted(pairs.items()):
            found = paired.compare([value for value, _ in values], [value for _, value in values])
            rows.append(
                {
                    "measure": f"{task}: {metric}",
                    "task": task,
                    "metric": metric,
                    **dataclasses.asdict(found),
                    "identical_answers": same / len(both),
                    "unpaired": unpaired,
                }
            )
    return rows


def by_length_and_depth(state: State) -> dict[str, list[dict[str, float]]]:
    """Of tasks whose documents have them: mean value of the first metric for each length and depth."""
    tables = {}
    for task, samples in task_samples(state).items():
        cells: dict[tuple[float, float], list[float]] = defaultdict(list)
        for row in samples.values():
            if {"length", "depth"} <= row["where"].keys() and row["values"]:
                cells[row["where"]["length"], row["where"]["depth"]].append(next(iter(row["values"].values())))
        if len(cells) > 1:
            tables[task] = [
                {"length": length, "depth": depth, "value": sum(values) / len(values), "n": len(values)}
                for (length, depth), values in sorted(cells.items())
            ]
    return tables


def decode_tokens(states: dict[Run, State], run: Run) -> dict[str, int]:
    """Tokens that a configuration's runs sent through FUSEDMLA's decode, by kernel."""
    total: Counter[str] = Counter()
    for teacher in (False, True):
        state = states.get(dataclasses.replace(run, teacher=teacher), {})
        for result in [*state.get("tasks", {}).values(), *filter(None, [state.get("teacher")])]:
            total.update(result["decoded"])
    return dict(total)


def summarise(plan: Plan, states: dict[Run, State], out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Everything worth keeping of a comparison.

    Args:
        plan, settings: of the comparison.
        states: of its runs, as `runner.state` gives them; runs may be missing.
        out: the comparison's folder, for the teacher-forced runs' log-probabilities.
    """
    comparisons: list[dict[str, Any]] = []
    forced: list[dict[str, Any]] = []
    for kind, base, other in plan.pairs():
        if kind != "reference":
            for row in compare_tasks(states.get(base, {}), states.get(other, {})):
                comparisons.append({"kind": kind, **_names(base, other), **row})
        teachers = [dataclasses.replace(run, teacher=True) for run in (base, other)]
        if all("teacher" in states.get(run, {}) for run in teachers):
            one, two = (Forced.load(folder_of(run, out) / "teacher.npz") for run in teachers)
            forced.append({"kind": kind, **_names(base, other), "run": other, **compare_forced(one, two)})
    _judge_tasks(comparisons, settings["margin"])
    _judge_forced(plan, forced, settings)
    runs = [_run_row(run, states, plan.backends[0]) for run in plan.configurations]
    findings = _findings(runs, comparisons, forced)
    good = [s for s in states.values() if s.get("tasks") or s.get("teacher")]
    results = [*good[0].get("tasks", {}).values(), good[0].get("teacher")] if good else []
    return {
        "settings": settings,
        "versions": next((result["versions"] for result in results if result), {}),
        "runs": runs,
        "comparisons": comparisons,
        "forced": forced,
        "maps": {run.configuration: by_length_and_depth(states.get(run, {})) for run in plan.configurations},
        "faults": _faults(runs, comparisons, forced),
        "findings": findings,
        "passed": not findings,
    }


def _names(base: Run, other: Run) -> dict[str, str]:
    return {"base_run": base.configuration, "other_run": other.configuration}


def _judge_tasks(rows: list[dict[str, Any]], margin: float) -> None:
    """Verdicts, with Holm's correction over the comparisons of the same kind: injected faults are no excuse."""
    kinds = {"fault" if row["kind"] == "fault" else "" for row in rows}
    for kind in kinds:
        mine = [row for row in rows if (row["kind"] == "fault") == (kind == "fault")]
        for row, p in zip(mine, paired.holm([row["p"] for row in mine]), strict=True):
            row["adjusted_p"] = p
            row["verdict"] = paired.verdict(_difference(row), p, margin)


def _difference(row: dict[str, Any]) -> paired.Difference:
    return paired.Difference(**{field.name: row[field.name] for field in dataclasses.fields(paired.Difference)})


def _judge_forced(plan: Plan, rows: list[dict[str, Any]], settings: dict[str, Any]) -> None:
    """Limit and verdict of each teacher-forced pair, see README.md of `evals`: what other kernels differ by."""
    first = plan.backends[0]
    for row in rows:
        run: Run = row["run"]
        limit, agreement, source = None, None, ""
        if row["kind"] in ALIKE:
            limit, agreement, source = settings["kl_limit"], None, "--kl-limit"
            alike, among = _references(rows, run, plan)
            if alike:
                limit, agreement = 2 * max(r["kl"] for r in alike), min(r["top1_agreement"] for r in alike)
                source = f"twice that of {among}"
                if alike[0]["run"].kv_cache_dtype != run.kv_cache_dtype and limit < settings["kl_limit"]:
                    limit, source = settings["kl_limit"], "--kl-limit"
            elif row["kind"] == "fault":
                clean = [r["top1_agreement"] for r in rows if r["kind"] == "backend" and r["run"].key == run.key]
                agreement = min(clean, default=None)
        elif row["kind"] == "cache" and run.backend == first:
            alike = _of_variant([r for r in rows if r["kind"] == "cache" and r["run"].backend != first], run)
            if alike:
                limit, source = 2 * max(r["kl"] for r in alike), "twice that of other backends' caches"
        row["kl_limit"], row["limit_source"] = limit, source
        loglik = row["loglik"]
        row["loglik_verdict"] = paired.verdict(paired.Difference(**loglik), loglik["p"], settings["margin"])
        reasons = []
        if limit is not None and row["kl"] > limit:
            reasons.append(f"KL {row['kl']:.1e} above {limit:.1e}")
        if agreement is not None and _fewer_agree(row, agreement):
            reasons.append(f"top-1 agreement {row['top1_agreement']:.4f} below {agreement:.4f}")
        row["differs"] = reasons
        row["verdict"] = "differs" if reasons else "same" if limit is not None else ""
    for row in rows:
        row["run"] = row["run"].configuration


def _references(rows: list[dict[str, Any]], run: Run, plan: Plan) -> tuple[list[dict[str, Any]], str]:
    """Pairs of other backends that say how far kernels are apart for a cache like that of `run`, and a name for them.

    Where no two others have its cache, those of the first one: the same roundings, of other values. Besides, another
    backend's rerun with its cache: kernels need not agree more than that does with itself.
    """
    found = [row for row in rows if row["kind"] == "reference" and not row["run"].rerun]
    mine = _of_variant(found, run)
    plain = plan.kv_cache_dtypes[0]
    if mine or run.kv_cache_dtype == plain:
        return mine, "other backends"
    borrowed = [row for row in found if row["run"].key[1:] == (plain, "")]
    reruns = _of_variant([row for row in rows if row["kind"] == "reference" and row["run"].rerun], run)
    return borrowed and borrowed + reruns, f"other backends, {plain} cache"


def _of_variant(rows: list[dict[str, Any]], run: Run) -> list[dict[str, Any]]:
    """Those with the cache and variant of `run`, or with no variant where others do not have it."""
    mine = [row for row in rows if row["run"].key[1:] == run.key[1:]]
    return mine or [row for row in rows if row["run"].key[1:] == (run.kv_cache_dtype, "")]


def _fewer_agree(row: dict[str, Any], reference: float) -> bool:
    """Whether disagreements exceed the reference's by more than three standard deviations of such counts."""
    mine, theirs = ((1 - share) * row["tokens"] for share in (row["top1_agreement"], reference))
    return mine > theirs + 3 * max(mine + theirs, 1.0) ** 0.5


def _run_row(run: Run, states: dict[Run, State], ours: str) -> dict[str, Any]:
    """A configuration in the table of runs: what it decoded, its scores, and why it failed if it did."""
    kinds = [dataclasses.replace(run, teacher=teacher) for teacher in (False, True)]
    known = [states[kind] for kind in kinds if kind in states]
    decoded = decode_tokens(states, run)
    tasks = states.get(kinds[0], {}).get("tasks", {})
    problems = [f"{state['status']}: {state.get('error', 'not run')}" for state in known if state["status"] != "ok"]
    # Another backend that has no such cache is no failure, and nothing is compared with it.
    refused = [problem for problem in problems if _REFUSAL in problem and not run.fault and run.backend != ours]
    problems = list(dict.fromkeys(problem for problem in problems if problem not in refused))
    if run.backend == OURS and not problems and not sum(decoded.values()):
        problems.append("no token passed FUSEDMLA's decode")
    idle = [result for result in tasks.values() if run.backend == OURS and not sum(result["decoded"].values())]
    return {
        "configuration": run.configuration,
        "fault": run.fault,
        "seconds": sum(state.get("seconds", 0) for state in known),
        "decoded": decoded,
        "prefill_only": [name for result in idle for name in result["samples"]],
        "scores": {name: values for result in tasks.values() for name, values in result["results"].items()},
        "problems": problems,
        "refused": refused[0].partition(_REFUSAL)[2].strip() if refused else "",
    }


def _findings(runs: list[dict[str, Any]], comparisons: list[dict[str, Any]], forced: list[dict[str, Any]]) -> list[str]:
    """Reasons for which the comparison fails: not those of faults that were injected."""
    found = [
        f"{run['configuration']}: {problem}"
        for run in runs
        for problem in run["problems"]
        if not run["fault"] or problem.startswith("unfinished")
    ]
    for row in comparisons:
        if row["kind"] in ("rerun", "backend") and row["verdict"] in ("worse", "better"):
            change = f"{100 * row['difference']:+.2f} points"
            found.append(f"{row['other_run']} against {row['base_run']}: {row['measure']} {row['verdict']}, {change}")
    for row in forced:
        if row["kind"] in ("rerun", "backend", "cache"):
            found += [f"{row['other_run']} against {row['base_run']}: {reason}" for reason in row["differs"]]
    return found


def _faults(
    runs: list[dict[str, Any]], comparisons: list[dict[str, Any]], forced: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Which measures caught each injected fault; a run that could not go on is caught too."""
    rows = []
    for run in runs:
        if not run["fault"]:
            continue
        name = run["configuration"]
        caught = {"the run itself": any(problem.startswith("error") for problem in run["problems"])}
        for row in comparisons:
            if row["kind"] == "fault" and row["other_run"] == name:
                caught[row["measure"]] = row["verdict"] in ("worse", "better")
        for row in forced:
            if row["kind"] == "fault" and row["other_run"] == name:
                caught["teacher-forced: KL"] = row["kl"] > row["kl_limit"]
                caught["teacher-forced: top-1 agreement"] = any("top-1" in reason for reason in row["differs"])
                caught["teacher-forced: log-likelihood"] = row["loglik_verdict"] in ("worse", "better")
        rows.append({"fault": run["fault"], "run": name, "measures": caught, "caught": any(caught.values())})
    return rows
