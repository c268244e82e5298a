# SPDX-License-Identifier: Apache-2.0
"""Variable tracking: name all variables that hold a number, in the order in which they got it.

    n017 = v05 ; w11 n080 = v21 ; n099 = n017 ; w40 n003 = n080 ; w02 n203 = n099 ; ? v05   ->   n017 n099 n203

Each of `chains` numbers is assigned to one variable and handed on `hops` times; assignments of a chain keep their
order, those of different chains are mixed. Each word of the answer is one look-up that needs the word before.
After RULER's variable tracking (Hsieh et al., arXiv:2404.06654), with a generator of our own.
"""

from __future__ import annotations

import random

from .haystack import spread
from .words import END, EQUALS, NUM_NAMES, NUM_NUMBERS, QUERY, filler_needed, name_word, number_word


def example(
    rng: random.Random, *, chains: int = 4, hops: int = 7, total: int | None = 1024, depth: float | None = None
) -> tuple[str, str]:
    """One prompt and its answer of ``hops + 1`` words.

    Args:
        chains: numbers assigned, 1 to 32; the question is about one of them.
        hops: assignments of one variable to another in a chain; ``chains * (hops + 1)`` up to 256.
        total: tokens of prompt and answer together, `<bos>` included; None: no filler.
        depth: the tenth of the text in which the chain lies, 0 to 1; None: anywhere.
    """
    if not 1 <= chains <= NUM_NUMBERS or hops < 0 or chains * (hops + 1) > NUM_NAMES:
        raise ValueError(
            f"chains must be 1 to {NUM_NUMBERS} and chains x (hops + 1) up to {NUM_NAMES}, got {chains} and {hops}"
        )
    size = hops + 1
    names = [name_word(name) for name in rng.sample(range(NUM_NAMES), chains * size)]
    numbers = [number_word(number) for number in rng.sample(range(NUM_NUMBERS), chains)]
    turns = rng.sample([chain for chain in range(chains) for _ in range(size)], chains * size)
    facts, chain_of, given = [], [], [0] * chains
    for chain in turns:
        step = given[chain]
        source = names[chain * size + step - 1] if step else numbers[chain]
        facts.append(f"{names[chain * size + step]} {EQUALS} {source} {END}")
        chain_of.append(chain)
        given[chain] += 1
    asked = rng.randrange(chains)
    question, answer = f"{QUERY} {numbers[asked]}", " ".join(names[asked * size : (asked + 1) * size])
    ours = [index for index, chain in enumerate(chain_of) if chain == asked]
    text = spread(rng, facts, filler_needed(total, *facts, question, answer), ours, depth)
    return f"{text} {question}", answer
