# SPDX-License-Identifier: Apache-2.0
"""Write a small DeepSeek-V3.2 checkpoint with random weights: input for tests of sparse attention's plumbing.

Multi-head latent attention with a lightning indexer (DeepSeek-V3.2, deepseek-ai/DeepSeek-V3.2-Exp), every feed-forward
layer dense, with the latent, rope, nope, value and indexer head sizes that kernels serve. The weights are large enough
for attention to be peaked and for the choice of keys to change the answers, so that a wrong index shows; but they are
random, so the indexer does not choose well, and nothing can be said about accuracy with it.

    python -m evals.models.sparse_probe --out /tmp/probe --index-topk 64
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True)
class ProbeConfig:
    """Shape of the model, with the names of config.json."""

    vocab_size: int = 128
    hidden_size: int = 128
    intermediate_size: int = 256
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    q_lora_rank: int = 96
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 64
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    index_topk: int = 64
    index_n_heads: int = 32
    index_head_dim: int = 128
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 4096


def hf_config(config: ProbeConfig, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of a DeepseekV32ForCausalLM without mixture-of-experts layers."""
    return {
        "architectures": ["DeepseekV32ForCausalLM"],
        "model_type": "deepseek_v32",
        **asdict(config),
        "num_key_value_heads": config.num_attention_heads,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": str(dtype).removeprefix("torch."),
        # Every layer is dense, so no expert weight exists; transformers and vLLM still read these fields.
        "first_k_dense_replace": config.num_hidden_layers,
        "moe_layer_freq": 1,
        "n_routed_experts": 2,
        "n_shared_experts": 1,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 64,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
    }


def random_weights(config: ProbeConfig, seed: int) -> dict[str, Tensor]:
    """All weights by their Hugging Face names, float32.

    Matrices are N(0, gain / sqrt(fan in)). The queries' gain makes scores spread by several units, so that attention
    weights differ by orders of magnitude between keys; norms differ from 1 by up to a third.
    """
    generator = torch.Generator().manual_seed(seed)
    c = config
    head, heads = c.qk_nope_head_dim + c.qk_rope_head_dim, c.num_attention_heads
    weights: dict[str, Tensor] = {}

    def matrix(name: str, rows: int, columns: int, gain: float = 1.0) -> None:
        weights[f"{name}.weight"] = torch.randn(rows, columns, generator=generator) * gain * columns**-0.5

    def norm(name: str, size: int) -> None:
        weights[f"{name}.weight"] = 1 + (torch.rand(size, generator=generator) - 0.5) * 2 / 3

    weights["model.embed_tokens.weight"] = torch.randn(c.vocab_size, c.hidden_size, generator=generator)
    for layer in range(c.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        attention = f"{prefix}.self_attn"
        norm(f"{prefix}.input_layernorm", c.hidden_size)
        matrix(f"{attention}.q_a_proj", c.q_lora_rank, c.hidden_size)
        norm(f"{attention}.q_a_layernorm", c.q_lora_rank)
        matrix(f"{attention}.q_b_proj", heads * head, c.q_lora_rank, 2.0)
        matrix(f"{attention}.kv_a_proj_with_mqa", c.kv_lora_rank + c.qk_rope_head_dim, c.hidden_size)
        norm(f"{attention}.kv_a_layernorm", c.kv_lora_rank)
        matrix(f"{attention}.kv_b_proj", heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank)
        matrix(f"{attention}.o_proj", c.hidden_size, heads * c.v_head_dim, 1.5)
        matrix(f"{attention}.indexer.wq_b", c.index_n_heads * c.index_head_dim, c.q_lora_rank)
        matrix(f"{attention}.indexer.wk", c.index_head_dim, c.hidden_size)
        norm(f"{attention}.indexer.k_norm", c.index_head_dim)
        weights[f"{attention}.indexer.k_norm.bias"] = torch.randn(c.index_head_dim, generator=generator) * 0.1
        matrix(f"{attention}.indexer.weights_proj", c.index_n_heads, c.hidden_size)
        norm(f"{prefix}.post_attention_layernorm", c.hidden_size)
        matrix(f"{prefix}.mlp.gate_proj", c.intermediate_size, c.hidden_size)
        matrix(f"{prefix}.mlp.up_proj", c.intermediate_size, c.hidden_size)
        matrix(f"{prefix}.mlp.down_proj", c.hidden_size, c.intermediate_size)
    norm("model.norm", c.hidden_size)
    matrix("lm_head", c.vocab_size, c.hidden_size, 3.0)
    return weights


def save_probe(folder: Path, config: ProbeConfig, seed: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Write config.json and model.safetensors and return the weights, rounded to `dtype`.

    There is no tokenizer: give vLLM token ids and ``skip_tokenizer_init=True``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.to(dtype) for name, weight in random_weights(config, seed).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(hf_config(config, dtype), indent=2) + "\n")
    return weights


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--heads", type=int, default=ProbeConfig.num_attention_heads, help="query heads")
    parser.add_argument("--layers", type=int, default=ProbeConfig.num_hidden_layers)
    parser.add_argument("--index-topk", type=int, default=ProbeConfig.index_topk)
    args = parser.parse_args()
    config = ProbeConfig(num_attention_heads=args.heads, num_hidden_layers=args.layers, index_topk=args.index_topk)
    weights = save_probe(args.out, config, args.seed)
    print(f"{sum(weight.numel() for weight in weights.values()):,} parameters in {args.out}")


if __name__ == "__main__":
    main()
