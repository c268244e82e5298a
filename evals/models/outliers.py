# SPDX-License-Identifier: Apache-2.0
"""The same model with large and small channels in its latent: a stress test for FP8 caches that bfloat16 does not feel.

    python -m evals.models.outliers --model evals/models/demo --out evals/models/demo-outliers

MLA caches c = norm(x) * w, the norm's weights, and reads it through the matrix kv_b. Multiplying channel j of w by a
power of two and dividing column j of kv_b by it changes neither the model nor, powers of two being exact, a bit of
its bfloat16 arithmetic (but where a product underflows); it changes what an 8-bit cache has to store. Most channels
shrink and a few in each group of 128 grow, so that one scale has to serve values that are orders of magnitude
apart, as in large models: their latents have such channels, while a small model's have not.

    format       what it meets with
    fp8          scale 1 for all (vLLM's, unless calibrated): small channels are subnormal numbers or zero
    fp8_ds_mla   a scale for each 128: the large channels set it, the small ones are coarse under it

The command prints, with caches simulated in PyTorch, how far the answers of both models move under either format.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from evals.models.export import load_checkpoint, save_checkpoint
from evals.models.model import DemoModel, attentions
from evals.models.task_scores import encode_rows
from vllm_fusedmla.kernels import layout

CACHES = ("bf16", "fp8", "fp8_ds_mla")


def channel_exponents(seed: int, width: int, large: int, up: int, down: int) -> Tensor:
    """[width] int: exponents of the factors; in each group of 128 `large` channels have `up`, the others -down to 0."""
    rng = random.Random(seed)
    exponents = [rng.randint(-down, 0) for _ in range(width)]
    for start in range(0, width, layout.QUANT_GROUP):
        for channel in rng.sample(range(start, start + layout.QUANT_GROUP), large):
            exponents[channel] = up
    return torch.tensor(exponents)


def stress(model: DemoModel, seed: int, large: int, up: int, down: int) -> None:
    """Give every layer's latent large and small channels, in place; the model computes what it did."""
    with torch.no_grad():
        for number, attention in enumerate(attentions(model)):
            exponents = channel_exponents(seed + number, attention.kv_a_layernorm.weight.numel(), large, up, down)
            factor = torch.exp2(exponents.float()).to(attention.kv_a_layernorm.weight)
            attention.kv_a_layernorm.weight.mul_(factor)
            attention.kv_b_proj.weight.div_(factor)


def through_cache(latent: Tensor, cache: str) -> Tensor:
    """What attention reads of a latent [..., 512] that was stored in a cache format."""
    rows = nn.functional.pad(latent.flatten(0, -2).float(), (0, layout.D_ROPE))
    stored = layout.unpack_rows(layout.pack_rows(rows, cache), cache)
    return stored[:, : layout.D_V].view(latent.shape).to(latent.dtype)


@torch.no_grad()
def divergence(model: DemoModel, cache: str, ids: Tensor, answer_tokens: int) -> float:
    """Mean KL (nats a token) of the answers' distribution with a cache of that format from that without rounding."""

    def logprobs() -> Tensor:
        rows = [model(row[:, :-1], last=answer_tokens).float().log_softmax(-1) for row in ids.split(1)]
        return torch.cat(rows)

    exact = logprobs()
    hooks = [
        attention.kv_a_layernorm.register_forward_hook(lambda module, inputs, latent: through_cache(latent, cache))
        for attention in attentions(model)
    ]
    try:
        rounded = logprobs()
    finally:
        for hook in hooks:
            hook.remove()
    return float((exact.exp() * (exact - rounded)).sum(-1).mean())


def report(models: dict[str, DemoModel], total: int, examples: int, show: Callable[[str], None] = print) -> None:
    """Show a JSON line for each model and cache format."""
    for name, model in models.items():
        device = next(model.parameters()).device
        ids, answer_tokens = encode_rows("chain_recall", total, examples, 12345)
        for cache in CACHES:
            kl = divergence(model, cache, ids.to(device), answer_tokens)
            show(json.dumps({"model": name, "cache": cache, "total": total, "examples": examples, "kl": kl}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder, dense or sparse")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder to write")
    parser.add_argument("--large", type=int, default=4, help="large channels in each group of 128")
    parser.add_argument("--up", type=int, default=6, help="large channels grow by two to the power of this")
    parser.add_argument("--down", type=int, default=11, help="the others shrink by up to two to the power of this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--total", type=int, default=1024, help="tokens of the examples that the report uses")
    parser.add_argument("--examples", type=int, default=8, help="0: no report")
    args = parser.parse_args()
    model = load_checkpoint(args.model)
    stress(model, args.seed, args.large, args.up, args.down)
    save_checkpoint(model, args.out)
    if args.examples:
        models = {"before": load_checkpoint(args.model), "after": load_checkpoint(args.out)}
        report(models, args.total, args.examples)


if __name__ == "__main__":
    main()
