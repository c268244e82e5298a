# SPDX-License-Identifier: Apache-2.0
"""Give a trained dense model DeepSeek-V3.2's indexer, train it, and export a DeepseekV32ForCausalLM checkpoint.

    python -m evals.models.train_sparse --dense evals/models/demo --out evals/models/demo-dsa --device cuda

In the two stages of DeepSeek-V3.2 (arXiv:2512.02556, section 2.1.1), after a conversion that keeps the dense model's
function (`sparse_twin`):

warmup  attention stays dense and everything but the indexers is frozen; they learn the attention weights, mean over
        heads, by the Kullback-Leibler divergence. Here at sampled query rows, half of them in the answer.
sparse  attention sees the indexers' choice; the model learns to answer with that, the indexers go on learning,
        each from its own loss alone.

The dense model's task decides the batches: chain recall alone, or all tasks. Writes the checkpoint and
training_log.jsonl to --out, at the end of which dense attention, the trained indexer and a random one are compared;
with --state a run that was cut off goes on from there.
"""

from __future__ import annotations

import argparse
import os
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # batches differ in shape

import torch
from torch import Tensor
from torch.nn import functional

from evals.models.curriculum import Curriculum
from evals.models.export import load_checkpoint, save_checkpoint
from evals.models.mixture import Mixture, batches
from evals.models.run_state import Run, precision
from evals.models.sparse_model import Mode, SparseModel, sparse_twin
from evals.models.sparse_scores import LENGTHS, compare
from evals.models.task_scores import tasks_of

WARMUP_STEPS = 20
FINAL_SEED = 12345


def sample_rows(batch: int, length: int, answer_tokens: int, count: int, generator: torch.Generator) -> Tensor:
    """Query positions [batch, count], half of them at random anywhere, half among those that predict the answer."""
    device = generator.device
    anywhere = torch.randint(length, (batch, count - count // 2), generator=generator, device=device)
    first = length - answer_tokens
    at_answer = torch.randint(first, length, (batch, count // 2), generator=generator, device=device)
    return torch.cat([anywhere, at_answer], 1)


class Trainer:
    """The model, its two optimisers' groups and its sources of batches."""

    def __init__(self, args: argparse.Namespace, run: Run) -> None:
        self.args, self.run = args, run
        self.device = torch.device(args.device)
        saved = run.saved or {"step": 0, "sparse_from": None, "resumes": -1}
        self.step, self.sparse_from, self.resumes = saved["step"], saved["sparse_from"], saved["resumes"] + 1
        index = {"index_topk": args.index_topk, "index_n_heads": args.index_heads}
        self.model = sparse_twin(load_checkpoint(args.dense), args.seed, **index).to(self.device).train()
        self.indexers = self.model.indexer_parameters()
        own = {id(weight) for weight in self.indexers}
        self.others = [weight for weight in self.model.parameters() if id(weight) not in own]
        groups = [{"params": self.indexers}, {"params": self.others}]
        self.optimizer = torch.optim.AdamW(
            groups, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0, fused=self.device.type == "cuda"
        )
        if run.saved:
            if saved["config"] != asdict(self.model.config):
                raise ValueError(f"{args.state} is of a run with another model: {saved['config']}")
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
        # Batches that were made ahead are gone after a restart; another seed's are as good.
        draws = 1000 * args.seed + self.resumes
        self.tasks = tasks_of(self.model.config.vocab_size)
        self._coin = random.Random(draws)
        self._generator = torch.Generator(device=self.device).manual_seed(draws)
        self._chains = Curriculum(draws, self.device, args.tokens, args.max_links, args.max_total, args.min_rows)
        self._chains.stage, self._chains.total = "anneal", args.max_total
        if len(self.tasks) > 1:
            self._mixture = batches(Mixture(draws, args.tokens, args.max_total, args.min_rows), args.workers)
        parameters = sum(weight.numel() for weight in self.model.parameters())
        indexers = sum(weight.numel() for weight in self.indexers)
        run.log(event="start", parameters=parameters, indexer_parameters=indexers, tasks=self.tasks, **index)

    def state(self) -> dict[str, Any]:
        return {
            "config": asdict(self.model.config),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "sparse_from": self.sparse_from,
            "resumes": self.resumes,
        }

    def _batch(self) -> tuple[Tensor, int]:
        if len(self.tasks) > 1 and self._coin.random() < 0.6:
            ids, answer_tokens, _ = next(self._mixture)
            return ids.to(self.device).long(), answer_tokens
        return self._chains.batch()

    def rates(self, sparse: bool) -> tuple[float, float]:
        """Learning rates of the indexers, a tenth as large in the sparse stage, and of the others; both fall."""
        share = self.args.warmup_share
        if not sparse:
            rise = min(1.0, (self.step + 1) / WARMUP_STEPS)
            return self.args.lr * rise * (1 - 0.9 * self.run.fraction / share), 0.0
        left = 1 - 0.9 * (self.run.fraction - share) / (1 - share)
        return 0.1 * self.args.lr * left, self.args.sparse_lr * left

    def train_step(self) -> None:
        sparse = self.run.fraction >= self.args.warmup_share
        if sparse and self.sparse_from is None:
            self.sparse_from = self.step
            self.run.log(event="sparse stage", step=self.step)
        rates = self.rates(sparse)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        ids, answer_tokens = self._batch()
        rows = sample_rows(len(ids), ids.shape[1] - 1, answer_tokens, self.args.rows, self._generator)
        topk = self.model.config.index_topk if sparse else None
        for weight in self.others:
            weight.requires_grad_(sparse)
        with precision(self.device):
            logits, divergences = self.model.run(ids[:, :-1], Mode(topk=topk, rows=rows), last=answer_tokens)
            answer = ids[:, -answer_tokens:]
            answering = functional.cross_entropy(logits.float().flatten(0, 1), answer.flatten())
        loss = divergences.sum() + (answering if sparse else 0.0)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        # The two losses share no weights, so each has a limit of its own.
        torch.nn.utils.clip_grad_norm_(self.indexers, 1.0)
        torch.nn.utils.clip_grad_norm_(self.others, 1.0)
        self.optimizer.step()
        self.step += 1
        if self.step % self.args.log_every == 0 or self.step == 1:
            accuracy = float((logits.argmax(-1) == answer).float().mean())
            divergence = [round(value, 5) for value in divergences.tolist()]
            self.run.log(
                step=self.step,
                stage="sparse" if sparse else "warmup",
                tokens=ids.shape[1],
                divergence=divergence,
                loss=answering.item(),
                accuracy=accuracy,
                lr=rates[0],
            )


def train(args: argparse.Namespace, run: Run) -> None:
    """Train until time is up, and write the checkpoint."""
    trainer = Trainer(args, run)
    while run.fraction < 1:
        trainer.train_step()
        run.maybe_save(trainer.state)
    run.log(event="trained", step=trainer.step, torch=torch.__version__, device=args.device)
    save_checkpoint(trainer.model, args.out)
    run.finish()


def final_scores(args: argparse.Namespace, run: Run) -> None:
    """Compare the three with the checkpoint as it will be served: weights and arithmetic in bfloat16."""
    model = load_checkpoint(args.out, torch.bfloat16, args.device)
    assert isinstance(model, SparseModel)
    lengths = tuple(total for total in args.final_lengths or LENGTHS if total <= args.max_total)
    if args.final_examples:
        for record in compare(model, tasks_of(model.config.vocab_size), lengths, args.final_examples, FINAL_SEED):
            run.log(event="final", dtype="bfloat16", **record)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", type=Path, required=True, help="checkpoint folder of the dense model")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder to write")
    parser.add_argument("--state", type=Path, help="file with which a run that was cut off goes on")
    parser.add_argument("--index-topk", type=int, default=512)
    parser.add_argument("--index-heads", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=2.0, help="training time")
    parser.add_argument("--warmup-share", type=float, default=0.5, help="share of the time for the warm-up")
    parser.add_argument("--tokens", type=int, default=32768, help="tokens a batch; 1024 suits a CPU")
    parser.add_argument("--min-rows", type=int, default=2, help="sequences a batch, at least")
    parser.add_argument("--rows", type=int, default=256, help="query rows of a sequence at which the indexers learn")
    parser.add_argument("--workers", type=int, default=6, help="processes that make batches; 0: none")
    parser.add_argument("--lr", type=float, default=5e-3, help="of the indexers in the warm-up")
    parser.add_argument("--sparse-lr", type=float, default=1e-4, help="of everything else in the sparse stage")
    parser.add_argument("--max-links", type=int, default=64)
    parser.add_argument("--max-total", type=int, default=8192, help="longest context, answer included")
    parser.add_argument("--final-lengths", type=int, nargs="+", help=f"default {LENGTHS}")
    parser.add_argument("--final-examples", type=int, default=100, help="examples a case; 0: none")
    parser.add_argument("--log-every", type=int, default=10)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    run = Run(args.out, args.minutes, args.state)
    train(args, run)
    final_scores(args, run)


if __name__ == "__main__":
    main()
