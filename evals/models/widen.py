# SPDX-License-Identifier: Apache-2.0
"""The same model with every attention head many times: kernels for 64 and 128 query heads get a model they fit.

    python -m evals.models.widen --model evals/models/unsaturated --out evals/models/unsaturated-wide --copies 16

Models small enough to be trained in minutes have few heads, but kernels for many are others. Each head is repeated and
its columns of the output projection are divided by the number of copies, a power of two: the same function, and every
copy's product is exact; only the order of summation differs.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch

from evals.models.export import load_checkpoint, save_checkpoint
from evals.models.model import DemoModel
from evals.models.sparse_model import SparseConfig, SparseModel


def widen(model: DemoModel, copies: int) -> DemoModel:
    """A model with `copies` times the heads, each head's copies one after the other.

    Raises ValueError where `copies` is no power of two, or the hidden size no multiple of the heads, which
    transformers asks for.
    """
    config = model.config
    heads = config.num_attention_heads * copies
    if copies < 1 or copies & (copies - 1):
        raise ValueError(f"copies must be a power of two, got {copies}")
    if config.hidden_size % heads:
        raise ValueError(f"hidden size {config.hidden_size} is not a multiple of {heads} heads")
    wider = dataclasses.replace(config, num_attention_heads=heads)
    wide = SparseModel(wider) if isinstance(wider, SparseConfig) else DemoModel(wider)
    weights = dict(model.state_dict())
    for name, weight in weights.items():
        kind = name.split(".")[-2]
        if ".indexer." in name:
            continue
        if kind in ("q_proj", "q_b_proj", "kv_b_proj"):  # rows by head
            by_head = weight.unflatten(0, (config.num_attention_heads, -1))
            weights[name] = by_head.repeat_interleave(copies, 0).flatten(0, 1)
        elif kind == "o_proj":  # columns by head
            by_head = weight.unflatten(1, (config.num_attention_heads, -1))
            weights[name] = (by_head / copies).repeat_interleave(copies, 1).flatten(1, 2)
    wide.load_state_dict(weights)
    return wide.to(next(model.parameters()).device).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder, dense or sparse")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder to write")
    parser.add_argument("--copies", type=int, default=16, help="of each head, a power of two")
    args = parser.parse_args()
    with torch.no_grad():
        save_checkpoint(widen(load_checkpoint(args.model), args.copies), args.out)


if __name__ == "__main__":
    main()
