# SPDX-License-Identifier: Apache-2.0
"""The documents of the offline tasks, drawn when they are needed: no files, no network."""

from __future__ import annotations

import functools
import inspect
import random
import zlib
from collections.abc import Sequence
from importlib import import_module
from typing import Any

GENERATORS = {
    "chain_recall": "chain_recall",
    "needles": "needles",
    "variable_tracking": "variable_tracking",
    "copy": "copying",
    "modular": "modular",
    "text": "generated_text",
}
"""Offline task, without the prefix `fusedmla_`, and the module of `tasks` that has its `example`."""
PREFIX = "fusedmla_"
_LENGTHS: dict[str, tuple[int | None, ...]] = {"copy": (None,), "modular": (None,), "text": (1024,)}
_DEPTHS: dict[str, tuple[float | None, ...]] = {
    "needles": (0.0, 0.25, 0.5, 0.75, 1.0),
    "variable_tracking": (0.0, 0.25, 0.5, 0.75, 1.0),
}


def documents(
    task: str,
    *,
    n: int = 1000,
    seed: int = 0,
    lengths: Sequence[int | None] | None = None,
    depths: Sequence[float | None] | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """`n` documents of an offline task.

    Args:
        task: a key of `GENERATORS`.
        n: how many in all. Lengths and depths take turns, so that any beginning of the list has all of them.
        seed: equal arguments give equal documents on every machine.
        lengths: tokens of prompt and answer, see the generators; None: no filler. Default 1024, 4096 and 8192 for
            needles, variable tracking and chain recall, 1024 for text, no filler for the others.
        depths: where the facts of the question lie, for tasks that have it; None: anywhere. Default 0 to 1 in quarters.
        options: further arguments of the generator, such as ``keys`` or ``hops``.

    Returns:
        ``{"prompt", "answer", "length", "depth"}`` each; length 0 and depth -1 stand for None, because a column of a
        data set has one type.

    Raises:
        ValueError: for an unknown task or argument, or where a generator refuses its arguments.
    """
    if task not in GENERATORS:
        raise ValueError(f"task must be one of {', '.join(GENERATORS)}, got {task!r}")
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    example = import_module(f"{__package__}.tasks.{GENERATORS[task]}").example
    known = set(inspect.signature(example).parameters) - {"rng", "total", "depth"}
    if unknown := set(options) - known:
        raise ValueError(f"{task} takes {', '.join(sorted(known))}, got {', '.join(sorted(unknown))}")
    lengths = lengths or _LENGTHS.get(task, (1024, 4096, 8192))
    takes_depth = "depth" in inspect.signature(example).parameters
    if depths and not takes_depth:
        raise ValueError(f"{task} has no depth")
    depths = (depths or _DEPTHS.get(task, (None,))) if takes_depth else (None,)
    drawn = _drawn(task, n, seed, tuple(lengths), tuple(depths), takes_depth, tuple(sorted(options.items())))
    return [dict(doc) for doc in drawn]


@functools.lru_cache(maxsize=2)
def _drawn(
    task: str,
    n: int,
    seed: int,
    lengths: tuple[int | None, ...],
    depths: tuple[float | None, ...],
    takes_depth: bool,
    options: tuple[tuple[str, Any], ...],
) -> list[dict[str, Any]]:
    """Thousands of long documents take a while, and a run asks for them twice."""
    example = import_module(f"{__package__}.tasks.{GENERATORS[task]}").example
    rng = random.Random(zlib.crc32(f"{task} {seed}".encode()))
    made = []
    for index in range(n):
        length = lengths[index % len(lengths)]
        depth = depths[index // len(lengths) % len(depths)]
        where = {"depth": depth} if takes_depth else {}
        prompt, answer = example(rng, total=length, **where, **dict(options))
        made.append(
            {"prompt": prompt, "answer": answer, "length": length or 0, "depth": -1.0 if depth is None else depth}
        )
    return made


def score(doc: dict[str, Any], completion: str) -> dict[str, float]:
    """`exact_match`: whether the answer's words come first, all of them; `prefix`: share of them before the first
    wrong one."""
    expected = doc["answer"].split()
    got = completion.split()[: len(expected)]
    right = next((i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), len(got))
    return {"exact_match": float(right == len(expected)), "prefix": right / len(expected)}
