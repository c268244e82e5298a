# SPDX-License-Identifier: Apache-2.0
"""A comparison's summary as a Markdown page."""

from __future__ import annotations

from typing import Any

from .configurations import PAIR_KINDS

Row = dict[str, Any]
_VERDICTS = (
    "Differences are those of the same prompts, in points of a hundred for scores and in nats for log-likelihoods; "
    "brackets hold the 95 % bootstrap interval, p is McNemar's exact test (scores of 0 and 1) or a permutation test of "
    "the signs, corrected for the number of comparisons by Holm's method. *worse* and *better*: the interval leaves 0 "
    "out and p is below 5 %. *same*: the interval and the smallest detectable loss are within {margin:g} points. *not "
    "enough data*: neither; more prompts would decide. The smallest detectable loss is found with a probability of "
    "80 % by this many prompts."
)
_FORCED = (
    "The same texts, decoded token by token whatever the model would have said. KL is the divergence of the "
    "next-token distributions in nats, per token, with the 95 % interval over texts{bound}; agreement is of the most "
    "probable token; log-likelihood is the difference of the given tokens' in nats per token."
)


def table(header: list[str], lines: list[list[str]]) -> str:
    """A Markdown table, numbers to the right."""
    rule = ["---", *("---:" for _ in header[1:])]
    cells = [[cell.replace("|", "/") for cell in line] for line in [header, rule, *lines]]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def markdown(summary: dict[str, Any], pictures: list[str]) -> str:
    """The page. `pictures`: file names beside it."""
    settings, versions = summary["settings"], summary["versions"]
    parts = [f"# FUSEDMLA evaluation: {settings['name']}"]
    if versions:
        software = ", ".join(f"{name} {version}" for name, version in versions.items() if name != "device")
        parts.append(f"{versions['device']}; {software}. Seed {settings['seed']}.")
    parts.append(_headline(summary))
    parts += ["## Runs", _runs(summary["runs"])]
    idle = {task for run in summary["runs"] for task in run["prefill_only"]}
    if idle:
        parts.append(
            f"FUSEDMLA decoded nothing in {', '.join(sorted(idle))}: prefill alone answers, so these say nothing about "
            "its kernels."
        )
    easy = {row["task"] for row in summary["comparisons"] if row["binary"] and min(row["base"], row["other"]) > 0.99}
    if easy:
        parts.append(
            f"Nearly all answers are right in {', '.join(sorted(easy))}: only gross faults would show there. Small "
            "numerical ones show in the divergence."
        )
    if summary["comparisons"]:
        parts += ["## Answers", _VERDICTS.format(margin=100 * settings["margin"])]
        parts += _sections(summary["comparisons"], _comparison_table)
    if summary["forced"]:
        whole = all(row["whole_vocabulary"] for row in summary["forced"])
        bound = "" if whole else f"; a lower bound from the {settings['teacher']['top']} most probable tokens"
        parts += ["## Teacher-forced decoding", _FORCED.format(bound=bound)]
        parts += _sections(summary["forced"], _forced_table)
    if summary["faults"]:
        parts += ["## Injected faults", _fault_table(summary["faults"])]
    for name in pictures:
        parts.append(f"![{name.removesuffix('.png')}]({name})")
    return "\n\n".join(parts) + "\n"


def _headline(summary: dict[str, Any]) -> str:
    if summary["passed"]:
        return "**No difference found** between the first backend and the others, and every run did its work."
    return "**Found:**\n\n" + "\n".join(f"- {finding}" for finding in summary["findings"])


def _runs(runs: list[Row]) -> str:
    lines = []
    for run in runs:
        decoded = ", ".join(f"{kernel}: {tokens}" for kernel, tokens in sorted(run["decoded"].items()))
        state = "; ".join(run["problems"]) or (f"not supported: {run['refused']}" if run["refused"] else "ok")
        lines.append([run["configuration"], state, decoded, f"{run['seconds']:.0f}"])
    return table(["configuration", "state", "tokens decoded by FUSEDMLA", "seconds"], lines)


def _sections(rows: list[Row], write: Any) -> list[str]:
    parts = []
    for kind, title in PAIR_KINDS.items():
        mine = [row for row in rows if row["kind"] == kind]
        if mine:
            parts += [f"### {title}", write(mine)]
    return parts


def _comparison_table(rows: list[Row]) -> str:
    header = ["configuration", "against", "task: metric", "n", "base", "other", "difference", "-/+", "p"]
    header += ["same answers", "detectable", "verdict"]
    lines = []
    for row in rows:
        scale = 1.0 if row["metric"].startswith("log-likelihood") else 100.0
        numbers = [f"{scale * row[name]:.2f}" for name in ("base", "other")]
        low, high = scale * row["low"], scale * row["high"]
        lines.append(
            [
                row["other_run"],
                row["base_run"],
                row["measure"],
                str(row["n"]) + (f" ({row['unpaired']} unpaired)" if row["unpaired"] else ""),
                *numbers,
                f"{scale * row['difference']:+.2f} [{low:+.2f}, {high:+.2f}]",
                f"{row['lost']}/{row['gained']}",
                f"{row['adjusted_p']:.2g}",
                f"{100 * row['identical_answers']:.1f} %",
                f"{scale * row['detectable']:.2f}",
                row["verdict"],
            ]
        )
    return table(header, lines)


def _forced_table(rows: list[Row]) -> str:
    header = ["configuration", "against", "tokens", "KL", "99.9 %", "limit", "top-1 agreement"]
    header += ["perplexity", "base's", "log-likelihood", "verdict"]
    lines = []
    for row in rows:
        loglik = row["loglik"]
        limit = "" if row["kl_limit"] is None else f"{row['kl_limit']:.1e} ({row['limit_source']})"
        lines.append(
            [
                row["other_run"],
                row["base_run"],
                f"{row['tokens']} of {row['texts']} texts",
                f"{row['kl']:.2e} [{row['kl_low']:.1e}, {row['kl_high']:.1e}]",
                f"{row['kl_p999']:.1e}",
                limit,
                f"{100 * row['top1_agreement']:.2f} %",
                f"{row['perplexity_other']:.5g}",
                f"{row['perplexity_base']:.5g}",
                f"{loglik['difference']:+.1e} [{loglik['low']:+.1e}, {loglik['high']:+.1e}]",
                "; ".join(row["differs"]) or row["verdict"],
            ]
        )
    return table(header, lines)


def _fault_table(faults: list[Row]) -> str:
    measures = list(dict.fromkeys(measure for fault in faults for measure in fault["measures"]))
    lines = []
    for fault in faults:
        marks = [{True: "caught", False: "-", None: ""}[fault["measures"].get(measure)] for measure in measures]
        lines.append([fault["run"], "yes" if fault["caught"] else "**no**", *marks])
    return table(["fault", "caught", *measures], lines)
