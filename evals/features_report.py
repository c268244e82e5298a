# SPDX-License-Identifier: Apache-2.0
"""What `check_features` runs, and how it judges what came out. Pure functions, no engine."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

PLAIN = "plain"
COLUMNS = (
    "feature",
    "model",
    "KV cache",
    "right",
    "same tokens as plain",
    "max logprob difference",
    "seen at work",
    "verdict",
)


@dataclasses.dataclass(frozen=True)
class Feature:
    """One engine to run.

    Attributes:
        name: of the result.
        kind: what has to be seen at work: "plain", "chunked", "prefix", "tp", "dcp" or "serve".
        options: arguments of vllm.LLM.
        mode: "eager" or "graph" (full CUDA graphs for decode).
        env: further environment variables.
        gpus: how many it takes.
        passes: how often the prompts are answered.
    """

    name: str
    kind: str
    model: str
    kv_cache_dtype: str = "auto"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    mode: str = "graph"
    env: dict[str, str] = dataclasses.field(default_factory=dict)
    gpus: int = 1
    passes: int = 1

    @property
    def plain_name(self) -> str:
        """The run to compare with."""
        return f"{PLAIN} {pathlib.Path(self.model).name} {self.kv_cache_dtype}"


def compare(rows: list[dict[str, Any]], plain: list[dict[str, Any]]) -> dict[str, Any]:
    """Answers beside the plain run's: how many have the same tokens, and the largest log-probability difference.

    Differences count up to and with the first token in which two answers differ: behind it the contexts differ too.
    """
    same, largest = 0, 0.0
    for row, other in zip(rows, plain, strict=True):
        same += row["tokens"] == other["tokens"]
        for token, token_other, a, b in zip(
            row["tokens"], other["tokens"], row["logprobs"], other["logprobs"], strict=True
        ):
            if token != token_other:
                break
            largest = max(largest, abs(a - b))
    return {"same": same, "of": len(rows), "max_logprob_difference": largest}


def problems(feature: Feature, result: dict[str, Any], comparisons: list[dict[str, Any]]) -> list[str]:
    """What speaks against the claim that FUSEDMLA worked with this feature; empty if nothing does."""
    if "error" in result:
        return [result["error"]]
    if feature.kind == "serve":
        missing = [f"the server's log has no '{mark}'" for mark, line in result["evidence"].items() if not line]
        wrong = result["right"].count(False)
        return missing + ([f"{wrong} of {len(result['right'])} answers wrong"] if wrong else [])
    found, ranks = [], result["ranks"]
    wanted = feature.options.get("tensor_parallel_size", 1)
    if len(ranks) != wanted:
        found.append(f"{len(ranks)} ranks, not {wanted}")
    method = {"fork": "ForkProcess", "spawn": "SpawnProcess"}.get(feature.env.get("VLLM_WORKER_MULTIPROC_METHOD", ""))
    for number, rank in enumerate(ranks):
        checks = {
            f"attention by {rank['impls']}": rank["impls"] == ["FusedMLAImpl"],
            f"configured backend {rank['configured_backend']}": rank["configured_backend"] == "FUSEDMLA",
            "FUSEDMLA decoded nothing": rank["fusedmla"].get("tokens", 0) > 0 and rank["steps"].get("decode", 0) > 0,
            f"process is a {rank['process']}": method is None or rank["process"] == method,
            "no CUDA graph was replayed": feature.mode == "eager" or rank["graph_replays"] > 0,
        }
        if feature.kind == "dcp":
            size = feature.options["decode_context_parallel_size"]
            checks[f"decode context parallel size {rank['dcp']}"] = rank["dcp"] == [size]
        if (limit := feature.options.get("max_num_batched_tokens")) is not None:
            most = rank["most_tokens_in_a_step"]
            checks[f"{most} tokens in a step"] = most <= limit
            checks["no step had decodes and prefills"] = rank["steps"].get("mixed", 0) > 0
            checks["no prompt went on in a second step"] = rank["steps"].get("context", 0) > 0
        found += [f"rank {number}: {what}" for what, good in checks.items() if not good]
    cached = [one["cached_tokens"] for one in result["passes"]]
    if feature.kind == "prefix" and not cached[-1] > cached[0]:
        found.append(f"the second pass found {cached[-1]} cached tokens")
    if not comparisons:
        found.append("there is no plain run to compare with")
    for one in comparisons:
        if one["same"] != one["of"]:
            found.append(f"{one['of'] - one['same']} of {one['of']} answers differ from the plain run's")
    return found


def summarise(todo: list[Feature], results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each feature that has run."""
    rows = []
    for feature in todo:
        result = results.get(feature.name)
        if result is None:
            continue
        plain = results.get(feature.plain_name, {}).get("passes")
        passes = result.get("passes", [])
        comparisons = [compare(one["answers"], plain[0]["answers"]) for one in passes] if plain else []
        row: dict[str, Any] = {
            "feature": feature.name,
            "model": pathlib.Path(feature.model).name,
            "kv_cache_dtype": feature.kv_cache_dtype,
            "mode": "default" if feature.kind == "serve" else feature.mode,
            "options": feature.options,
            "env": feature.env,
            "right": [sum(answer["right"] for answer in one["answers"]) for one in passes],
            "cached_tokens": [one["cached_tokens"] for one in passes],
            "against_plain": comparisons,
            "problems": problems(feature, result, comparisons),
        }
        names = ("ranks", "start_seconds", "seconds", "evidence", "command")
        row |= {name: result[name] for name in names if name in result}
        if feature.kind == "serve" and "right" in result:
            row["right"] = [sum(result["right"])]
        rows.append(row)
    return rows


def markdown(rows: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    """The table of the rows, and what the machine was."""
    versions: dict[str, str] = next((row["ranks"][0]["versions"] for row in rows if row.get("ranks")), {})
    about = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines = [
        "# FUSEDMLA with vLLM's features",
        "",
        f"{about}. {settings['prompts']} prompts to {settings['max_prompt']} tokens, {settings['max_tokens']} answer "
        f"tokens each, greedy, seed {settings['seed']}. `plain`: one GPU, eager, whole prompts, no prefix cache.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|" + " --- |" * len(COLUMNS),
    ]
    for row in rows:
        against = row["against_plain"]
        cells = [
            row["feature"],
            row["model"],
            row["kv_cache_dtype"],
            " / ".join(map(str, row["right"])),
            " / ".join(f"{one['same']} of {one['of']}" for one in against) or "-",
            " / ".join(f"{one['max_logprob_difference']:.4f}" for one in against) or "-",
            seen(row),
            "; ".join(row["problems"]).replace("|", "/") or "PASS",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def seen(row: dict[str, Any]) -> str:
    """What the engine's own figures say, in a few words."""
    if not row.get("ranks"):
        return "first decode in the server's log" if all(row.get("evidence", {"": ""}).values()) else "-"
    rank = row["ranks"][0]
    processes = sorted({rank["process"] for rank in row["ranks"]})
    parts = [f"{len(row['ranks'])} x {'/'.join(processes)}", f"{rank['graph_replays']} graph replays"]
    parts += [f"{count} {kind} steps" for kind, count in sorted(rank["steps"].items())]
    if rank["dcp"] != [1]:
        parts.append(f"DCP {rank['dcp'][0]}")
    if any(row["cached_tokens"]):
        parts.append(f"{' / '.join(map(str, row['cached_tokens']))} cached tokens")
    return ", ".join(parts)
