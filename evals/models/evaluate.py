# SPDX-License-Identifier: Apache-2.0
"""Exact match of a demo checkpoint on fresh chain-recall examples.

    python -m evals.models.evaluate --model evals/models/demo --dtype bfloat16

One teacher-forced pass over prompt and answer: when the arg-max equals the answer at every answer position, greedy
decoding gives exactly that answer (each step then sees the tokens of the teacher), and at the first position where it
differs greedy decoding goes wrong too. So the exact match below is that of greedy generation.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from evals.models.export import load_checkpoint
from evals.models.model import DemoModel
from evals.tasks.chain_recall import filler_for_length, make_example

# (links, hops, total tokens or None for no filler)
SHORT_CASES: tuple[tuple[int, int, int | None], ...] = tuple((n, n, None) for n in (8, 16, 32, 48, 64))
LONG_CASES: tuple[tuple[int, int, int | None], ...] = (
    (48, 48, 256),
    *((64, 64, total) for total in (1024, 2048, 4096, 8192)),
)


@dataclass(frozen=True)
class Score:
    """exact_match: share of examples with the whole walk right; token_accuracy: share of answer tokens right;
    min_margin: smallest lead (logits) of a right answer token over the next best."""

    links: int
    hops: int
    total_tokens: int
    examples: int
    exact_match: float
    token_accuracy: float
    min_margin: float


@torch.no_grad()
def score_case(
    model: DemoModel, links: int, hops: int, total: int | None, examples: int, seed: int, tokens_per_pass: int = 65536
) -> Score:
    """Score `model` on `examples` examples drawn from random.Random(seed)."""
    device = next(model.parameters()).device
    rng = random.Random(seed)
    filler = 0 if total is None else filler_for_length(links, hops, total)
    rows = []
    for _ in range(examples):
        example = make_example(rng, links, hops, filler)
        rows.append(example.prompt_ids + example.answer_ids)
    exact = right = 0
    margin = float("inf")
    for chunk in torch.tensor(rows).split(max(1, tokens_per_pass // len(rows[0]))):
        ids = chunk.to(device)
        answer = ids[:, -hops:]
        logits = model(ids[:, :-1], last=hops).float()
        hit = logits.argmax(-1) == answer
        chosen = logits.gather(-1, answer[..., None]).squeeze(-1)
        others = logits.scatter(-1, answer[..., None], float("-inf")).amax(-1)
        exact += int(hit.all(1).sum())
        right += int(hit.sum())
        margin = min(margin, float((chosen - others).min()))
    return Score(links, hops, len(rows[0]), examples, exact / examples, right / (examples * hops), margin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--examples", type=int, default=200, help="examples a case without filler")
    parser.add_argument(
        "--long-examples", type=int, default=0, help="examples a case with filler (slow on a CPU); 0: none"
    )
    parser.add_argument("--seed", type=int, default=12345)
    args = parser.parse_args()
    model = load_checkpoint(args.model, getattr(torch, args.dtype), args.device)
    cases = [(case, args.examples) for case in SHORT_CASES] + [(case, args.long_examples) for case in LONG_CASES]
    for (links, hops, total), examples in cases:
        if examples:
            print(asdict(score_case(model, links, hops, total, examples, args.seed)), flush=True)


if __name__ == "__main__":
    main()
