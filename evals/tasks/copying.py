# SPDX-License-Identifier: Apache-2.0
"""Copy: repeat part of a sequence that lies somewhere in a long text.

    w07 w21 n017 n203 n099 n004 n131 n250 w33 ? n203   ->   n099 n004 n131

The names of a sequence differ, so the word before says which comes next; no fixed distance does.
"""

from __future__ import annotations

import random

from .chain_recall import NUM_FILLERS
from .words import NUM_NAMES, QUERY, filler_needed, filler_word, name_word


def example(
    rng: random.Random, *, length: int = 96, span: int = 48, total: int | None = None, depth: float | None = None
) -> tuple[str, str]:
    """One prompt and its answer.

    Args:
        length: names of the sequence, up to 256.
        span: names to repeat, after one that the question names; up to ``length - 1``.
        total: tokens of prompt and answer together, `<bos>` included; None: no filler.
        depth: where the sequence lies, 0 (the text begins with it) to 1 (the text ends with it); None: anywhere.
    """
    if not 1 <= span < length <= NUM_NAMES:
        raise ValueError(f"span must be 1 to length - 1 and length up to {NUM_NAMES}, got {span} and {length}")
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"depth must be 0 to 1, got {depth}")
    names = [name_word(name) for name in rng.sample(range(NUM_NAMES), length)]
    start = rng.randrange(length - span)
    question, answer = f"{QUERY} {names[start]}", " ".join(names[start + 1 : start + 1 + span])
    sequence = " ".join(names)
    filler = filler_needed(total, sequence, question, answer)
    before = rng.randint(0, filler) if depth is None else round(depth * filler)
    words = [filler_word(rng.randrange(NUM_FILLERS)) for _ in range(filler)]
    return " ".join([*words[:before], sequence, *words[before:], question]), answer
