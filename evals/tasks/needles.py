# SPDX-License-Identifier: Apache-2.0
"""Multi-key needles: find one key among many in a long text and repeat the words that belong to it.

    w07 n017 = n203 n099 n004 n131 ; w33 w02 n054 = n001 n077 n190 n012 ; w18 ? n054 =   ->   n001 n077 n190 n012

All names of a prompt differ, so every word of the answer is one look-up and a wrong word does not lead back to the
right needle. After RULER's multi-key needle in a haystack (Hsieh et al., arXiv:2404.06654), in words of our own.
"""

from __future__ import annotations

import random

from .haystack import spread
from .words import END, EQUALS, NUM_NAMES, QUERY, filler_needed, name_word


def example(
    rng: random.Random, *, keys: int = 8, value_words: int = 4, total: int | None = 1024, depth: float | None = None
) -> tuple[str, str]:
    """One prompt and its answer.

    Args:
        keys, value_words: needles and the names that each key has; ``keys * (1 + value_words)`` up to 256.
        total: tokens of prompt and answer together, `<bos>` included; None: no filler.
        depth: where in the text the needle asked for lies, 0 to 1; None: anywhere.
    """
    if keys < 1 or value_words < 1 or keys * (1 + value_words) > NUM_NAMES:
        raise ValueError(f"keys x (1 + value_words) must be 2 to {NUM_NAMES}, got {keys} and {value_words}")
    names = [name_word(name) for name in rng.sample(range(NUM_NAMES), keys * (1 + value_words))]
    needles = [names[i * (1 + value_words) : (i + 1) * (1 + value_words)] for i in range(keys)]
    facts = [f"{key} {EQUALS} {' '.join(value)} {END}" for key, *value in needles]
    asked = rng.randrange(keys)
    question, answer = f"{QUERY} {needles[asked][0]} {EQUALS}", " ".join(needles[asked][1:])
    text = spread(rng, facts, filler_needed(total, *facts, question, answer), [asked], depth)
    return f"{text} {question}", answer
