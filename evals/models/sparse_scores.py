# SPDX-License-Identifier: Apache-2.0
"""Does the indexer matter? A sparse model's answers with dense attention, its own indexer, and a random one.

    python -m evals.models.sparse_scores --model evals/models/demo-dsa --total 2048 --total 8192

For each task and length: exact match and perplexity of the three, and the indexers' recall, which is the share of the
dense attention's weights (mean over heads, layers and answer tokens) that lies on the keys they pick. Contexts up to
`index_topk` say nothing, because all keys are picked there. Indexers score in e4m3, as kernels that serve do.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evals.models.export import load_checkpoint
from evals.models.run_state import fused_attention
from evals.models.sparse_model import Mode, SparseModel
from evals.models.task_scores import TASKS, encode_rows, score_task, tasks_of

LENGTHS = (2048, 4096, 8192)
RANDOM_SEED = 4711


@torch.no_grad()
def recall(model: SparseModel, ids: Tensor, answer_tokens: int, topk: int) -> list[float]:
    """Mean recall of each layer at the positions that predict the answer. ids [b, length]."""
    device = next(model.parameters()).device
    rows = torch.arange(ids.shape[1] - 1 - answer_tokens, ids.shape[1] - 1, device=device)
    total = torch.zeros(model.config.num_hidden_layers, device=device)
    mode = Mode(topk=topk, quantise=True, rows=rows.unsqueeze(0), recall=True)
    for row in ids[:, :-1].to(device).split(1):
        with fused_attention(device):
            total += model.run(row, mode, last=1)[1].float()
    return (total / len(ids)).tolist()


def compare(
    model: SparseModel, tasks: list[str], lengths: tuple[int, ...], examples: int, seed: int, topk: int | None = None
) -> Iterator[dict[str, Any]]:
    """One record for each task and length. The model's indexers are the same afterwards.

    topk: keys to pick; the model's `index_topk` by default. examples: for the answers; four are enough for recall.
    """
    topk = topk or model.config.index_topk
    device = next(model.parameters()).device
    trained = {name: weight.clone() for name, weight in model.state_dict().items()}
    for task in tasks:
        for total in lengths:
            record: dict[str, Any] = {"task": task, "total": total, "topk": topk, "examples": examples}
            ids, answer_tokens = encode_rows(task, total, min(4, examples), seed + 1)
            for name, keys in (("dense", None), ("trained", topk), ("random", topk)):
                if name == "random":
                    model.renew_indexers(RANDOM_SEED)

                def forward(batch: Tensor, last: int, keys: int | None = keys) -> Tensor:
                    return model.run(batch, Mode(topk=keys, quantise=True), last)[0]

                with fused_attention(device):
                    score = score_task(forward, device, task, total, examples, seed, 16384)
                record |= {f"{name}_exact": score.exact_match, f"{name}_perplexity": score.perplexity}
                record[f"{name}_tokens"] = score.token_accuracy
                if keys is not None:
                    record[f"{name}_recall"] = [round(x, 4) for x in recall(model, ids, answer_tokens, keys)]
            model.load_state_dict(trained)
            yield record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder of a DeepseekV32ForCausalLM")
    parser.add_argument("--task", choices=list(TASKS), action="append", help="all that the model knows by default")
    parser.add_argument("--total", type=int, action="append", help=f"tokens; default {LENGTHS}")
    parser.add_argument("--topk", type=int, help="keys to pick; the model's own number by default")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--examples", type=int, default=100)
    parser.add_argument("--seed", type=int, default=12345)
    args = parser.parse_args()
    model = load_checkpoint(args.model, getattr(torch, args.dtype), args.device)
    if not isinstance(model, SparseModel):
        parser.error(f"{args.model} has no indexer")
    tasks = args.task or tasks_of(model.config.vocab_size)
    for record in compare(model, tasks, tuple(args.total or LENGTHS), args.examples, args.seed, args.topk):
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
