# SPDX-License-Identifier: Apache-2.0
"""The words of all offline tasks, a token each, and how tokens are counted.

Chain recall's words come first and keep their ids, so a tokenizer of these words reads what the demo model's reads.

    n000-n255   names: nodes, keys, variables, entities          w00-w63   filler
    v00-v31     numbers                                          t00-t63   the words of generated text
    ; ? = mod   the end of a fact, the question, "is", "modulo"
"""

from __future__ import annotations

from . import chain_recall

NUM_NAMES = chain_recall.NUM_NODES
NUM_NUMBERS = 32
NUM_TEXT_WORDS = 64
END, QUERY, EQUALS, MOD = chain_recall.LINK_END, chain_recall.QUERY, "=", "mod"

name_word = chain_recall.node_word
filler_word = chain_recall.filler_word


def number_word(number: int) -> str:
    """The word of number 0-31, `v00` to `v31`."""
    return f"v{number:02d}"


def text_word(index: int) -> str:
    """Word 0-63 of generated text, `t00` to `t63`."""
    return f"t{index:02d}"


WORDS: tuple[str, ...] = (
    *chain_recall.WORDS,
    EQUALS,
    MOD,
    *(number_word(i) for i in range(NUM_NUMBERS)),
    *(text_word(i) for i in range(NUM_TEXT_WORDS)),
)
VOCAB: dict[str, int] = {word: i for i, word in enumerate(WORDS)}


def encode(text: str, add_bos: bool = True) -> list[int]:
    """Token ids of `text`: one id a word, `<unk>` for an unknown word."""
    ids = [VOCAB.get(word, chain_recall.UNK_ID) for word in text.split()]
    return [chain_recall.BOS_ID, *ids] if add_bos else ids


def filler_needed(total: int | None, *parts: str) -> int:
    """Filler words that bring `<bos>` and the words of `parts` to `total` tokens; 0 for None.

    Raises ValueError where the parts alone are longer.
    """
    least = 1 + sum(len(part.split()) for part in parts)
    if total is None:
        return 0
    if total < least:
        raise ValueError(f"total must be at least {least} for these facts and this question, got {total}")
    return total - least
