# SPDX-License-Identifier: Apache-2.0
"""What the YAML files of this folder call: lm-eval passes its `metadata` as keyword arguments."""

from __future__ import annotations

from typing import Any

from vllm_fusedmla.evaluation import documents


def _data(task: str, given: dict[str, Any]) -> dict[str, Any]:
    """One split, `test`. Arguments are in `metadata`'s entry of the task's name: other tasks have other arguments."""
    from datasets import Dataset

    name = documents.PREFIX + task
    return {"test": Dataset.from_list(documents.documents(task, **dict(given.get(name) or {})))}


def chain_recall(**given: Any) -> dict[str, Any]:
    return _data("chain_recall", given)


def needles(**given: Any) -> dict[str, Any]:
    return _data("needles", given)


def variable_tracking(**given: Any) -> dict[str, Any]:
    return _data("variable_tracking", given)


def copy(**given: Any) -> dict[str, Any]:
    return _data("copy", given)


def modular(**given: Any) -> dict[str, Any]:
    return _data("modular", given)


def text(**given: Any) -> dict[str, Any]:
    return _data("text", given)


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    return documents.score(doc, results[0])
