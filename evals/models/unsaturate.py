# SPDX-License-Identifier: Apache-2.0
"""Perturb a trained model until it answers only part of the questions, as a model that is not saturated.

    python -m evals.models.unsaturate --model evals/models/demo --out evals/models/unsaturated --window 0.76 0.86
    python -m evals.models.unsaturate --model evals/models/demo --out evals/models/unsaturated --noise 0.05

A model that is nearly always right leads by several logits, so a kernel's small errors change no answer. Here every
matrix W becomes W + t std(W) E, where E has standard normal entries from a seed: margins shrink, and answers with small
margins are the ones that a small error turns. With --window, t is searched by bisection until exact match on --task at
--total tokens lies in the window (E stays the same, so accuracy falls with t but for single examples); with --noise, t
is given and the checkpoint made in seconds. The record of every score is in training_log.jsonl.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from evals.models.export import load_checkpoint, save_checkpoint
from evals.models.model import DemoModel
from evals.models.run_state import Run
from evals.models.task_scores import TASKS, score_task

SMALLEST, LARGEST = 1e-3, 1.0
CHECK_SEED, FINAL_SEED = 777, 12345


def directions(model: DemoModel, seed: int) -> dict[str, Tensor]:
    """Noise of each matrix, scaled to the matrix's standard deviation; drawn on the CPU, so equal everywhere."""
    generator = torch.Generator().manual_seed(seed)
    noise = {}
    for name, weight in model.state_dict().items():
        if weight.dim() == 2:
            drawn = torch.randn(weight.shape, generator=generator)
            noise[name] = (drawn * weight.float().std().cpu()).to(weight.device)
    return noise


@torch.no_grad()
def perturb(model: DemoModel, clean: dict[str, Tensor], noise: dict[str, Tensor], amount: float) -> None:
    """Give `model` the weights `clean` + `amount` x `noise`, rounded to bfloat16 as they will be stored."""
    moved = {name: weight + amount * noise[name] if name in noise else weight for name, weight in clean.items()}
    model.load_state_dict({name: weight.bfloat16().to(weight.dtype) for name, weight in moved.items()})


def search(
    model: DemoModel, clean: dict[str, Tensor], noise: dict[str, Tensor], args: argparse.Namespace, run: Run
) -> float:
    """The amount of noise that brings exact match into the window.

    Raises:
        ValueError: no amount from SMALLEST to LARGEST tried by 14 bisections does.
    """
    low, high = math.log(SMALLEST), math.log(LARGEST)
    for _ in range(14):
        amount = math.exp((low + high) / 2)
        perturb(model, clean, noise, amount)
        share = check(model, args, run, args.check_examples, CHECK_SEED, "check", amount)
        if args.window[0] <= share <= args.window[1]:
            return amount
        low, high = ((low + high) / 2, high) if share > args.window[1] else (low, (low + high) / 2)
    raise ValueError(f"no amount of noise brings exact match into {args.window}: the window is too narrow")


def check(
    model: DemoModel, args: argparse.Namespace, run: Run, examples: int, seed: int, event: str, amount: float
) -> float:
    """Exact match of the model as it is, logged."""
    device = next(model.parameters()).device
    score = score_task(model, device, args.task, args.total, examples, seed)
    run.log(event=event, noise=amount, dtype=args.dtype, **asdict(score))
    assert score.exact_match is not None
    return score.exact_match


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder to write")
    amount = parser.add_mutually_exclusive_group(required=True)
    amount.add_argument("--window", type=float, nargs=2, metavar=("LOW", "HIGH"), help="exact match wanted")
    amount.add_argument("--noise", type=float, help="amount of noise, in standard deviations of each matrix")
    parser.add_argument("--task", choices=[task for task in TASKS if task != "generated_text"], default="chain_recall")
    parser.add_argument("--total", type=int, default=8192, help="tokens of prompt and answer")
    parser.add_argument("--check-examples", type=int, default=100)
    parser.add_argument("--final-examples", type=int, default=200, help="0: no score at the end")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="arithmetic of the scores")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if args.out.resolve() == args.model.resolve():
        raise ValueError("--out is --model: the trained weights would be lost")
    run = Run(args.out, minutes=1.0, state=None)
    dtype = getattr(torch, args.dtype)
    model = load_checkpoint(args.model, dtype, args.device)
    noise = directions(model, args.seed)
    clean = {name: weight.clone() for name, weight in model.state_dict().items()}
    amount = args.noise if args.noise is not None else search(model, clean, noise, args, run)
    perturb(model, clean, noise, amount)
    save_checkpoint(model, args.out)
    run.log(event="made", model=args.model.name, noise=amount, seed=args.seed)
    if args.final_examples:
        served = load_checkpoint(args.out, dtype, args.device)
        check(served, args, run, args.final_examples, FINAL_SEED, "final", amount)


if __name__ == "__main__":
    main()
