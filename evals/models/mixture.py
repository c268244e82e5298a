# SPDX-License-Identifier: Apache-2.0
"""Training batches of all offline tasks (evals/tasks), made by the generators that the evaluation uses.

A batch is of one task, one set of sizes and one length, so that its rows are equally long. Most batches have few facts
and hardly any filler: a look-up is found there or nowhere, because a batch of short examples has a hundred times the
answers of one of long ones. The others have the sizes that the evaluation's tasks have by default or any, and any
length. Python makes about a million tokens a second, so worker processes make batches ahead.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from evals.tasks import copying, generated_text, modular, needles, variable_tracking, words

Sizes = dict[str, Any]
GENERATORS: dict[str, Callable[..., tuple[str, str]]] = {
    "copying": copying.example,
    "needles": needles.example,
    "variable_tracking": variable_tracking.example,
    "modular": modular.example,
    "generated_text": generated_text.example,
}
SHARES = {"copying": 1, "needles": 3, "variable_tracking": 4, "modular": 4, "generated_text": 1}
LONGEST_TEXT = 2048
"""Tokens of a training document; it has no filler, and every token of it is work for the output layer."""
SHORT_SHARE, SHORT_FILLER = 0.6, 24
"""Share of short batches, and the filler words that they have at most."""


def few(rng: random.Random, low: int, high: int) -> int:
    """A number from low to high; small ones are as frequent as large ones."""
    return min(high, int(math.exp(rng.uniform(math.log(low), math.log(high + 1)))))


def any_sizes(task: str, rng: random.Random) -> Sizes:
    """Arguments for a task's generator, but for its length."""
    if task == "copying":
        length = rng.randint(6, 128)
        return {"length": length, "span": rng.randint(3, length - 1)}
    if task == "needles":
        return {"keys": few(rng, 1, 24), "value_words": few(rng, 1, 6)}
    if task == "variable_tracking":
        return {"chains": few(rng, 1, 8), "hops": few(rng, 1, 12)}
    if task == "modular":
        return {"terms": few(rng, 2, 24)}
    return {"entities": rng.randint(4, 32)}


def encoded(task: str, rng: random.Random, sizes: Sizes) -> tuple[list[int], int]:
    """Token ids of an example, answer included, and how many tokens its answer has."""
    prompt, answer = GENERATORS[task](rng, **sizes)
    ids = words.encode(answer, add_bos=False)
    return words.encode(prompt) + ids, len(ids)


def draw_batch(rng: random.Random, tokens: int, max_total: int, min_rows: int) -> tuple[torch.Tensor, int, str]:
    """ids [b, length] int16, the number of answer tokens at their end, and the task's name."""
    task = rng.choices(list(SHARES), list(SHARES.values()))[0]
    short = task != "generated_text" and rng.random() < SHORT_SHARE
    sizes: Sizes = any_sizes(task, rng) if short or rng.random() < 0.5 else {}
    if task == "generated_text":
        low, high = 64, min(max_total, LONGEST_TEXT)
    else:
        low, high = len(encoded(task, rng, sizes | {"total": None})[0]), max_total
    if low > high:  # the facts alone are too long
        return draw_batch(rng, tokens, max_total, min_rows)
    if short:
        high, tokens = min(high, low + SHORT_FILLER), tokens // 2
    sizes["total"] = round(math.exp(rng.uniform(math.log(low), math.log(high))))
    rows = [encoded(task, rng, sizes) for _ in range(max(min_rows, tokens // sizes["total"]))]
    return torch.tensor([ids for ids, _ in rows], dtype=torch.int16), rows[0][1], task


class Mixture(IterableDataset):
    """Endless batches. `seed` fixes them together with the number of workers."""

    def __init__(self, seed: int, tokens: int, max_total: int, min_rows: int = 8) -> None:
        self.seed, self.tokens, self.max_total, self.min_rows = seed, tokens, max_total, min_rows

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int, str]]:
        worker = get_worker_info()
        rng = random.Random(f"{self.seed}/{worker.id if worker else 0}")
        while True:
            yield draw_batch(rng, self.tokens, self.max_total, self.min_rows)


def batches(mixture: Mixture, workers: int) -> Iterator[tuple[torch.Tensor, int, str]]:
    """Batches of `mixture`, made by so many processes; 0: here, when they are asked for."""
    ahead = 4 if workers else None  # small numbers and few batches, for containers have little shared memory
    return iter(DataLoader(mixture, batch_size=None, num_workers=workers, prefetch_factor=ahead))
