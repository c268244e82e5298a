# SPDX-License-Identifier: Apache-2.0
"""Exact match, token accuracy and perplexity of a model on the offline tasks, on fresh examples.

    python -m evals.models.task_scores --model evals/models/demo --task chain_recall --total 1024

One teacher-forced pass gives what greedy decoding would (see evaluate.py).
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from evals.models.export import load_checkpoint
from evals.models.mixture import GENERATORS
from evals.tasks import chain_recall, words

TASKS: dict[str, Callable[..., tuple[str, str]]] = {"chain_recall": chain_recall.example, **GENERATORS}
LENGTHS = (1024, 4096, 8192)


@dataclass(frozen=True)
class TaskScore:
    """exact_match: share of examples whose whole answer is right (None for text, which has no answer);
    token_accuracy: share of answer tokens predicted right; perplexity: of the answers."""

    task: str
    total: int
    examples: int
    exact_match: float | None
    token_accuracy: float
    perplexity: float


def encode_rows(task: str, total: int, examples: int, seed: int) -> tuple[Tensor, int]:
    """ids [examples, total] and the number of answer tokens, for a task's default sizes."""
    rng = random.Random(seed)
    rows, count = [], 0
    for _ in range(examples):
        prompt, answer = TASKS[task](rng, total=total)
        ids = words.encode(answer, add_bos=False)
        rows.append(words.encode(prompt) + ids)
        count = len(ids)
    return torch.tensor(rows), count


@torch.no_grad()
def score_task(
    forward: Callable[[Tensor, int], Tensor],
    device: torch.device,
    task: str,
    total: int,
    examples: int,
    seed: int,
    tokens_per_pass: int = 65536,
) -> TaskScore:
    """Score a model on `examples` examples of a task, drawn from random.Random(seed).

    forward: from ids and a number to the logits of that many last positions.
    """
    ids, answer_tokens = encode_rows(task, total, examples, seed)
    exact, right, loss = 0, 0, 0.0
    for chunk in ids.split(max(1, tokens_per_pass // total)):
        chunk = chunk.to(device)
        answer = chunk[:, -answer_tokens:]
        logits = forward(chunk[:, :-1], answer_tokens).float()
        hit = logits.argmax(-1) == answer
        exact += int(hit.all(1).sum())
        right += int(hit.sum())
        loss += float(functional.cross_entropy(logits.flatten(0, 1), answer.flatten(), reduction="sum"))
    count = examples * answer_tokens
    return TaskScore(
        task,
        total,
        examples,
        None if task == "generated_text" else exact / examples,
        right / count,
        math.exp(loss / count),
    )


def tasks_of(vocab_size: int) -> list[str]:
    """Tasks whose words a model's vocabulary has."""
    return list(TASKS) if vocab_size == len(words.WORDS) else ["chain_recall"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--task", choices=list(TASKS), action="append", help="all that the model knows by default")
    parser.add_argument("--total", type=int, action="append", help=f"tokens of prompt and answer; default {LENGTHS}")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--seed", type=int, default=12345)
    args = parser.parse_args()
    model = load_checkpoint(args.model, getattr(torch, args.dtype), args.device)
    for task in args.task or tasks_of(model.config.vocab_size):
        for total in args.total or LENGTHS:
            score = score_task(model, torch.device(args.device), task, total, args.examples, args.seed)
            print(asdict(score), flush=True)


if __name__ == "__main__":
    main()
