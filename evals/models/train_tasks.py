# SPDX-License-Identifier: Apache-2.0
"""Train a dense model on all offline tasks and export it as a DeepseekV2ForCausalLM checkpoint.

    python -m evals.models.train_tasks --out evals/models/tasks --device cuda
    python -m evals.models.train_tasks --out evals/models/stopped --stop-window 0.76 0.86 --others 0 --layers 2 \\
        --heads 4 --hidden 96 --nope 64 --lr 3e-3 --device cuda

Chain recall's curriculum (curriculum.py) comes first, for the look-up circuits that every task needs; from its stage
`filler` on, three quarters of the batches are of the other tasks (--others). Time decides: the learning rate falls over
the last part of --minutes. With --stop-window training ends as soon as the share of right answers on chain recall at
the longest context lies in that window, for a checkpoint on which small errors of a kernel cost answers; unsaturate.py
makes such a checkpoint from a trained one in seconds.

Writes the checkpoint and training_log.jsonl to --out; with --state a run that was cut off goes on from there.
"""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # batches differ in shape

import torch
from torch import Tensor

from evals.models.curriculum import Curriculum
from evals.models.export import load_checkpoint, save_checkpoint
from evals.models.mixture import Mixture, batches
from evals.models.model import DemoModel, ModelConfig
from evals.models.run_state import Run, adamw, answer_step, precision
from evals.models.task_scores import LENGTHS, TASKS, score_task
from evals.tasks import words

WARMUP_STEPS = 60
CHECK_SEED, FINAL_SEED = 777, 12345


class Trainer:
    """A model, its optimiser and its sources of batches."""

    model: DemoModel
    optimizer: torch.optim.Optimizer
    curriculum: Curriculum

    def __init__(self, args: argparse.Namespace, run: Run) -> None:
        self.args, self.run = args, run
        self.device = torch.device(args.device)
        saved = run.saved or {"attempt": 0, "resumes": -1}
        self.attempt, self.resumes = saved["attempt"], saved["resumes"] + 1
        self._begin()
        if run.saved:
            if saved["config"] != asdict(self.model.config):
                raise ValueError(f"{args.state} is of a run with another model: {saved['config']}")
            self.step = saved["step"]
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.curriculum.restore(saved["curriculum"])

    def _begin(self) -> None:
        args, seed = self.args, self.args.seed + self.attempt
        torch.manual_seed(seed)
        self.step, self.rate = 0, args.lr * 0.7**self.attempt
        self.accuracy: dict[str, float] = {}  # recent, of each task, for the log
        config = ModelConfig(
            vocab_size=len(words.WORDS),
            hidden_size=args.hidden,
            intermediate_size=2 * args.hidden,
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads,
            qk_nope_head_dim=args.nope,
        )
        self.model = DemoModel(config).to(self.device)
        self.optimizer = adamw(self.model, args.lr)
        self.curriculum = Curriculum(seed, self.device, args.tokens, args.max_links, args.max_total)
        # Batches that workers had made ahead are gone after a restart; another seed's are as good.
        draws = 1000 * seed + self.resumes
        mixture = Mixture(draws, args.tokens, args.max_total)
        self._mixture: Iterator[tuple[Tensor, int, str]] = batches(mixture, args.workers)
        self._coin = random.Random(draws)
        parameters = sum(p.numel() for p in self.model.parameters())
        self.run.log(event="start", seed=seed, parameters=parameters, **asdict(config))

    def state(self) -> dict[str, Any]:
        return {
            "config": asdict(self.model.config),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "curriculum": self.curriculum.state(),
            "step": self.step,
            "attempt": self.attempt,
            "resumes": self.resumes,
        }

    def _batch(self) -> tuple[Tensor, int, str]:
        mixed = self.curriculum.stage in ("filler", "anneal")
        if mixed and self._coin.random() < self.args.others:
            ids, answer_tokens, task = next(self._mixture)
            return ids.to(self.device).long(), answer_tokens, task
        ids, answer_tokens = self.curriculum.batch()
        return ids, answer_tokens, "chain_recall" if self.curriculum.stage != "copy" else "copy"

    def learning_rate(self) -> float:
        """Warm up, stay; half of that from `filler` on; over the last part of the time fall to 2% of it."""
        rate = self.rate * min(1.0, (self.step + 1) / WARMUP_STEPS)
        if self.curriculum.stage in ("filler", "anneal"):
            rate *= 0.5
        left = (1 - self.run.fraction) / self.args.anneal_share
        return rate * max(0.02, min(1.0, left))

    def train_step(self) -> None:
        rate = self.learning_rate()
        ids, answer_tokens, task = self._batch()
        loss, accuracy = answer_step(self.model, self.optimizer, rate, ids, answer_tokens)
        self.accuracy[task] = 0.8 * self.accuracy.get(task, accuracy) + 0.2 * accuracy
        self.step += 1
        if task in ("copy", "chain_recall"):
            promotion = self.curriculum.record(accuracy)
            if promotion:
                self.run.log(event="promotion", step=self.step, to=promotion)
        if self.step % self.args.log_every == 0:
            shown = {f"acc_{name}": value for name, value in self.accuracy.items()}
            stage, length = self.curriculum.stage, ids.shape[1]
            self.run.log(step=self.step, stage=stage, tokens=length, loss=loss, lr=rate, **shown)

    def start_over_if_stuck(self) -> None:
        """A small transformer finds the look-up circuit suddenly or not at all: another seed, more slowly."""
        early = self.curriculum.stage == "copy" or (self.curriculum.stage == "chain" and self.curriculum.links < 12)
        if early and self.step >= self.args.stuck_steps:
            self.attempt += 1
            self._begin()

    def right_answers(self, examples: int, seed: int = CHECK_SEED) -> float:
        """Share of exact answers on chain recall at the longest context, in the arithmetic of training."""
        self.model.eval()
        with precision(self.device):
            total = self.args.max_total
            score = score_task(self.model, self.device, "chain_recall", total, examples, seed)
        self.model.train()
        self.run.log(event="check", step=self.step, **asdict(score))
        assert score.exact_match is not None
        return score.exact_match


def between(trainer: Trainer, low: dict[str, Tensor], window: tuple[float, float]) -> None:
    """Find weights in the window between `low`, which answers too little, and the model's own, which answers too much.

    Bisects the line between the two, along which the share of right answers is continuous but for single examples.
    """
    high = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    left, right = 0.0, 1.0
    for _ in range(12):
        middle = (left + right) / 2
        trainer.model.load_state_dict({name: low[name].lerp(high[name], middle) for name in high})
        share = trainer.right_answers(trainer.args.check_examples)
        if share < window[0]:
            left = middle
        elif share > window[1]:
            right = middle
        else:
            return


def train(args: argparse.Namespace, run: Run) -> None:
    """Train until time is up or the window is met, and write the checkpoint."""
    trainer = Trainer(args, run)
    below: dict[str, Tensor] | None = None
    done = False
    while run.fraction < 1 and not done:
        trainer.train_step()
        trainer.start_over_if_stuck()
        run.maybe_save(trainer.state)
        mixed = trainer.curriculum.stage in ("filler", "anneal")
        if args.stop_window and mixed and trainer.step % args.check_every == 0:
            low, high = args.stop_window
            share = trainer.right_answers(args.check_examples)
            if share < low:
                below = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
            elif share > high and below is not None:
                between(trainer, below, (low, high))
            done = share >= low
    run.log(event="trained", step=trainer.step, torch=torch.__version__, device=args.device)
    save_checkpoint(trainer.model, args.out)
    run.finish()


def final_scores(args: argparse.Namespace, run: Run) -> None:
    """Score the checkpoint as it will be served: weights and arithmetic in bfloat16."""
    model = load_checkpoint(args.out, torch.bfloat16, args.device)
    for task in TASKS:
        for total in LENGTHS:
            if args.final_examples and total <= args.max_total:
                score = score_task(model, torch.device(args.device), task, total, args.final_examples, FINAL_SEED)
                run.log(event="final", dtype="bfloat16", **asdict(score))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder to write")
    parser.add_argument("--state", type=Path, help="file with which a run that was cut off goes on")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--nope", type=int, default=128, help="qk_nope_head_dim")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=4.0, help="training time")
    parser.add_argument("--tokens", type=int, default=65536, help="tokens a batch; 1536 suits a CPU")
    parser.add_argument("--others", type=float, default=0.75, help="share of batches of other tasks, from filler on")
    parser.add_argument("--workers", type=int, default=8, help="processes that make batches; 0: none")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--max-links", type=int, default=64)
    parser.add_argument("--max-total", type=int, default=8192, help="longest context, answer included")
    parser.add_argument("--anneal-share", type=float, default=0.4, help="share of the time in which the rate falls")
    parser.add_argument("--stuck-steps", type=int, default=1000, help="steps after which a seed without chains ends")
    parser.add_argument("--stop-window", type=float, nargs=2, metavar=("LOW", "HIGH"), help="see above")
    parser.add_argument("--check-every", type=int, default=25, help="steps between checks of the window")
    parser.add_argument("--check-examples", type=int, default=256)
    parser.add_argument("--final-examples", type=int, default=200, help="examples a case; 0: none")
    parser.add_argument("--log-every", type=int, default=25)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    run = Run(args.out, args.minutes, args.state)
    train(args, run)
    final_scores(args, run)


if __name__ == "__main__":
    main()
