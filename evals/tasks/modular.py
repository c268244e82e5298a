# SPDX-License-Identifier: Apache-2.0
"""Modular arithmetic: the running sum of numbers that are looked up by name.

    mod v10 n017 v03 ; n099 v09 ; n203 v05 ; ? n017   ->   v03 n099 v02 n203 v07

The answer goes through the names in the order of the text; after each comes the sum, modulo the number after `mod`, of
the numbers so far. Every sum needs a look-up in the text and the sum before, so a wrong one spoils all that follow.
"""

from __future__ import annotations

import random

from .haystack import spread
from .words import END, MOD, NUM_NAMES, NUM_NUMBERS, QUERY, filler_needed, name_word, number_word


def example(rng: random.Random, *, terms: int = 16, modulus: int = 10, total: int | None = None) -> tuple[str, str]:
    """One prompt and its answer of ``2 * terms - 1`` words.

    Args:
        terms: numbers to add, up to 256.
        modulus: 2 to 31.
        total: tokens of prompt and answer together, `<bos>` included; None: no filler.
    """
    if not 1 <= terms <= NUM_NAMES or not 2 <= modulus < NUM_NUMBERS:
        raise ValueError(f"terms must be 1 to {NUM_NAMES} and modulus 2 to {NUM_NUMBERS - 1}, got {terms}, {modulus}")
    names = [name_word(name) for name in rng.sample(range(NUM_NAMES), terms)]
    numbers = [rng.randrange(modulus) for _ in range(terms)]
    facts = [f"{name} {number_word(number)} {END}" for name, number in zip(names, numbers, strict=True)]
    words, partial = [], 0
    for name, number in zip(names, numbers, strict=True):
        partial = (partial + number) % modulus
        words += [name, number_word(partial)]
    head, question, answer = f"{MOD} {number_word(modulus)}", f"{QUERY} {names[0]}", " ".join(words[1:])
    text = spread(rng, facts, filler_needed(total, head, *facts, question, answer))
    return f"{head} {text} {question}", answer
