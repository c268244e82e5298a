# SPDX-License-Identifier: Apache-2.0
"""Held-out text: documents of a small artificial language, to be predicted word by word.

    t05 t48 n017 n203 t21 t12 n099 n004 t53 n017 n203 t02 ...

The words t00-t63 follow each other by a fixed rule with a known distribution, which a model learns in training. In
between stand entities: each document has its own few, some far more frequent than others, and each is followed by an
attribute that belongs to it in this document only, nine times in ten, else by that of another. So part of the
perplexity depends on reading the document, at all distances, and none of it can be learnt away: log-probabilities
stay clear of 0, and small errors show.
"""

from __future__ import annotations

import random

from .words import NUM_NAMES, NUM_TEXT_WORDS, name_word, text_word

SUCCESSORS = 6
ENTITY_SHARE = 0.25
FAITHFUL = 0.9


def successors(word: int) -> list[int]:
    """The text words that may follow text word `word`, the i-th twice as likely as the next; they need not differ."""
    return [(7 * word + 11 * i * i + 3 * i + 5) % NUM_TEXT_WORDS for i in range(SUCCESSORS)]


def example(rng: random.Random, *, total: int = 1024, entities: int = 16) -> tuple[str, str]:
    """An empty prompt and a document of ``total - 1`` words (`<bos>` is a token too).

    Args:
        total: tokens of the document, at least 2.
        entities: different ones in the document, 2 to 128; the k-th most frequent comes up in proportion to 1 / k.
    """
    if total < 2 or not 2 <= entities <= NUM_NAMES // 2:
        raise ValueError(f"total must be at least 2 and entities 2 to {NUM_NAMES // 2}, got {total} and {entities}")
    names = rng.sample(range(NUM_NAMES), 2 * entities)
    frequency = [1 / (k + 1) for k in range(entities)]
    decay = [0.5**i for i in range(SUCCESSORS)]
    word = rng.randrange(NUM_TEXT_WORDS)
    words = [text_word(word)]
    while len(words) < total - 1:
        if rng.random() < ENTITY_SHARE:
            entity = rng.choices(range(entities), frequency)[0]
            attribute = entity if rng.random() < FAITHFUL else rng.randrange(entities)
            words += [name_word(names[entity]), name_word(names[entities + attribute])]
        word = rng.choices(successors(word), decay)[0]
        words.append(text_word(word))
    return "", " ".join(words[: total - 1])
