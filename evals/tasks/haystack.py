# SPDX-License-Identifier: Apache-2.0
"""Facts spread over a text of filler words: what all tasks with a length have in common."""

from __future__ import annotations

import random
from collections.abc import Sequence

from .chain_recall import NUM_FILLERS
from .words import filler_word

WINDOW = 0.1
"""Share of the text within which all facts of a question lie where a depth is asked for."""


def spread(
    rng: random.Random, facts: Sequence[str], filler: int, ours: Sequence[int] = (), depth: float | None = None
) -> str:
    """`facts` in the given order at random places among `filler` random filler words.

    Args:
        ours: which of the facts answer the question; only used with `depth`.
        depth: 0 to 1: the tenth of the text in which `ours` lie, from its very beginning to its very end. They keep
            their order among each other, not their places among the other facts. None: anywhere.
    """
    slots = len(facts) + filler
    order: list[int] = list(range(len(facts)))
    if depth is None or not ours:
        places = sorted(rng.sample(range(slots), len(facts)))
    else:
        if not 0 <= depth <= 1:
            raise ValueError(f"depth must be 0 to 1, got {depth}")
        width = max(len(ours), round(WINDOW * slots))
        first = round(depth * (slots - width))
        mine = sorted(rng.sample(range(first, first + width), len(ours)))
        free = sorted(set(range(slots)) - set(mine))
        others = sorted(rng.sample(free, len(facts) - len(ours)))
        order = [*ours, *(index for index in range(len(facts)) if index not in set(ours))]
        places = [*mine, *others]
    words = [filler_word(rng.randrange(NUM_FILLERS)) for _ in range(slots)]
    for place, index in zip(places, order, strict=True):
        words[place] = facts[index]
    return " ".join(words)
