# SPDX-License-Identifier: Apache-2.0
"""Train the demo model on chain recall and export it as a DeepseekV2ForCausalLM checkpoint.

    python -m evals.models.train --out evals/models/demo --heads 4 --seed 0 --device cuda

Needs torch, safetensors and tokenizers. Writes the checkpoint and training_log.jsonl to --out. A run whose first stages
do not converge starts over with the next seed (the log says so): a small transformer finds the look-up circuit suddenly
or not at all. Time only decides when to stop; --minutes bounds it.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

# Read when CUDA starts; without it cuBLAS gives different bits from run to run.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch

from evals.models.curriculum import Curriculum
from evals.models.evaluate import LONG_CASES, SHORT_CASES, Score, score_case
from evals.models.export import load_checkpoint, save_checkpoint
from evals.models.model import DemoModel, ModelConfig
from evals.models.run_state import adamw, answer_step, precision
from evals.tasks.chain_recall import WORDS

WARMUP_STEPS = 60
CHECK_SEED, FINAL_SEED = 777, 12345


class Log:
    """Writes each record to a JSON-lines file and to standard output."""

    def __init__(self, path: Path, start: float) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w")
        self._start = start

    def write(self, **record: Any) -> None:
        record["seconds"] = round(time.monotonic() - self._start, 1)
        line = json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in record.items()})
        self._file.write(line + "\n")
        self._file.flush()
        print(line, flush=True)


def learning_rate(peak: float, step: int, stage: str, anneal_fraction: float) -> float:
    """Warm up, stay at the peak for copy and chain, at half of it for filler, then fall linearly to 2% of that."""
    if stage == "anneal":
        return 0.5 * peak * max(0.02, 1 - anneal_fraction)
    return peak * min(1.0, (step + 1) / WARMUP_STEPS) * (0.5 if stage == "filler" else 1.0)


class Attempt:
    """One model, its optimiser and its curriculum, for one seed."""

    def __init__(self, args: argparse.Namespace, seed: int, log: Log) -> None:
        self.args, self.log, self.seed = args, log, seed
        self.device = torch.device(args.device)
        torch.manual_seed(seed)
        config = ModelConfig(
            vocab_size=len(WORDS),
            hidden_size=args.hidden,
            intermediate_size=2 * args.hidden,
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads,
        )
        self.model = DemoModel(config).to(self.device)
        self.optimizer = adamw(self.model, args.lr)
        self.curriculum = Curriculum(seed, self.device, args.tokens, args.max_links, args.max_total)
        self.step = self.anneal_step = 0
        parameters = sum(p.numel() for p in self.model.parameters())
        log.write(
            event="start", seed=seed, parameters=parameters, heads=args.heads, hidden=args.hidden, layers=args.layers
        )

    def train_step(self) -> None:
        curriculum = self.curriculum
        stage = curriculum.stage
        rate = learning_rate(self.args.lr, self.step, stage, self.anneal_step / self.args.anneal_steps)
        ids, answer_tokens = curriculum.batch()
        loss, accuracy = answer_step(self.model, self.optimizer, rate, ids, answer_tokens)
        self.step += 1
        self.anneal_step += stage == "anneal"
        promotion = curriculum.record(accuracy)
        if promotion:
            self.log.write(event="promotion", step=self.step, to=promotion)
        if self.step % self.args.log_every == 0:
            self.log.write(
                step=self.step,
                stage=stage,
                links=curriculum.links,
                tokens=ids.shape[1],
                loss=loss,
                accuracy=accuracy,
                lr=rate,
            )

    def stuck(self) -> bool:
        """The first stages have taken far longer than a run that converges."""
        early = self.curriculum.stage == "copy" or (self.curriculum.stage == "chain" and self.curriculum.links < 12)
        return early and self.step >= self.args.stuck_steps

    def check(self) -> float:
        """Worst exact match over the longest chain, without filler and at the longest context."""
        self.model.eval()
        links = self.args.max_links
        with precision(self.device):
            cases = [(None, 200), (self.args.max_total, self.args.check_examples)]
            scores = [score_case(self.model, links, links, total, count, CHECK_SEED) for total, count in cases]
        self.model.train()
        for score in scores:
            self.log.write(event="check", step=self.step, **asdict(score))
        return min(score.exact_match for score in scores)


def train(args: argparse.Namespace, log: Log, deadline: float) -> None:
    """Train until the targets are met or time is up; the best model seen at a check is in args.out afterwards."""
    attempt = Attempt(args, args.seed, log)
    best, saved = -1.0, False
    rounds = 0
    while time.monotonic() < deadline:
        attempt.train_step()
        if attempt.stuck():
            attempt = Attempt(args, attempt.seed + 1, log)
            continue
        remaining = deadline - time.monotonic()
        if attempt.curriculum.stage != "anneal" and remaining < args.anneal_reserve * 60 * args.minutes:
            # The only place where time changes what is learnt; a run that gets here says so in its log.
            attempt.curriculum.force_anneal()
            log.write(event="anneal forced by time", step=attempt.step)
        if attempt.anneal_step >= args.anneal_steps:
            worst = attempt.check()
            if worst > best:
                best, saved = worst, True
                save_checkpoint(attempt.model, args.out)
            rounds += 1
            if best >= args.target or rounds >= args.max_rounds:
                break
            attempt.anneal_step = 0  # another round from the raised learning rate
    if not saved or (best < args.target and attempt.anneal_step > args.anneal_steps // 2 and attempt.check() > best):
        save_checkpoint(attempt.model, args.out)


def final_scores(args: argparse.Namespace, log: Log) -> list[Score]:
    """Score the saved checkpoint as it will be served: weights and arithmetic in bfloat16."""
    model = load_checkpoint(args.out, torch.bfloat16, args.device)
    scores = []
    for cases, examples in ((SHORT_CASES, args.final_examples), (LONG_CASES, args.final_long_examples)):
        for links, hops, total in cases:
            if examples and links <= args.max_links and (total is None or total <= args.max_total):
                scores.append(score_case(model, links, hops, total, examples, FINAL_SEED))
                log.write(event="final", dtype="bfloat16", **asdict(scores[-1]))
    return scores


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder to write")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=4.0, help="stop training after this time")
    parser.add_argument("--tokens", type=int, default=65536, help="tokens a batch; 1536 suits a CPU")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--max-links", type=int, default=64)
    parser.add_argument("--max-total", type=int, default=8192, help="longest context, answer included")
    parser.add_argument("--anneal-steps", type=int, default=800)
    parser.add_argument("--anneal-reserve", type=float, default=0.35, help="share of the time kept for annealing")
    parser.add_argument("--max-rounds", type=int, default=3, help="annealing rounds at most")
    parser.add_argument(
        "--stuck-steps", type=int, default=1000, help="give a seed up after this many steps without chains"
    )
    parser.add_argument("--target", type=float, default=0.995, help="exact match at which training stops")
    parser.add_argument("--check-examples", type=int, default=96, help="examples of the longest context in a check")
    parser.add_argument("--final-examples", type=int, default=400, help="examples a case without filler; 0: none")
    parser.add_argument("--final-long-examples", type=int, default=200, help="examples a case with filler; 0: none")
    parser.add_argument("--log-every", type=int, default=25)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    start = time.monotonic()
    # The seed fixes the initial weights and every batch. A CPU then repeats a run exactly; on a GPU flash attention's
    # backward adds in varying order (the warning it prints), so weights differ in their last bits and drift apart.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs time only
    log = Log(args.out / "training_log.jsonl", start)
    train(args, log, start + 60 * args.minutes)
    log.write(event="trained", torch=torch.__version__, device=args.device)
    final_scores(args, log)


if __name__ == "__main__":
    main()
