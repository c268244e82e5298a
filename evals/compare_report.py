# SPDX-License-Identifier: Apache-2.0
"""What the saved jobs of `compare_backends` say: pairwise differences, proof of what ran, Markdown."""

from __future__ import annotations

import statistics
from typing import Any

OURS = "FUSEDMLA"
Result = dict[str, Any]


def one_line(result: Result) -> str:
    """A finished job in a line of the terminal."""
    if result["status"] != "ok":
        return f"error: {result['error']} ({result['seconds']} s)"
    if "invariance" in result:
        rows = result["invariance"]["comparisons"]
        same = sum(row["same_bits"] for row in rows)
        return f"{same} of {len(rows)} comparisons equal to the bit ({result['seconds']} s)"
    right = sum(row["right"] for row in result["answers"])
    times = f"start {result['start_seconds']} s, answers {result['generate_seconds']} s, job {result['seconds']} s"
    return f"{right} of {len(result['answers'])} right; {times}"


def difference(a: list[Result], b: list[Result]) -> dict[str, Any]:
    """Compare two lists of answers to the same prompts, `a` being the baseline.

    Log-probabilities are compared over the common prefix of an answer, where both chose the same tokens from the same
    context. Where the tokens first differ, `gaps` has by how much (in log-probability) the baseline preferred its own
    token to the other's: near 0 is a tie that rounding decided. None: the other's was not among the top ones. A sure
    model's chosen tokens have log-probabilities near 0 whatever happens, so the other tokens among the top ones of both
    are compared too: the `rival` differences, whose floor is the rounding of the model's logits.
    """
    if [row["prompt_tokens"] for row in a] != [row["prompt_tokens"] for row in b]:
        raise ValueError("the answers are to different prompts")
    diverged, gaps, errors, rivals = [], [], [], []
    for one, other in zip(a, b, strict=True):
        same = _common_prefix(one["tokens"], other["tokens"])
        errors += [abs(x - y) for x, y in zip(one["logprobs"][:same], other["logprobs"][:same], strict=True)]
        for place in range(same):
            common = (one["top"][place].keys() & other["top"][place].keys()) - {str(one["tokens"][place])}
            rivals += [abs(one["top"][place][token] - other["top"][place][token]) for token in common]
        if same < len(one["tokens"]):
            diverged.append(same)
            rival = one["top"][same].get(str(other["tokens"][same]))
            gaps.append(None if rival is None else one["logprobs"][same] - rival)
    return {
        "prompts": len(a),
        "identical": len(a) - len(diverged),
        "first_divergences": diverged,
        "gaps": gaps,
        "tokens_compared": len(errors),
        "max_logprob_difference": max(errors, default=0.0),
        "mean_logprob_difference": statistics.fmean(errors) if errors else 0.0,
        "max_rival_difference": max(rivals, default=0.0),
        "mean_rival_difference": statistics.fmean(rivals) if rivals else 0.0,
    }


def _common_prefix(a: list[int], b: list[int]) -> int:
    for place, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return place
    return min(len(a), len(b))


def model_of(result: Result) -> str:
    return result["name"].removesuffix(_tail(result)).rstrip("-")


def _tail(result: Result) -> str:
    job = result["job"]
    spec = f"-spec{job['spec_tokens']}" if job["spec_tokens"] else ""
    kind = f"-{job['kind']}" if job["kind"] != "generate" else ""
    indexer = "-indexer" if job["own_indexer"] else ""
    return f"{job['backend']}-{job['kv_cache_dtype']}-{job['mode']}{spec}{kind}{indexer}"


def summarise(results: list[Result], baseline: str) -> dict[str, Any]:
    """Everything worth keeping of a comparison, without the answers themselves.

    Args:
        results: finished jobs, in the order in which they are to be shown.
        baseline: ``BACKEND-DTYPE-MODE`` of the job that all others of its model are compared with.
    """
    good = [result for result in results if result["status"] == "ok"]
    answered = [result for result in good if "answers" in result]
    pairs = []
    for result in answered:
        for other in answered:
            if other is not result and model_of(other) == model_of(result):
                pair = _pair(other, result, baseline)
                pairs += [pair] if pair else []
    return {
        "baseline": baseline,
        "settings": results[0]["settings"] if results else {},
        "versions": good[0]["versions"] if good else {},
        "jobs": [_job(result) for result in results],
        "pairs": pairs,
        "invariance": [
            {"name": result["name"], "kind": result["job"]["kind"], **result["invariance"]}
            for result in good
            if "invariance" in result
        ],
    }


def _pair(base: Result, result: Result, baseline: str) -> dict[str, Any] | None:
    """Difference of two jobs worth showing.

    To the baseline, FUSEDMLA's to another backend in equal conditions, or with this project's indexer to without.
    """
    to_baseline = _tail(base) == baseline
    job, other = result["job"], base["job"]
    same = all(job[c] == other[c] for c in ("kv_cache_dtype", "mode", "spec_tokens"))
    equal = same and job["backend"] == OURS != other["backend"] and not job["own_indexer"]
    twin = same and job["backend"] == other["backend"] and job["own_indexer"] and not other["own_indexer"]
    if not to_baseline and not equal and not twin:
        return None
    kind = "equal conditions" if equal else "indexer" if twin else "baseline"
    return {
        "model": model_of(result),
        "job": _tail(result),
        "against": _tail(base),
        "kind": kind,
        "is_baseline": to_baseline,
        **difference(base["answers"], result["answers"]),
    }


def _job(result: Result) -> dict[str, Any]:
    kept = ("name", "status", "error", "seconds", "start_seconds", "generate_seconds", "cudagraph_mode", "block_size")
    job = {name: result[name] for name in kept if name in result}
    optional = ("decode", "fusedmla", "kernels", "log_lines", "parallel")
    job |= {name: result[name] for name in optional if result.get(name)}
    job |= {name: result["job"][name] for name in ("backend", "mode")}
    if "answers" in result:
        job["prompts"] = len(result["answers"])
        job["right"] = sum(row["right"] for row in result["answers"])
        job["longest_prompt"] = max(row["prompt_tokens"] for row in result["answers"])
    return job


def passed(summary: dict[str, Any]) -> bool:
    """Whether all jobs ran as meant (FUSEDMLA's with FUSEDMLA, CUDA graphs replayed) and invariant bits are equal."""
    for job in summary["jobs"]:
        if job["status"] != "ok":
            return False
        if job["backend"] == OURS and not job.get("fusedmla", {}).get("scheduled"):
            return False
        if job["mode"] == "graph" and not job["decode"]["graph_replays"]:
            return False
    checked = [entry for entry in summary["invariance"] if entry["kind"] == "invariance"]
    return all(row["same_bits"] for entry in checked for row in entry["comparisons"])


def table(header: list[str], lines: list[list[str]]) -> str:
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *lines])


def markdown(summary: dict[str, Any]) -> str:
    """The comparison as a Markdown page."""
    settings, versions = summary["settings"], summary["versions"]
    parts = ["# Attention backends compared on served models"]
    if versions:
        software = ", ".join(f"{name} {versions[name]}" for name in ("vllm", "torch", "triton") if versions.get(name))
        parts.append(
            f"{versions['device']}; {software}. {settings['prompts']} chain-recall prompts of up to "
            f"{settings['max_prompt']} tokens (seed {settings['seed']}), greedy, {settings['max_tokens']} tokens each, "
            f"at most {settings['max_num_seqs']} at a time."
        )
    parts += ["## Jobs", _job_table(summary["jobs"])]
    if any(job.get("parallel", 1) > 1 for job in summary["jobs"]):
        parts.append("Several engines shared the GPU: the times say nothing about speed.")
    to_baseline = [pair for pair in summary["pairs"] if pair["is_baseline"]]
    equal = [pair for pair in summary["pairs"] if pair["kind"] == "equal conditions"]
    if to_baseline:
        parts += [f"## Against {summary['baseline']}", _PAIR_TEXT, _pair_table(to_baseline)]
    if equal:
        parts += ["## FUSEDMLA against other backends in equal conditions", _pair_table(equal)]
    if twins := [pair for pair in summary["pairs"] if pair["kind"] == "indexer"]:
        parts += ["## This project's indexer against vLLM's", _pair_table(twins)]
    if summary["invariance"]:
        parts += ["## The same prompt alone and in a batch", _invariance_table(summary["invariance"])]
    seen = [job for job in summary["jobs"] if job.get("kernels")]
    if seen:
        parts += ["## Kernels on the GPU", _KERNEL_TEXT, "\n".join(_kernel_line(job) for job in seen)]
    lines = [f"- {job['name']}: `{line}`" for job in summary["jobs"] for line in job.get("log_lines", [])]
    if lines:
        parts += ["## What FUSEDMLA logged", "\n".join(lines)]
    return "\n\n".join(parts)


_PAIR_TEXT = (
    "Log-probabilities are compared up to the first differing token of an answer: the chosen tokens', which are near 0 "
    "for a sure model, and the rivals', the other tokens among the top five of both, whose logits in bfloat16 come in "
    "steps of 1/8 around 16. Gap: by how much the baseline preferred its own token where answers part; a small gap is "
    "a tie that rounding decided."
)


_KERNEL_TEXT = (
    "Launches that the profiler saw while four of the longest prompts were answered once more, those of CUDA graphs "
    "too: kernels of attention and of the indexer, by name."
)


def _kernel_line(job: dict[str, Any]) -> str:
    return f"- {job['name']}: " + ", ".join(f"`{name}` {count}" for name, count in job["kernels"].items())


def _job_table(jobs: list[dict[str, Any]]) -> str:
    header = [
        "job",
        "right answers",
        "decode steps by query length",
        "decode tokens",
        "FUSEDMLA tokens, decoded by kernel",
        "graphs",
        "page",
    ]
    header += ["graph replays", "start s", "answers s"]
    lines = []
    for job in jobs:
        if job["status"] != "ok":
            lines.append([job["name"], f"error: {job['error']}".replace("|", "/"), *[""] * (len(header) - 2)])
            continue
        decode = job["decode"]
        lines.append(
            [
                job["name"],
                f"{job['right']} of {job['prompts']}" if "right" in job else "",
                ", ".join(f"{length}: {steps}" for length, steps in decode["steps_by_query_len"].items()),
                str(decode["tokens"]),
                _own_tokens(job.get("fusedmla", {})),
                job["cudagraph_mode"].rpartition(".")[2],
                str(job["block_size"]),
                str(decode["graph_replays"]),
                str(job["start_seconds"]),
                str(job["generate_seconds"]),
            ]
        )
    return table(header, lines)


def _own_tokens(counts: dict[str, int]) -> str:
    kernels = [f"{name}: {tokens}" for name, tokens in counts.items() if name not in ("tokens", "scheduled")]
    return ", ".join([str(counts["scheduled"]), *kernels]) if "scheduled" in counts else ""


def _pair_table(pairs: list[dict[str, Any]]) -> str:
    header = ["job", "against", "identical answers", "max logprob diff", "mean", "max of rivals", "mean of rivals"]
    header += ["first differing tokens", "gaps there"]
    lines = []
    for pair in pairs:
        gaps = ["?" if gap is None else f"{gap:.3f}" for gap in pair["gaps"]]
        lines.append(
            [
                f"{pair['model']}: {pair['job']}",
                pair["against"],
                f"{pair['identical']} of {pair['prompts']}",
                f"{pair['max_logprob_difference']:.1e}",
                f"{pair['mean_logprob_difference']:.1e}",
                f"{pair['max_rival_difference']:.3f}",
                f"{pair['mean_rival_difference']:.4f}",
                _first(pair["first_divergences"]),
                _first(gaps),
            ]
        )
    return table(header, lines)


def _first(values: list[Any], count: int = 6) -> str:
    text = ", ".join(str(value) for value in values[:count])
    return text + (f" and {len(values) - count} more" if len(values) > count else "")


def _invariance_table(entries: list[dict[str, Any]]) -> str:
    header = [
        "job",
        "VLLM_BATCH_INVARIANT",
        "batch",
        "prompts of tokens",
        "equal bits",
        "equal tokens",
        "max logprob diff",
    ]
    lines = []
    for entry in entries:
        rows = entry["comparisons"]
        lines.append(
            [
                entry["name"],
                "1" if entry["kind"] == "invariance" else "0 (control)",
                str(entry["batch"]),
                ", ".join(dict.fromkeys(str(row["prompt_tokens"]) for row in rows)),
                f"{sum(row['same_bits'] for row in rows)} of {len(rows)}",
                f"{sum(row['same_tokens'] for row in rows)} of {len(rows)}",
                f"{max(row['max_logprob_difference'] for row in rows):.2e}",
            ]
        )
    return table(header, lines)
