# SPDX-License-Identifier: Apache-2.0
"""Chain recall: follow the links of one shuffled cycle, link by link.

A prompt lists the `n` links of one random cycle over `n` of 256 node tokens in random order, each written
`source target ;`, then asks `? start`. The answer is the walk of `hops` nodes from `start`:

    n017 n203 ; n099 n017 ; n203 n099 ; ? n099   ->   n017 n203 n099

Every answer token needs one look-up somewhere in the whole context and depends on the token before it, so a single
wrong attention result spoils the rest of the walk. Filler tokens (a vocabulary of their own) sprinkled between the
links stretch the context to any length without changing the answer.

Pure Python and seeded: the same `random.Random` state gives the same example on every machine.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

NUM_NODES = 256
NUM_FILLERS = 64
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")
PAD_ID, BOS_ID, EOS_ID, UNK_ID = range(4)
LINK_END, QUERY = ";", "?"
LINK_END_ID, QUERY_ID = 4, 5
FIRST_NODE_ID = 6
FIRST_FILLER_ID = FIRST_NODE_ID + NUM_NODES


def node_word(node: int) -> str:
    """The word of node 0-255, `n000` to `n255`."""
    return f"n{node:03d}"


def filler_word(filler: int) -> str:
    """The word of filler 0-63, `w00` to `w63`."""
    return f"w{filler:02d}"


WORDS: tuple[str, ...] = (
    *SPECIAL_TOKENS,
    LINK_END,
    QUERY,
    *(node_word(i) for i in range(NUM_NODES)),
    *(filler_word(i) for i in range(NUM_FILLERS)),
)
VOCAB: dict[str, int] = {word: i for i, word in enumerate(WORDS)}


@dataclass(frozen=True)
class Example:
    """One question: `prompt` (text without `<bos>`) and `answer` (the walk's node words, separated by spaces)."""

    prompt: str
    answer: str

    @property
    def prompt_ids(self) -> list[int]:
        """Token ids of the prompt, `<bos>` first, as the tokenizer gives them."""
        return encode(self.prompt)

    @property
    def answer_ids(self) -> list[int]:
        """Token ids of the answer, without `<bos>`."""
        return encode(self.answer, add_bos=False)


def encode(text: str, add_bos: bool = True) -> list[int]:
    """Token ids of `text`: one id a word, `<unk>` for an unknown word; the tokenizer's result without the tokenizer."""
    ids = [VOCAB.get(word, UNK_ID) for word in text.split()]
    return [BOS_ID, *ids] if add_bos else ids


def decode(ids: list[int]) -> str:
    """The words of `ids` separated by spaces, special tokens left out."""
    return " ".join(WORDS[i] for i in ids if i >= len(SPECIAL_TOKENS))


def total_tokens(links: int, hops: int, filler_tokens: int = 0) -> int:
    """Tokens of prompt and answer together: `<bos>`, three a link, the filler, `? start`, one a hop."""
    return 1 + 3 * links + filler_tokens + 2 + hops


def filler_for_length(links: int, hops: int, total: int) -> int:
    """Filler tokens that bring prompt and answer together to `total` tokens.

    Raises ValueError when the links, the query and the answer alone are longer than `total`.
    """
    least = total_tokens(links, hops)
    if total < least:
        raise ValueError(f"total must be at least {least} for {links} links and {hops} hops, got {total}")
    return total - least


def make_example(rng: random.Random, links: int, hops: int, filler_tokens: int = 0) -> Example:
    """Draw one example from `rng`.

    links: length of the cycle, 2 to 256. hops: answer length, at least 1 (more hops than links goes round again).
    filler_tokens: filler words, placed uniformly at random among the links. Raises ValueError outside those ranges.
    """
    if not 2 <= links <= NUM_NODES:
        raise ValueError(f"links must be 2 to {NUM_NODES}, got {links}")
    if hops < 1:
        raise ValueError(f"hops must be at least 1, got {hops}")
    if filler_tokens < 0:
        raise ValueError(f"filler_tokens must not be negative, got {filler_tokens}")
    cycle = rng.sample(range(NUM_NODES), links)
    order = rng.sample(range(links), links)
    pieces = [filler_word(rng.randrange(NUM_FILLERS)) for _ in range(links + filler_tokens)]
    for slot, j in zip(sorted(rng.sample(range(links + filler_tokens), links)), order, strict=True):
        pieces[slot] = f"{node_word(cycle[j])} {node_word(cycle[(j + 1) % links])} {LINK_END}"
    start = rng.randrange(links)
    walk = [node_word(cycle[(start + k) % links]) for k in range(hops + 1)]
    return Example(prompt=" ".join([*pieces, QUERY, walk[0]]), answer=" ".join(walk[1:]))


def example(rng: random.Random, *, links: int = 64, hops: int = 64, total: int | None = 1024) -> tuple[str, str]:
    """One prompt and its answer, of `total` tokens together (None: no filler), as the other tasks' `example`."""
    filler = 0 if total is None else filler_for_length(links, hops, total)
    made = make_example(rng, links, hops, filler)
    return made.prompt, made.answer


def correct_hops(example: Example, completion: str) -> int:
    """How many leading words of `completion` agree with the answer; equal to the answer's length when all is right."""
    count = 0
    for got, expected in zip(completion.split(), example.answer.split(), strict=False):
        if got != expected:
            break
        count += 1
    return count
